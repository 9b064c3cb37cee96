// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/pinned_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/weights/repack.cuh"
#include "gemma4/error.hpp"
#include "gemma4/quantized_matrix.hpp"
#include "gemma4/report/progress.hpp"

/// Matrices of a mapped file into device memory, repacked on the way.
///
/// Rows travel in batches through a few slots: threads copy from the mapping into pinned memory while the copy engine
/// brings the batches before to the device and kernels repack those. Page faults and the copy out of the page cache are
/// the slow part, some 3 GB/s a thread; the host link brings 50 GB/s.
namespace gemma4::cuda {

struct UploadOptions {
  int n_thread = 4;  ///< that copy from the mapping
  int n_slot = 8;
  std::int64_t slot_bytes = std::int64_t{16} << 20;  ///< pinned, and once more on the device
  ProgressOptions progress = {.mode = ProgressMode::kSilent};
  /// After each batch, with the bytes so far; what it throws ends the upload.
  std::function<void(std::int64_t)> on_progress = {};
};

/// Row i of `from` goes to packed row i * row_step of `to`.
struct UploadTask {
  std::string name;
  QuantizedMatrix from;
  std::byte* to = nullptr;
  std::int64_t row_step = 1;
  bool is_mapped = true;  ///< of a mapped file: its pages may leave this process once they are copied
};

namespace detail {

/// Where the f16 scales, minima and offsets of a block are; plain types: each value is its own scale.
struct ScalePlaces {
  int block_bytes;
  int n_scale;
  int at[2];
};

[[nodiscard]] inline ScalePlaces scale_places(TensorType type) {
  const int bytes = static_cast<int>(block_bytes(type));
  switch (type) {
    case TensorType::kQ4_1:
    case TensorType::kQ5_1:
    case TensorType::kQ4K:
    case TensorType::kQ5K:
      return {bytes, 2, {0, 2}};
    case TensorType::kQ2K:
      return {bytes, 2, {80, 82}};
    case TensorType::kQ3K:
      return {bytes, 1, {108, 0}};
    case TensorType::kQ6K:
      return {bytes, 1, {208, 0}};
    default:
      return {bytes, 1, {0, 0}};
  }
}

/// Notes the smallest task with a scale that is an infinity or a NaN.
/// @param exponent all ones where the 16 bits (of an f32: the upper 16) are not finite
static __global__ void __launch_bounds__(256)
    check_scales_kernel(const std::uint8_t* blocks, std::int64_t n_block, const __grid_constant__ ScalePlaces places,
                        unsigned exponent, int task, int* first_bad) {
  const std::int64_t index = blockIdx.x * std::int64_t{256} + threadIdx.x;
  if (index >= n_block) return;
  for (int i = 0; i < places.n_scale; ++i) {
    const std::uint8_t* const at = blocks + index * places.block_bytes + places.at[i];
    const unsigned bits = at[0] | (unsigned{at[1]} << 8);
    if ((bits & exponent) == exponent) atomicMin(first_bad, task);
  }
}

inline void check_scales(TensorType type, const std::byte* blocks, std::int64_t bytes, int task, int* first_bad,
                         cudaStream_t stream) {
  ScalePlaces places = scale_places(type);
  if (type == TensorType::kF32) places.at[0] = 2;
  const unsigned exponent = type == TensorType::kF32 || type == TensorType::kBf16 ? 0x7F80u : 0x7C00u;
  const std::int64_t n_block = bytes / places.block_bytes;
  Launch{.what = "check_scales_kernel",
         .grid = static_cast<unsigned>((n_block + 255) / 256),
         .block = 256,
         .stream = stream}(check_scales_kernel, reinterpret_cast<const std::uint8_t*>(blocks), n_block, places,
                           exponent, task, first_bad);
}

/// Tells the kernel about whole pages of a mapping. A hint: whether it is taken does not matter.
inline void advise_pages(std::span<const std::byte> bytes, int advice) {
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(bytes.data()) + page - 1) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(bytes.data() + bytes.size()) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

/// Rows of one task in a batch.
struct UploadPiece {
  std::size_t task = 0;
  std::int64_t first_row = 0, n_row = 0;
  std::int64_t offset = 0;  ///< in the slot
};

struct UploadBatch {
  std::vector<UploadPiece> pieces;
  std::int64_t bytes = 0;
};

/// Cuts the tasks into batches that fit a slot, in the order given.
[[nodiscard]] inline std::vector<UploadBatch> plan_upload(std::span<const UploadTask> tasks, std::int64_t slot_bytes) {
  constexpr std::int64_t kPieceAlignment = 16;
  std::vector<UploadBatch> batches(1);
  for (std::size_t task = 0; task < tasks.size(); ++task) {
    const QuantizedMatrix& from = tasks[task].from;
    const std::int64_t bytes = row_bytes(from.type, from.cols);
    require(bytes <= slot_bytes, "upload: a row of '", tasks[task].name, "' has ", bytes, " B, a slot ", slot_bytes);
    for (std::int64_t row = 0; row < from.rows;) {
      const std::int64_t fit = (slot_bytes - batches.back().bytes) / bytes;
      if (fit < 1) {
        batches.emplace_back();
        continue;
      }
      UploadBatch& batch = batches.back();
      const std::int64_t count = std::min(fit, from.rows - row);
      batch.pieces.push_back({task, row, count, batch.bytes});
      batch.bytes += (count * bytes + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
      batch.bytes = std::min(batch.bytes, slot_bytes);
      row += count;
    }
  }
  return batches;
}

/// The slots, the threads that fill them, and the stream that empties them.
class Uploader {
 public:
  Uploader(std::vector<UploadTask> tasks, const UploadOptions& options) : tasks_(std::move(tasks)), options_(options) {
    require(options.n_thread >= 1 && options.n_slot >= 1, "upload: ", options.n_thread, " threads and ", options.n_slot,
            " slots, need at least 1 of each");
    // In the order of the file, so that it is read from front to back.
    std::sort(tasks_.begin(), tasks_.end(),
              [](const UploadTask& a, const UploadTask& b) { return a.from.data.data() < b.from.data.data(); });
    batches_ = plan_upload(tasks_, options.slot_bytes);
    options_.n_slot =
        static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(options.n_slot), batches_.size()));
    options_.slot_bytes = 0;
    for (const UploadBatch& batch : batches_) options_.slot_bytes = std::max(options_.slot_bytes, batch.bytes);
    filled_.resize(batches_.size());
    pinned_ = PinnedBuffer<std::byte>(options_.n_slot * options_.slot_bytes);
    staging_ = DeviceBuffer<std::byte>(options_.n_slot * options_.slot_bytes);
    first_bad_ = DeviceBuffer<int>(std::vector<int>{std::numeric_limits<int>::max()});
    emptied_ = std::vector<Event>(static_cast<std::size_t>(options_.n_slot));
    check(cudaGetDevice(&device_), "question for the current device");
  }

