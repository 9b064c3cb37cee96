// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/shared_memory.cuh"

/// A small team of warps and its own stream of equally long records from global into shared memory.
///
/// From sm_90 on one thread asks the copy engine for a whole record, which completes on an mbarrier; before that the
/// team shares the record in 16-byte asynchronous copies.
namespace gemma4::cuda::detail {

/// The length of a record: known when the kernel is compiled, or told to start().
template <int kBytes>
struct FixedRecordBytes {
  [[nodiscard]] static __device__ constexpr int get() { return kBytes; }
};
struct ToldRecordBytes {
  int bytes = 0;
  [[nodiscard]] __device__ constexpr int get() const { return bytes; }
};

/// Records of a contiguous sequence, kStages of them in flight or in use; threads of a team are neighbours in the
/// block. All threads of the team call every function together, except that start() must be followed by a barrier of
/// the team before the first wait(). With ToldRecordBytes kRecordBytes is the
/// largest that may come. With kBatch above one a stage holds so many neighbouring records, the last one what is left.
template <int kRecordBytes, int kStages, int kTeamThreads, class TBytes = FixedRecordBytes<kRecordBytes>,
          int kBatch = 1>
class RecordRing {
  static_assert(kRecordBytes % 16 == 0, "copies move 16 bytes");
  static_assert(kStages >= 2, "one record is in use while the next one comes");

 public:
  /// Begins to fetch records [begin, end): the first of them.
  /// @param smem     kStages * kRecordBytes, 16-byte aligned, of this team alone
  /// @param barriers kStages * 8 bytes, of this team alone
  __device__ __forceinline__ void start(unsigned char* smem, unsigned char* barriers, const unsigned char* records,
                                        int begin, int end, int team_barrier, TBytes bytes = {}) {
    bytes_ = bytes;
    smem_ = smem;
    barrier_ = shared_address(barriers);
    records_ = records;
    team_barrier_ = team_barrier;
    stage_ = 0;
    phase_ = 0;
#if __CUDA_ARCH__ >= 900
    if (thread() == 0) {
      // Rolled, so that the other warps branch around it. Unrolled, they pass by with the predicate off, and racecheck
      // (compute-sanitizer 2025.3) counts that as their write, a race with the copy that follows.
#pragma unroll 1
      for (int stage = 0; stage < kStages; ++stage) mbarrier_init(barrier_ + 8 * stage, 1);
      mbarrier_init_fence();
    }
#endif
    fetch(0, begin, end);
  }

  /// Fetches as many more as there is room for; once, before the first wait().
  __device__ __forceinline__ void start_rest(int begin, int end) {
#pragma unroll
    for (int stage = 1; stage < kStages; ++stage) fetch(stage, begin + stage * kBatch, end);
  }

  /// The next record, or batch, once it has arrived. Every other call of wait() is preceded by a release(), except the
  /// first two; of batches every one by a release_last(), except the first.
  [[nodiscard]] __device__ __forceinline__ const unsigned char* wait() {
#if __CUDA_ARCH__ >= 900
    mbarrier_wait(barrier_ + 8 * stage_, phase_);
#else
    copy_async_wait<kBatch == 1 ? kStages - 2 : kStages - 1>();
    named_barrier_sync<kTeamThreads>(team_barrier_);
#endif
    const unsigned char* const record = smem_ + stage_ * kBatch * kRecordBytes;
    if (++stage_ == kStages) {
      stage_ = 0;
      phase_ ^= 1u;
    }
    return record;
  }

  /// How many barriers of the team a wait() holds.
  [[nodiscard]] static __device__ __forceinline__ int barriers_of_wait() {
#if __CUDA_ARCH__ >= 900
    return 0;
#else
    return 1;
#endif
  }

  /// Gives the place of the last record but one that was waited for, which is `index`, to record index + kStages. The
  /// whole team is done with it: a barrier of the team has followed its last use.
  __device__ __forceinline__ void release(int index, int end) {
    constexpr int kBack = kStages - 2;
    const int stage = stage_ + kBack < kStages ? stage_ + kBack : stage_ + kBack - kStages;
    fetch(stage, index + kStages, end);
  }

  /// Gives the place of the last batch that was waited for, which begins at record `index`, to the one kStages further
  /// on, on the same terms.
  __device__ __forceinline__ void release_last(int index, int end) {
    static_assert(kBatch > 1);
    fetch(stage_ == 0 ? kStages - 1 : stage_ - 1, index + kStages * kBatch, end);
  }

 private:
  [[nodiscard]] static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x) & (kTeamThreads - 1);
  }

  __device__ __forceinline__ void fetch(int stage, int index, int end) {
    if (index < end) {
      const unsigned char* const source = records_ + static_cast<std::int64_t>(index) * bytes_.get();
      const std::uint32_t target = shared_address(smem_ + stage * kBatch * kRecordBytes);
      const int n_byte = kBatch == 1 ? bytes_.get() : min(kBatch, end - index) * bytes_.get();
#if __CUDA_ARCH__ >= 900
      if (thread() == 0) {
        const std::uint32_t barrier = barrier_ + 8 * stage;
        mbarrier_expect(barrier, n_byte);
        bulk_load(target, source, n_byte, barrier);
      }
#else
      for (int piece = thread(); piece < n_byte / 16; piece += kTeamThreads) {
        copy_async_16(target + 16 * piece, source + 16 * piece, true);
      }
#endif
    }
#if __CUDA_ARCH__ < 900
    copy_async_commit();  // an empty group too, so that the count of groups is the count of fetches
#endif
  }

  unsigned char* smem_;
  const unsigned char* records_;
  std::uint32_t barrier_;
  std::uint32_t phase_;
  int stage_, team_barrier_;
  [[no_unique_address]] TBytes bytes_;
};

}  // namespace gemma4::cuda::detail
