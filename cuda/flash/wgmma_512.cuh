// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/flash/wgmma.cuh"

/// Flash attention at head_dim 512 on sm_90a: 64 rows a block, because the float32 output of 64 rows already takes half
/// of the register file.
///
/// Three warpgroups: the first computes the scores, the softmax and output dimensions 0 to 255, the second dimensions
/// 256 to 511 from the probabilities that the first leaves in shared memory, the third feeds both through the tensor
/// copy engine. The scores of tile j + 1 are issued before the values of tile j, and those run under the softmax of
/// tile j + 1.
///
/// A trial that lost: two blocks of a cluster sharing K and V by multicast. It halves the L2 traffic, but the arrivals
/// at the other block's barriers cost more than that: 208 TFLOP/s at 32768 keys on an H200, against 565 without.
///
/// Shared memory: Q 64 KiB, K and V 64 KiB each in four slices that are refilled one by one, P twice 8 KiB.
namespace gemma4::cuda::detail {

struct Flash512 {
  static constexpr int kHeadDim = 512;
  static constexpr int kRows = 64;
  static constexpr int kThreads = 384;
  static constexpr int kSlices = 4;  ///< of a K tile (128 dimensions of 64 keys) and of a V tile (16 keys)
  static constexpr int kSliceBytes = 16384;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kRows * kHeadDim * 2;
  static constexpr int kV = kK + kSlices * kSliceBytes;
  static constexpr int kP = kV + kSlices * kSliceBytes;
  static constexpr int kPBytes = kRows * kWgmmaKeys * 2;
  static constexpr int kAlpha = kP + 2 * kPBytes;  ///< float [2][64]
  static constexpr int kInverse = kAlpha + 2 * kRows * 4;
  static constexpr int kBarriers = kInverse + kRows * 4;
  static constexpr int kSmemBytes = kBarriers + 8 * (6 + 4 * kSlices) + 1024;  ///< 1024 to align the base
  // Barrier numbers from kBarriers on.
  static constexpr int kQFull = 0, kKFull = 1, kKEmpty = kKFull + kSlices, kVFull = kKEmpty + kSlices,
                       kVEmpty = kVFull + kSlices, kPFull = kVEmpty + kSlices, kPEmpty = kPFull + 2,
                       kInverseFull = kPEmpty + 2;
  // Named barriers of both consumer warpgroups and (+ its number) of one alone.
  static constexpr int kSums = 1, kGroup = 2;
  static_assert(kSmemBytes <= 232448, "more than a block of sm_90 may have");
};

/// What every warp of a block knows about its work.
struct Flash512Block {
  std::uint32_t smem;  ///< aligned base
  int batch, head_kv, token0, n_tile;
  KeyExtent extent;
  [[nodiscard]] __device__ std::uint32_t barrier(int number) const {
    return smem + Flash512::kBarriers + 8 * static_cast<std::uint32_t>(number);
  }
};

/// The producer: one thread issues every copy of the block.
__device__ __forceinline__ void produce_512(const Flash512Block& block, const FlashMaps& maps, int group) {
  using T = Flash512;
  mbarrier_expect(block.barrier(T::kQFull), T::kRows * T::kHeadDim * 2);
  for (int half = 0; half < 2; ++half) {
    tensor_load(block.smem + T::kQ + half * (T::kRows * T::kHeadDim), &maps.q, block.barrier(T::kQFull), 0,
                block.head_kv * group, block.token0, 4 * half, block.batch);
  }
  const auto load_k = [&](int tile) {
    for (int slice = 0; slice < T::kSlices; ++slice) {
      mbarrier_wait(block.barrier(T::kKEmpty + slice), (tile & 1) ^ 1);
      mbarrier_expect(block.barrier(T::kKFull + slice), T::kSliceBytes);
      tensor_load(block.smem + T::kK + slice * T::kSliceBytes, &maps.k, block.barrier(T::kKFull + slice), 0,
                  tile * kWgmmaKeys, 2 * slice, block.head_kv, block.batch);
    }
  };
  const auto load_v = [&](int tile) {
    for (int slice = 0; slice < T::kSlices; ++slice) {
      mbarrier_wait(block.barrier(T::kVEmpty + slice), (tile & 1) ^ 1);
      mbarrier_expect(block.barrier(T::kVFull + slice), T::kSliceBytes);
      tensor_load(block.smem + T::kV + slice * T::kSliceBytes, &maps.v, block.barrier(T::kVFull + slice), 0,
                  tile * kWgmmaKeys + slice * 16, 0, block.head_kv, block.batch);
    }
  };
  load_k(0);
  for (int tile = 0; tile < block.n_tile; ++tile) {
    if (tile + 1 < block.n_tile) load_k(tile + 1);
    load_v(tile);
  }
}

/// A consumer warpgroup gives slices [first, last) of a tile back to the producer.
__device__ __forceinline__ void release_slices(const Flash512Block& block, int empty, int first, int last) {
  if ((threadIdx.x & 127) != 0) return;
  for (int slice = first; slice < last; ++slice) mbarrier_arrive(block.barrier(empty + slice));
}

/// Issues the scores of tile `tile`, one committed group a slice.
__device__ __forceinline__ void issue_scores(const Flash512Block& block, float (&s)[32], int tile) {
  using T = Flash512;
  const std::uint64_t q = opaque(wgmma_operand(block.smem + T::kQ, 0, 1024));
  const std::uint64_t k = opaque(wgmma_operand(block.smem + T::kK, 0, 1024));
#pragma unroll
  for (int slice = 0; slice < T::kSlices; ++slice) {
    mbarrier_wait(block.barrier(T::kKFull + slice), tile & 1);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const std::uint32_t offset = (2 * slice + step / 4) * 8192 + step % 4 * 32;
      wgmma_m64n64k16(s, wgmma_advance(q, offset), wgmma_advance(k, offset), slice + step > 0);
    }
    wgmma_commit();
  }
}