  void run() {
    std::int64_t total = 0, done = 0;
    for (const UploadTask& task : tasks_) {
      total += static_cast<std::int64_t>(task.from.data.size());
      if (task.is_mapped) advise_pages(task.from.data, MADV_SEQUENTIAL);
    }
    Progress bar("load", total, options_.progress);
    const Crew crew(*this);
    for (std::size_t index = 0; index < batches_.size(); ++index) {
      wait_for_batch(index);
      enqueue(index);
      for (const UploadPiece& piece : batches_[index].pieces) done += piece_bytes(piece);
      bar.update(done);
      if (options_.on_progress) options_.on_progress(done);
    }
    const int first_bad = first_bad_.to_host(stream_).front();
    require_format(first_bad == std::numeric_limits<int>::max(), "tensor '",
                   first_bad < static_cast<int>(tasks_.size()) ? tasks_[static_cast<std::size_t>(first_bad)].name : "",
                   "' holds a scale or value that is not finite");
    bar.finish();
  }

 private:
  /// The threads; however run() is left, they are told to stop and waited for, and so is the stream.
  class Crew {
   public:
    explicit Crew(Uploader& uploader) : uploader_(uploader) {
      try {
        for (int i = 0; i < uploader.options_.n_thread; ++i) {
          threads_.emplace_back([&uploader] { uploader.fill_batches(); });
        }
      } catch (...) {
        dismiss();
        throw;
      }
    }
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;
    ~Crew() { dismiss(); }

   private:
    void dismiss() {
      {
        const std::lock_guard lock(uploader_.mutex_);
        uploader_.stop_ = true;
      }
      uploader_.changed_.notify_all();
      for (std::thread& thread : threads_) thread.join();
      cudaStreamSynchronize(uploader_.stream_);
    }

    Uploader& uploader_;
    std::vector<std::thread> threads_;
  };

  [[nodiscard]] std::int64_t piece_bytes(const UploadPiece& piece) const {
    const QuantizedMatrix& from = tasks_[piece.task].from;
    return piece.n_row * row_bytes(from.type, from.cols);
  }

