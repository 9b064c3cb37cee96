// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/weights/repack.cuh"
#include "tests/support/random_weights.hpp"

namespace gemma4::testkit {

/// Matrices of a test, packed on the device; two of one type and shape lie row by row in turn.
class DeviceWeights {
 public:
  explicit DeviceWeights(const OwnedMatrix& matrix) : DeviceWeights({&matrix}) {}
  DeviceWeights(const OwnedMatrix& gate, const OwnedMatrix& up) : DeviceWeights({&gate, &up}) {}

  [[nodiscard]] const cuda::PackedMatrix& view() const { return view_; }

 private:
  explicit DeviceWeights(const std::vector<const OwnedMatrix*>& parts) {
    const OwnedMatrix& first = *parts[0];
    const auto n_part = static_cast<std::int64_t>(parts.size());
    const std::int64_t row = cuda::packed_row_bytes(first.type, first.cols);
    buffer_ = cuda::DeviceBuffer<std::byte>(n_part * first.rows * row);
    view_ = {first.type, n_part * first.rows, first.cols, buffer_.data()};
    cuda::DeviceBuffer<std::byte> staging(row_bytes(first.type, first.cols) * std::min<std::int64_t>(first.rows, 64));
    for (std::int64_t part = 0; part < n_part; ++part) {
      cuda::upload_packed(parts[static_cast<std::size_t>(part)]->view(), buffer_.data() + part * row, n_part, staging,
                          nullptr);
    }
    cuda::check(cudaDeviceSynchronize(), "upload of test weights");
  }

  cuda::DeviceBuffer<std::byte> buffer_;
  cuda::PackedMatrix view_;
};

}  // namespace gemma4::testkit