/// Issues o += p V for this warpgroup's half of the dimensions, the first, as one committed group.
__device__ __forceinline__ void issue_values(const Flash512Block& block, float (&o)[128],
                                             const std::uint32_t (&p)[4][4]) {
  using T = Flash512;
  wgmma_fence();
#pragma unroll
  for (int slice = 0; slice < T::kSlices; ++slice) {
    wgmma_m64n256k16(o, p[slice], wgmma_operand(block.smem + T::kV + slice * T::kSliceBytes, 2048, 1024));
  }
  wgmma_commit();
}

/// Waits for V of `tile`; clears its values beyond the last key in this warpgroup's half.
__device__ __forceinline__ void wait_values(const Flash512Block& block, int tile, int half) {
  using T = Flash512;
#pragma unroll
  for (int slice = 0; slice < T::kSlices; ++slice) mbarrier_wait(block.barrier(T::kVFull + slice), tile & 1);
  const int valid = block.extent.kv_end - tile * kWgmmaKeys;
  if (valid >= kWgmmaKeys) return;
  for (int slice = 0; slice < T::kSlices; ++slice) {
    clear_rows(block.smem + T::kV + slice * T::kSliceBytes + half * (T::kSliceBytes / 2), 16, 16, 0,
               valid - 16 * slice);
  }
  fence_async_shared();
  named_barrier_sync(T::kGroup + half, 128);
}

