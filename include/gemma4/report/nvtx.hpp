// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <type_traits>

/// Scopes that a profiler shows: phase, layer, component.
///
/// The graph opens a range by `const auto range = backend.range("attend")` and the backend decides the type. This file
/// holds the one that does nothing, for backends that run without a profiler; `cuda::NvtxRange` in cuda/device/nvtx.cuh
/// is its twin with the toolkit. Alternatives that lost: `__has_include` of the toolkit's header here would let CUDA
/// headers into include/ and would give one program two definitions of one class; a hook pointer costs a load and a
/// branch on every range.
namespace gemma4 {

/// What the graph needs of a range: made from a name that outlives it, over when it is destroyed, never copied.
template <class T>
concept ProfilerRange = std::constructible_from<T, const char*> && std::destructible<T> && !std::copyable<T>;

/// A range that costs nothing: no member, no code.
class NvtxRange {
 public:
  constexpr explicit NvtxRange(const char* /*name*/) noexcept {}
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};
static_assert(ProfilerRange<NvtxRange> && std::is_empty_v<NvtxRange> && std::is_trivially_destructible_v<NvtxRange>);

}  // namespace gemma4
