// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/device/check.cuh"
#include "cuda/device/device_count.cuh"
#include "cuda/device/for_head_dim.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/vector_io.cuh"
#include "cuda/rms_norm.cuh"
#include "cuda/rope.cuh"
#include "cuda/tq4_cache.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/checks.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// Everything between the projections of q, k, v and attention, in one launch:
///   q = rope(rms_norm(q, q_norm)),  k = rope(rms_norm(k, k_norm)),  v = rms_norm(v),  k and v into the layer's cache.
/// Per head vector, one warp, in float from the projection to the cache; the values are rounded once, where they are
/// stored. So the result is, bit for bit, that of rms_norm<TIn, float>, rope<float> and the cache's update of floats.
/// The angles of a token are computed once a block.
///
/// Bytes, bf16 in and out (time at 4.3 TB/s), and what an H200 takes (median of graph replays):
///   full layer, 32 + 4 heads of 512, v = k     one token  70 KB, 4 KB of records:  4.3 us TQ4, 2.0 us flat
///                                              2048       143 MB + 4 MB (34 us):  84 us TQ4, 56 us flat
///   sliding layer, 32 + 16 + 16 heads of 256   one token  66 KB, 16 KB of ring:   2.5 us
///                                              2048       134 MB (31 us):         52 us
/// One token is all latency; the six launches that this one replaces take 11.2 us. Compression is its longest chain:
/// tq4_cache_update alone takes 3.9 us for a token and 41 us for 2048.
/// The reference composes the same from its components (reference/decoder_layer.hpp and layer_cache.hpp).
namespace gemma4::cuda {

/// K and V as bf16 [n_token, n_head_kv, head_dim], for a chunk that attends before its ring is committed.
struct FreshKv {
  View<Bf16, 3> k, v;
};

/// The same, and at once into the slots of a ring [n_head_kv, ring_len, head_dim]. Exact only while the tokens replace
/// none that a query of theirs still sees: n_token <= ring_len - window + 1.
struct RingKv {
  FreshKv fresh;
  View<Bf16, 3> ring_k, ring_v;
  std::int64_t window = 1;
};

/// A flat bf16 cache [1, n_head_kv, buffer_len, head_dim].
struct FlatKv {
  View<Bf16, 4> k, v;
};

/// A TQ4 cache of batch 1.
struct Tq4Kv {
  const Tq4Codec& codec;
  Tq4Records records;
};

/// A cache of one vector for K and V, of batch 1: V whole, and of K what turns with the position.
struct KvKv {
  const KvCodec& codec;
  KvRecords records;
};

namespace detail {

template <class TIn>
struct QkvParams {
  View<const TIn, 3> q, k, v;
  View<Bf16, 3> q_out;
  QkNorms norms;
  RopeParams rope;
  const std::int32_t* position = nullptr;
  std::int64_t position_host = 0;
};

/// Where K and V go. store() is called by a whole warp with the vector in its lanes.
struct FreshSink {
  View<Bf16, 3> k, v;

  template <int kHeadDim>
  __device__ __forceinline__ void store(bool is_k, std::int64_t token, std::int64_t head, std::int64_t /*position*/,
                                        const float (&x)[kHeadDim / 32]) const {
    store_values(&(is_k ? k : v)(token, head, (threadIdx.x & 31) * (kHeadDim / 32)), x);
  }
};

struct RingSink {
  FreshSink fresh;
  View<Bf16, 3> k, v;

  template <int kHeadDim>
  __device__ __forceinline__ void store(bool is_k, std::int64_t token, std::int64_t head, std::int64_t position,
                                        const float (&x)[kHeadDim / 32]) const {
    fresh.store<kHeadDim>(is_k, token, head, position, x);
    if (position < 0) return;  // the host may not know: never out of bounds
    const auto slot = ring_slot(static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(k.extent[1]));
    store_values(&(is_k ? k : v)(head, slot, (threadIdx.x & 31) * (kHeadDim / 32)), x);
  }
};

struct FlatSink {
  View<Bf16, 4> k, v;

  template <int kHeadDim>
  __device__ __forceinline__ void store(bool is_k, std::int64_t /*token*/, std::int64_t head, std::int64_t position,
                                        const float (&x)[kHeadDim / 32]) const {
    if (position < 0 || position >= k.extent[2]) return;
    store_values(&(is_k ? k : v)(0, head, position, (threadIdx.x & 31) * (kHeadDim / 32)), x);
  }
};

struct Tq4Sink {
  Tq4CodecParams codec;
  Tq4Records records;