/// Leaves probabilities and factors of one tile where the second warpgroup reads them; the caller signals.
__device__ __forceinline__ void leave_probabilities(const Flash512Block& block, const std::uint32_t (&p)[4][4],
                                                    const float (&alpha)[2], int tile) {
  using T = Flash512;
  const int buffer = tile & 1, lane = threadIdx.x & 31, warp_row = (threadIdx.x & 127) / 32 * 16;
  mbarrier_wait(block.barrier(T::kPEmpty + buffer), (tile >> 1 & 1) ^ 1);
  const int row = warp_row + (lane & 15);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int chunk = 2 * step + (lane >> 4);
    const std::uint32_t address = block.smem + T::kP + buffer * T::kPBytes + row * 128 + ((chunk ^ (row & 7)) << 4);
    store_matrix_x4(address, p[step][0], p[step][1], p[step][2], p[step][3]);
  }
  if ((lane & 3) == 0) {
    const std::uint32_t target = block.smem + T::kAlpha + (buffer * T::kRows + warp_row + lane / 4) * 4;
    store_shared(target, alpha[0]), store_shared(target + 32, alpha[1]);
  }
  fence_async_shared();
}

/// The factors of the result, alike. `row`: the first of this thread's two.
__device__ __forceinline__ void leave_inverse(const Flash512Block& block, const float (&inverse)[2], int row) {
  if ((threadIdx.x & 3) == 0) {
    const std::uint32_t target = block.smem + Flash512::kInverse + row * 4;
    store_shared(target, inverse[0]), store_shared(target + 32, inverse[1]);
  }
  mbarrier_arrive(block.barrier(Flash512::kInverseFull));
}

/// Two floats of this thread's rows from an array of 64.
__device__ __forceinline__ void read_row_pair(float (&value)[2], std::uint32_t array) {
  const std::uint32_t source = array + ((threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4) * 4;
  value[0] = load_shared(source);
  value[1] = load_shared(source + 32);
}

/// Transforms the 64 bf16 rows in the queries' place, each of the eight consumer warps eight of them.
template <bool kForward, class TTransform>
__device__ __forceinline__ void transform_rows(const Flash512Block& block, const TTransform& transform) {
  using T = Flash512;
  constexpr int kValues = T::kHeadDim / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll 1
  for (int row = 8 * warp; row < 8 * warp + 8; ++row) {
    const std::uint32_t line = block.smem + T::kQ + lane / 4 * (T::kRows * 128) + row * 128;
    const std::uint32_t place[2] = {line + (((lane % 4 * 2) ^ (row & 7)) << 4),
                                    line + (((lane % 4 * 2 + 1) ^ (row & 7)) << 4)};
    float x[kValues];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      std::uint32_t pair[4];
      load_shared_x4(pair, place[piece]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[8 * piece + 2 * i] = __uint_as_float(pair[i] << 16);
        x[8 * piece + 2 * i + 1] = __uint_as_float(pair[i] & 0xFFFF0000u);
      }
    }
    if constexpr (kForward) {
      transform.template forward<T::kHeadDim>(x);
    } else {
      transform.template inverse<T::kHeadDim>(x);
    }
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      store_shared_x4(place[piece], pack_bf16(x[8 * piece], x[8 * piece + 1]),
                      pack_bf16(x[8 * piece + 2], x[8 * piece + 3]), pack_bf16(x[8 * piece + 4], x[8 * piece + 5]),
                      pack_bf16(x[8 * piece + 6], x[8 * piece + 7]));
    }
  }
  fence_async_shared();
  named_barrier_sync(T::kSums, 256);
}

/// Writes this warpgroup's half of the output through the (no longer needed) queries' place.
template <class TTransform>
__device__ __forceinline__ void store_half(const Flash512Block& block, const FlashMaps& maps, const float (&o)[128],
                                           const float (&inverse)[2], int half, int group,
                                           const TTransform& transform) {
  using T = Flash512;
  const std::uint32_t place = block.smem + T::kQ + half * (T::kRows * T::kHeadDim);
  store_rows(o, inverse, place, T::kRows, 0);
  if constexpr (!TTransform::kIsIdentity) {
    named_barrier_sync(T::kSums, 256);
    transform_rows<false>(block, transform);
  } else {
    fence_async_shared();
    named_barrier_sync(T::kGroup + half, 128);
  }
  if ((threadIdx.x & 127) == 0) {
    tensor_store(&maps.out, place, 0, block.head_kv * group, block.token0, 4 * half, block.batch);
    tensor_store_finish();
  }
}

