// SPDX-License-Identifier: Apache-2.0
// A cache format that nobody made a cache for: with FORGOTTEN this file must not compile, without it must.
// Compiled by forgotten_format_test.sh, as C++ for the reference and as CUDA for a device.
#include <optional>
#include <string_view>

#include "gemma4/cache_formats.hpp"

#if defined(__CUDACC__)
#include "cuda/layer_cache.cuh"
template <class TList>
using Caches = gemma4::cuda::AnyFullLayerCaches<TList>;
#else
#include "reference/layer_cache.hpp"
template <class TList>
using Caches = gemma4::reference::LayerCache<float, TList>;
#endif

/// Everything that the list asks of a format; only the caches are missing.
struct Forgotten : gemma4::Bf16Format {
  static std::optional<Forgotten> parse(std::string_view /*name*/) { return std::nullopt; }
  static Forgotten with_seed(std::uint64_t /*seed*/) { return {}; }
  bool operator==(const Forgotten&) const = default;
};
static_assert(gemma4::CacheFormat<Forgotten>);

#if defined(FORGOTTEN)
using List = gemma4::CacheFormatList<gemma4::Bf16Format, Forgotten>;
#else
using List = gemma4::CacheFormatList<gemma4::Bf16Format>;
#endif

static_assert(sizeof(Caches<List>) > 0);
