// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Atomics, which among fibers are ordinary reads and writes. Source: the CUDA C++ programming guide.
namespace gemma4::emulator {

/// Writes what `change` makes of the value; the value before.
template <class T, class TChange>
T exchange(T* at, const TChange& change) {
  const T before = *at;
  *at = static_cast<T>(change(before));
  return before;
}

}  // namespace gemma4::emulator

template <class T>
T atomicAdd(T* at, T value) {
  return gemma4::emulator::exchange(at, [value](T before) { return before + value; });
}
template <class T>
T atomicXor(T* at, T value) {
  return gemma4::emulator::exchange(at, [value](T before) { return before ^ value; });
}
template <class T>
T atomicMax(T* at, T value) {
  return gemma4::emulator::exchange(at, [value](T before) { return before < value ? value : before; });
}
template <class T>
T atomicMin(T* at, T value) {
  return gemma4::emulator::exchange(at, [value](T before) { return value < before ? value : before; });
}
/// Counts up to `last` and begins at 0 again.
inline unsigned atomicInc(unsigned* at, unsigned last) {
  return gemma4::emulator::exchange(at, [last](unsigned before) { return before >= last ? 0 : before + 1; });
}