/// First warpgroup: scores, softmax, output dimensions 0 to 255.
/// @tparam kQueriesAreThere no need to wait for them
template <bool kQueriesAreThere>
__device__ __forceinline__ void consume_scores(const Flash512Block& block, const FlashParams& params, float (&o)[128],
                                               float (&inverse)[2]) {
  using T = Flash512;
  KeyRange keys[2];
  const int row = (threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4;
  for (int i = 0; i < 2; ++i) {
    keys[i] = visible_keys(params, block.extent, min(params.n_query - 1, block.token0 + (row + 8 * i) / params.group));
  }
  const int unmasked = visible_keys(params, block.extent, min(params.n_query - 1, block.token0)).hi;
  float s[32], alpha[2];
  std::uint32_t p[4][4];
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = 0.0f;
  WgmmaSoftmax state;

  if constexpr (!kQueriesAreThere) mbarrier_wait(block.barrier(T::kQFull), 0);
  issue_scores(block, s, 0);
  wgmma_wait<0>();
  wgmma_pin(s);
  release_slices(block, T::kKEmpty, 0, T::kSlices);
  if (block.n_tile == 1 || kWgmmaKeys > unmasked) hide_tile(s, 0, keys);
  softmax_tile(state, s, alpha, params.scale_log2);
  for (int tile = 0; tile + 1 < block.n_tile; ++tile) {
    pack_probabilities(p, s);
    issue_scores(block, s, tile + 1);
    leave_probabilities(block, p, alpha, tile);
    rescale(o, alpha);
    wait_values(block, tile, 0);
    issue_values(block, o, p);
    // Slices of K go back one by one; the last wait ends the scores, the values stay in flight under the softmax.
    wgmma_wait<4>();
    release_slices(block, T::kKEmpty, 0, 1);
    wgmma_wait<3>();
    release_slices(block, T::kKEmpty, 1, 2);
    wgmma_wait<2>();
    release_slices(block, T::kKEmpty, 2, 3);
    wgmma_wait<1>();
    wgmma_pin(s);
    release_slices(block, T::kKEmpty, 3, 4);
    // Only now may the second warpgroup start on this tile, so that its products too run under the softmax.
    mbarrier_arrive(block.barrier(T::kPFull + (tile & 1)));
    if ((tile + 2) * kWgmmaKeys > unmasked) hide_tile(s, (tile + 1) * kWgmmaKeys, keys);
    softmax_tile(state, s, alpha, params.scale_log2);
    wgmma_wait<0>();
    wgmma_pin(o);
    release_slices(block, T::kVEmpty, 0, T::kSlices);
  }
  const int last = block.n_tile - 1;
  pack_probabilities(p, s);
  leave_probabilities(block, p, alpha, last);
  mbarrier_arrive(block.barrier(T::kPFull + (last & 1)));
  rescale(o, alpha);
  wait_values(block, last, 0);
  issue_values(block, o, p);
  inverse_sum(state, inverse);
  leave_inverse(block, inverse, row);
  wgmma_wait<0>();
  wgmma_pin(o);
}

/// Second warpgroup: output dimensions 256 to 511 from the first one's probabilities.
__device__ __forceinline__ void consume_values(const Flash512Block& block, float (&o)[128], float (&inverse)[2]) {
  using T = Flash512;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] = 0.0f;
  for (int tile = 0; tile < block.n_tile; ++tile) {
    const int buffer = tile & 1;
    float alpha[2];
    mbarrier_wait(block.barrier(T::kPFull + buffer), tile >> 1 & 1);
    read_row_pair(alpha, block.smem + T::kAlpha + buffer * T::kRows * 4);
    rescale(o, alpha);
    wait_values(block, tile, 1);
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < T::kSlices; ++slice) {
      wgmma_m64n256k16(o, wgmma_operand(block.smem + T::kP + buffer * T::kPBytes + slice * 32, 0, 1024),
                       wgmma_operand(block.smem + T::kV + slice * T::kSliceBytes + T::kSliceBytes / 2, 2048, 1024),
                       true);
      wgmma_commit();
    }
    wgmma_wait<2>();
    release_slices(block, T::kVEmpty, 0, 2);
    wgmma_wait<0>();
    wgmma_pin(o);
    release_slices(block, T::kVEmpty, 2, T::kSlices);
    mbarrier_arrive(block.barrier(T::kPEmpty + buffer));
  }
  mbarrier_wait(block.barrier(T::kInverseFull), 0);  // the queries' place is free, too
  read_row_pair(inverse, block.smem + T::kInverse);
}

