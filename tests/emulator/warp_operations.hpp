// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "tests/emulator/rendezvous.hpp"

/// Operations of a whole warp, and of a whole block, by CUDA's names. Source: the CUDA C++ programming guide.
namespace gemma4::emulator {

inline void need_all_lanes(unsigned mask) {
  if (mask != ~0u) fail("an operation of part of a warp is not emulated (mask ", mask, ")");
}

/// Every lane takes the value of lane source_of(its number, its argument).
template <class T, class TArgument, class TSource>
T shuffle(const char* name, unsigned mask, T value, TArgument argument, const TSource& source_of) {
  need_all_lanes(mask);
  struct In {
    T value;
    TArgument argument;
  };
  return warp_operation<T>(name, In{value, argument}, [&](const In* in, T* out) {
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = in[source_of(lane, in[lane].argument)].value;
  });
}

/// Every lane takes the sum, or what `add` makes, of all values.
template <class T, class TAdd>
T reduce(const char* name, unsigned mask, T value, const TAdd& add) {
  need_all_lanes(mask);
  return warp_operation<T>(name, value, [&](const T* in, T* out) {
    T sum = in[0];
    for (int lane = 1; lane < kLanes; ++lane) sum = add(sum, in[lane]);
    std::fill_n(out, kLanes, sum);
  });
}

}  // namespace gemma4::emulator

inline void __syncthreads() {
  gemma4::emulator::meet(0, 0);
}
inline int __syncthreads_or(int value) {
  return gemma4::emulator::meet_any(0, 0, value != 0);
}
inline void __syncwarp(unsigned mask = ~0u) {
  gemma4::emulator::need_all_lanes(mask);
  gemma4::emulator::warp_operation<char>("__syncwarp", char{}, [](const char*, char*) {});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return gemma4::emulator::shuffle("__shfl_xor_sync", mask, value, bits,
                                   [](int lane, int b) { return (lane ^ b) & 31; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return gemma4::emulator::shuffle("__shfl_sync", mask, value, from, [width](int lane, int source) {
    return (lane & ~(width - 1)) | (source & (width - 1));
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return gemma4::emulator::shuffle("__shfl_up_sync", mask, value, by,
                                   [](int lane, int b) { return lane >= b ? lane - b : lane; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return gemma4::emulator::shuffle("__shfl_down_sync", mask, value, by,
                                   [](int lane, int b) { return lane + b < 32 ? lane + b : lane; });
}

inline unsigned __ballot_sync(unsigned mask, int value) {
  gemma4::emulator::need_all_lanes(mask);
  return gemma4::emulator::warp_operation<unsigned>("__ballot_sync", value, [](const int* in, unsigned* out) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(in[lane] != 0) << lane;
    std::fill_n(out, 32, bits);
  });
}
inline int __any_sync(unsigned mask, int value) {
  return __ballot_sync(mask, value) != 0;
}
inline int __all_sync(unsigned mask, int value) {
  return __ballot_sync(mask, value) == ~0u;
}

template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return gemma4::emulator::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return gemma4::emulator::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return gemma4::emulator::reduce("__reduce_add_sync", mask, value, [](T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return gemma4::emulator::reduce("__reduce_or_sync", mask, value, [](T a, T b) { return a | b; });
}