  [[nodiscard]] std::size_t slot_of(std::size_t batch) const {
    return batch % static_cast<std::size_t>(options_.n_slot);
  }
  [[nodiscard]] std::int64_t slot_offset(std::size_t batch) const {
    return static_cast<std::int64_t>(slot_of(batch)) * options_.slot_bytes;
  }

  /// What each thread does: takes the next batch, waits until the one before in its slot has left it, and fills it.
  void fill_batches() {
    try {
      check(cudaSetDevice(device_), "choice of the device in a thread");
      for (std::int64_t index = take_batch(); index >= 0; index = take_batch()) {
        fill(static_cast<std::size_t>(index));
        const std::lock_guard lock(mutex_);
        filled_[static_cast<std::size_t>(index)] = true;
        changed_.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      stop_ = true;
      changed_.notify_all();
    }
  }

  /// @return -1 when there is none left, or when to stop
  [[nodiscard]] std::int64_t take_batch() {
    std::unique_lock lock(mutex_);
    if (next_ == batches_.size()) return -1;
    const std::size_t index = next_++;
    const auto n_slot = static_cast<std::size_t>(options_.n_slot);
    changed_.wait(lock, [&] { return stop_ || index < n_enqueued_ + n_slot; });
    if (stop_) return -1;
    lock.unlock();
    if (index >= n_slot) emptied_[slot_of(index)].synchronize();
    return static_cast<std::int64_t>(index);
  }

  void fill(std::size_t index) {
    for (const UploadPiece& piece : batches_[index].pieces) {
      const UploadTask& task = tasks_[piece.task];
      const QuantizedMatrix& from = task.from;
      const auto rows = from.data.subspan(static_cast<std::size_t>(piece.first_row * row_bytes(from.type, from.cols)),
                                          static_cast<std::size_t>(piece_bytes(piece)));
#if defined(MADV_POPULATE_READ)
      if (task.is_mapped) advise_pages(rows, MADV_POPULATE_READ);  // one call for what would be a fault every few pages
#endif
      std::memcpy(pinned_.data() + slot_offset(index) + piece.offset, rows.data(), rows.size());
      // Stays in the page cache, leaves this process. Memory that is no file's would lose its values.
      if (task.is_mapped) advise_pages(rows, MADV_DONTNEED);
    }
  }

  void wait_for_batch(std::size_t index) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stop_ || filled_[index]; });
    if (failure_) std::rethrow_exception(failure_);
  }

  void enqueue(std::size_t index) {
    const UploadBatch& batch = batches_[index];
    std::byte* const slot = staging_.data() + slot_offset(index);
    check(cudaMemcpyAsync(slot, pinned_.data() + slot_offset(index), static_cast<std::size_t>(batch.bytes),
                          cudaMemcpyHostToDevice, stream_),
          "copy of weights to the device");
    for (const UploadPiece& piece : batch.pieces) {
      const UploadTask& task = tasks_[piece.task];
      const QuantizedMatrix& from = task.from;
      std::byte* const to = task.to + piece.first_row * task.row_step * packed_row_bytes(from.type, from.cols);
      pack_rows(from.type, piece.n_row, from.cols, slot + piece.offset, to, task.row_step, stream_);
      check_scales(from.type, slot + piece.offset, piece_bytes(piece), static_cast<int>(piece.task), first_bad_.data(),
                   stream_);
    }
    emptied_[slot_of(index)].record(stream_);
    const std::lock_guard lock(mutex_);
    n_enqueued_ = index + 1;
    changed_.notify_all();
  }

  std::vector<UploadTask> tasks_;
  UploadOptions options_;
  std::vector<UploadBatch> batches_;
  PinnedBuffer<std::byte> pinned_;
  DeviceBuffer<std::byte> staging_;
  DeviceBuffer<int> first_bad_;
  std::vector<Event> emptied_;
  Stream stream_;
  int device_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> filled_;
  std::size_t next_ = 0, n_enqueued_ = 0;
  bool stop_ = false;
  std::exception_ptr failure_;
};

}  // namespace detail

/// Copies and repacks; returns when all of it is on the device.
/// @return seconds that it took
/// @throws FormatError naming a tensor that holds a scale or value which is not finite
/// @throws std::invalid_argument when a row does not fit a slot
inline double upload(std::vector<UploadTask> tasks, const UploadOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  detail::Uploader(std::move(tasks), options).run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace gemma4::cuda