/// A block whose rows see no key writes zeros.
__device__ __forceinline__ void store_nothing(const Flash512Block& block, const FlashParams& params,
                                              const FlashMaps& maps, int half) {
  const float o[128] = {}, inverse[2] = {};
  store_half(block, maps, o, inverse, half, params.group, NoTransform{});
}

/// With a transform the queries are transformed as they arrive and the results before they leave: 40 us less than two
/// passes over 2048 tokens of 32 heads. grid: x = row tile (longest first), y = batch * n_head_kv. Any power-of-two
/// group to 64.
template <class T, class TTransform>
__global__ void __launch_bounds__(T::kThreads, 1)
    flash_wgmma_512_kernel(const __grid_constant__ FlashParams params, const __grid_constant__ FlashMaps maps,
                           const __grid_constant__ TTransform transform) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  Flash512Block block;
  block.smem = (shared_address(smem_bytes) + 1023) & ~1023u;
  block.batch = blockIdx.y / params.n_head_kv;
  block.head_kv = blockIdx.y % params.n_head_kv;
  const int tokens = T::kRows / params.group;
  block.token0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * tokens;
  block.extent = key_extent(params);
  const int last_token = min(params.n_query, block.token0 + tokens) - 1;
  const int stop = params.causal_skip ? visible_keys(params, block.extent, last_token).hi : block.extent.kv_end;
  block.n_tile = (stop + kWgmmaKeys - 1) / kWgmmaKeys;

  if (threadIdx.x == 0) {
    mbarrier_init(block.barrier(T::kQFull), 1);
    for (int slice = 0; slice < T::kSlices; ++slice) {
      mbarrier_init(block.barrier(T::kKFull + slice), 1);
      mbarrier_init(block.barrier(T::kVFull + slice), 1);
      mbarrier_init(block.barrier(T::kKEmpty + slice), 1);
      mbarrier_init(block.barrier(T::kVEmpty + slice), 2);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {  // every thread of the other warpgroup arrives
      mbarrier_init(block.barrier(T::kPFull + buffer), 128);
      mbarrier_init(block.barrier(T::kPEmpty + buffer), 128);
    }
    mbarrier_init(block.barrier(T::kInverseFull), 128);
    mbarrier_init_fence();
    if (params.tile_count != nullptr) atomicAdd(params.tile_count, static_cast<unsigned long long>(block.n_tile));
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    release_registers<40>();
    if (threadIdx.x == 256 && block.n_tile > 0) produce_512(block, maps, params.group);
  } else {
    take_registers<232>();
    if (block.n_tile == 0) {
      store_nothing(block, params, maps, warpgroup);
    } else {
      if constexpr (!TTransform::kIsIdentity) {
        mbarrier_wait(block.barrier(T::kQFull), 0);
        transform_rows<true>(block, transform);
      }
      float o[128], inverse[2];
      if (warpgroup == 0) {
        consume_scores<!TTransform::kIsIdentity>(block, params, o, inverse);
      } else {
        consume_values(block, o, inverse);
      }
      store_half(block, maps, o, inverse, warpgroup, params.group, transform);
    }
  }
#else
  __trap();  // built for another architecture
#endif
}

}  // namespace gemma4::cuda::detail