  template <int kHeadDim>
  __device__ __forceinline__ void store(bool is_k, std::int64_t /*token*/, std::int64_t head, std::int64_t position,
                                        float (&x)[kHeadDim / 32]) const {
    if (position < 0 || position >= records.buffer_len) return;
    tq4_store_vector<kHeadDim>(codec, is_k, x, records, 0, head, position);
  }
};

struct KvSink {
  KvCodecParams codec;
  KvRecords records;
  const float* k_weight;

  template <int kHeadDim>
  __device__ __forceinline__ void store(bool is_k, std::int64_t /*token*/, std::int64_t head, std::int64_t position,
                                        float (&x)[kHeadDim / 32]) const {
    if (position < 0 || position >= records.buffer_len) return;
    kv_store<kHeadDim>(codec, k_weight, is_k, x, records, 0, head, position);
  }
};

inline constexpr int kQkvWarps = 4;
static_assert(kQkvWarps == kKvStoreWarps, "kv_store() has shared memory for so many warps");
inline constexpr std::int64_t kQkvBlocks = 4096;  ///< about; 1024 to 8192 differ by 6 % for a chunk of 2048 on an H200

/// grid: x = token, y = share of its vectors, of which K and V come first because they take longest. What depends on no
/// earlier kernel comes before the wait, and the first vector is on its way while the angles are made.
template <int kHeadDim, class TIn, class TSink>
__global__ void __launch_bounds__(32 * kQkvWarps, 5)
    qkv_prologue_kernel(const __grid_constant__ QkvParams<TIn> params, const __grid_constant__ TSink sink) {
  constexpr int kValues = kHeadDim / 32, kThreads = 32 * kQkvWarps, kPairs = (kHeadDim / 2 + kThreads - 1) / kThreads;
  __shared__ float2 cos_sin[kHeadDim / 2];
  const std::int64_t token = blockIdx.x;
  const int n_head_kv = static_cast<int>(params.k.extent[1]), n_head = static_cast<int>(params.q.extent[1]);
  const int n_vector = 2 * n_head_kv + n_head, step = static_cast<int>(gridDim.y) * kQkvWarps;
  const int lane_first = static_cast<int>(threadIdx.x & 31) * kValues;
  const auto source = [&](int vector) {
    if (vector < n_head_kv) return &params.k(token, vector, lane_first);
    if (vector < 2 * n_head_kv) return &params.v(token, vector - n_head_kv, lane_first);
    return &params.q(token, vector - 2 * n_head_kv, lane_first);
  };
  double frequency[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = static_cast<int>(threadIdx.x) + i * kThreads;
    frequency[i] = pair < params.rope.n_pair ? params.rope.frequency[pair] : 0.0;
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  int vector = static_cast<int>(blockIdx.y) * kQkvWarps + static_cast<int>(threadIdx.x / 32);
  RawValues<kValues, TIn> raw = {};
  if (vector < n_vector) raw.load(source(vector));
  const std::int64_t position = (params.position != nullptr ? *params.position : params.position_host) + token;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = static_cast<int>(threadIdx.x) + i * kThreads;
    if (pair < params.rope.n_pair) {
      cos_sin[pair % kValues * 16 + pair / kValues] = rope_cos_sin(position, frequency[i]);
    }
  }
  __syncthreads();
  for (; vector < n_vector; vector += step) {
    const bool is_k = vector < n_head_kv, is_q = vector >= 2 * n_head_kv;
    float x[kValues];
    raw.widen(x);
    if (vector + step < n_vector) raw.load(source(vector + step));
    rms_norm_warp<kHeadDim>(x, is_q ? params.norms.q : is_k ? params.norms.k : nullptr, params.norms.epsilon);
    if (is_q || is_k) rope_warp<kHeadDim>(cos_sin, params.rope.n_pair, x);
    if (is_q) {
      store_values(&params.q_out(token, vector - 2 * n_head_kv, lane_first), x);
    } else {
      sink.template store<kHeadDim>(is_k, token, is_k ? vector : vector - n_head_kv, position, x);
    }
  }
}

template <class T, int kRank>
void require_vectors(const char* who, const char* name, const View<T, kRank>& view) {
  require_contiguous_rows(who, name, view);
  require_aligned_rows(who, name, view);
}

/// What the targets refuse, and what the kernel takes of them.
template <class TIn>
[[nodiscard]] FreshSink qkv_sink(const char* who, const QkvParams<TIn>& params, const FreshKv& to) {
  const std::int64_t extents[3] = {params.k.extent[0], params.k.extent[1], params.k.extent[2]};
  require_extents(who, "k_new", to.k, extents);
  require_extents(who, "v_new", to.v, extents);
  require_vectors(who, "k_new", to.k);
  require_vectors(who, "v_new", to.v);
  const void *const k_in = params.k.data, *const v_in = params.v.data;
  require(k_in != v_in || (to.k.data != k_in && to.v.data != k_in), who,
          ": v is the projection of k, so neither k_new nor v_new can take its place");
  return {to.k, to.v};
}

template <class TIn>
[[nodiscard]] RingSink qkv_sink(const char* who, const QkvParams<TIn>& params, const RingKv& to) {
  const std::int64_t n_token = params.k.extent[0], ring_len = to.ring_k.extent[1];
  const std::int64_t extents[3] = {params.k.extent[1], ring_len, params.k.extent[2]};
  require_extents(who, "ring_k", to.ring_k, extents);
  require_extents(who, "ring_v", to.ring_v, extents);
  require_vectors(who, "ring_k", to.ring_k);
  require_vectors(who, "ring_v", to.ring_v);
  require(ring_len >= 1 && ring_len < (std::int64_t{1} << 31), who, ": ring_len ", ring_len, ", need 1 to 2^31 - 1");
  require(to.window >= 1, who, ": window ", to.window, ", need at least 1");
  require(n_token <= ring_len - to.window + 1, who, ": ", n_token, " tokens into a ring of ", ring_len,
          " would replace keys that a window of ", to.window,
          " still sees; use FreshKv, attend, then ring_cache_commit()");
  return {qkv_sink(who, params, to.fresh), to.ring_k, to.ring_v};
}

/// Refuses positions that the host knows to lie outside the buffer.
template <class TIn>
void require_qkv_position(const char* who, const QkvParams<TIn>& params, std::int64_t buffer_len) {
  if (params.position != nullptr) return;
  require(params.position_host + params.k.extent[0] <= buffer_len, who, ": tokens at positions ", params.position_host,
          " to ", params.position_host + params.k.extent[0] - 1, ", the buffer has ", buffer_len);
}

template <class TIn>
[[nodiscard]] FlatSink qkv_sink(const char* who, const QkvParams<TIn>& params, const FlatKv& to) {
  const std::int64_t extents[4] = {1, params.k.extent[1], to.k.extent[2], params.k.extent[2]};
  require_extents(who, "k_cache", to.k, extents);
  require_extents(who, "v_cache", to.v, extents);
  require_vectors(who, "k_cache", to.k);
  require_vectors(who, "v_cache", to.v);
  require_qkv_position(who, params, to.k.extent[2]);
  return {to.k, to.v};
}

template <class TIn>
[[nodiscard]] Tq4Sink qkv_sink(const char* who, const QkvParams<TIn>& params, const Tq4Kv& to) {
  require_tq4_records(who, to.records);
  const std::int64_t head_dim = params.k.extent[2];
  require(to.records.batch == 1 && to.records.n_head_kv == params.k.extent[1] && to.records.head_dim == head_dim, who,
          ": the cache is of batch ", to.records.batch, ", n_head_kv ", to.records.n_head_kv, ", head_dim ",
          to.records.head_dim, ", need 1, ", params.k.extent[1], ", ", head_dim);
  require(to.codec.head_dim() == head_dim, who, ": codec of head_dim ", to.codec.head_dim(), ", the heads have ",
          head_dim);
  require_qkv_position(who, params, to.records.buffer_len);
  return {to.codec.params(), to.records};
}

template <class TIn>
[[nodiscard]] KvSink qkv_sink(const char* who, const QkvParams<TIn>& params, const KvKv& to) {
  to.codec.require_fits(who, to.records);
  const std::int64_t head_dim = params.k.extent[2];
  require(to.records.batch == 1 && to.records.n_head_kv == params.k.extent[1] && to.records.head_dim == head_dim, who,
          ": the cache is of batch ", to.records.batch, ", n_head_kv ", to.records.n_head_kv, ", head_dim ",
          to.records.head_dim, ", need 1, ", params.k.extent[1], ", ", head_dim);
  require(params.rope.n_pair <= head_dim / 8, who, ": ", params.rope.n_pair, " pairs turn, the cache keeps ",
          head_dim / 8);
  require_qkv_position(who, params, to.records.buffer_len);
  return {to.codec.params(), to.records, params.norms.k};
}

template <class TIn>
void require_qkv(const char* who, const QkvParams<TIn>& params) {
  const std::int64_t n_token = params.q.extent[0], n_head_kv = params.k.extent[1], head_dim = params.q.extent[2];
  require_extents(who, "k", params.k, {n_token, n_head_kv, head_dim});
  require_extents(who, "v", params.v, {n_token, n_head_kv, head_dim});
  require_extents(who, "q_out", params.q_out, {n_token, params.q.extent[1], head_dim});
  require_vectors(who, "q", params.q);
  require_vectors(who, "k", params.k);
  require_vectors(who, "v", params.v);
  require_vectors(who, "q_out", params.q_out);
  require(params.rope.head_dim == head_dim, who, ": head_dim ", head_dim, ", the frequencies are for ",
          params.rope.head_dim);
  require(params.norms.q != nullptr && params.norms.k != nullptr, who, ": the norms of q and k have no weights");
  require_aligned_rows(who, "the weights of q's norm", make_view(params.norms.q, head_dim));
  require_aligned_rows(who, "the weights of k's norm", make_view(params.norms.k, head_dim));
  require(n_token < (std::int64_t{1} << 31) && params.q.extent[1] + 2 * n_head_kv <= 65535, who, ": ", n_token,
          " tokens of ", params.q.extent[1], " + 2 * ", n_head_kv, " heads, need fewer than 2^31 and at most 65535");
}

}  // namespace detail

/// What a call of qkv_prologue works on; TIn is Bf16 or float. Of no KV heads where queries go alone: k, v and what
/// takes them then have no extent, but addresses that differ, and both norms may be q's.
template <class TIn>
struct QkvCall {
  View<const TIn, 3> q, k, v;  ///< [n_token, n_head or n_head_kv, head_dim], as projected; v may be k (full layers have
                               ///< one projection for both)
  QkNorms norms;
  DeviceCount position;  ///< of the first token, on the device or known to the host; token t stands at position + t
  const RopeParams& rope;
  View<Bf16, 3> q_out;  ///< [n_token, n_head, head_dim]; may be q
};

/// Normalises and turns q, k and v of n_token tokens and stores K and V in the layer's cache, in one launch that can be
/// captured: a replay reads the position and the vectors of that moment. Rows of the cache of other positions keep
/// their bits. A position that only the device knows and that lies outside the cache is not written there; q_out and
/// k_new, v_new are written all the same.
/// @param target     FreshKv (k_new, v_new may be k, v unless those are one), RingKv, FlatKv, Tq4Kv or KvKv
/// @param overlap    on sm_90, lets the kernel be set up while the one before it in the stream still runs
/// @throws std::invalid_argument on extents that do not fit, rows that do not begin at multiples of 16 bytes, a
/// head_dim
///         other than 64, 128, 256 or 512, a missing position or, where the host knows it, one outside the buffer
/// Error before the rounding to bf16, for a normalised pair (a, b): (|a| + |b|) * ((head_dim / 32 + 20) * 2^-24 +
/// 2^-21)
template <class TIn, class TTarget>
void qkv_prologue(const QkvCall<TIn>& call, const TTarget& target, cudaStream_t stream, bool overlap = false) {
  constexpr const char* kWho = "qkv_prologue";
  const auto& [q, k, v, norms, position, rope, q_out] = call;
  require(position.device != nullptr || position.known(), kWho, ": position is neither on the device nor on the host");
  const detail::QkvParams<TIn> params{.q = q,
                                      .k = k,
                                      .v = v,
                                      .q_out = q_out,
                                      .norms = norms,
                                      .rope = rope,
                                      .position = position.device,
                                      .position_host = position.host};
  detail::require_qkv(kWho, params);
  const auto sink = detail::qkv_sink(kWho, params, target);
  const std::int64_t n_token = q.extent[0], n_vector = q.extent[1] + 2 * k.extent[1];
  if (n_token == 0 || n_vector == 0) return;
  // One token is spread over as many blocks as it has fours of vectors; a long chunk shares its angles.
  const std::int64_t n_share =
      std::clamp<std::int64_t>(detail::kQkvBlocks / n_token, 1, (n_vector + detail::kQkvWarps - 1) / detail::kQkvWarps);
  const detail::Launch launch{.what = "qkv_prologue_kernel",
                              .grid = dim3(static_cast<unsigned>(n_token), static_cast<unsigned>(n_share)),
                              .block = 32 * detail::kQkvWarps,
                              .stream = stream,
                              .overlap = overlap};
  for_head_dim(kWho, q.extent[2], [&](auto head_dim) {
    using Sink = std::remove_const_t<decltype(sink)>;
    launch(detail::qkv_prologue_kernel<decltype(head_dim)::value, TIn, Sink>, params, sink);
  });
}

}  // namespace gemma4::cuda
