// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "experiments/support/attention_caches.cuh"
#include "experiments/support/attention_measure.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/error.hpp"

/// Drafted rows over the records of a full layer, at once or in a call each: what the verification of drafts asks of
/// it, as a TCaches of measure_attention().
namespace gemma4::experiment {

template <class TCaches>
class DraftedRows {
 public:
  struct Plan {
    typename TCaches::Plan one;
    typename TCaches::RowsPlan rows = {};
    std::int64_t workspace_bytes = 0;
  };

  DraftedRows(TCaches& caches, bool at_once) : caches_(caches), at_once_(at_once) {}

  [[nodiscard]] double token_bytes() const { return caches_.token_bytes(); }
  /// @throws std::invalid_argument where no configuration takes the rows at once
  [[nodiscard]] Plan plan(AttentionShape shape, const AttentionOptions& options, std::int64_t context) {
    std::vector<std::int32_t> lens;
    for (std::int64_t row = 0; row < shape.n_query; ++row) {
      lens.push_back(static_cast<std::int32_t>(context - shape.n_query + row + 1));
    }
    kv_lens_ = cuda::DeviceBuffer<std::int32_t>(lens);
    const std::int64_t n_row = shape.n_query;
    shape.n_query = 1;
    Plan plan{.one = caches_.plan(shape, options, context)};
    plan.workspace_bytes = plan.one.workspace_bytes;
    if (!at_once_) return plan;
    shape.n_query = n_row;
    plan.rows = caches_.plan_rows(shape, plan.one);
    require(plan.rows.misfit == nullptr, "--rows ", n_row, ": ", plan.rows.misfit);
    plan.workspace_bytes = plan.rows.workspace_bytes;
    return plan;
  }
  void attend(int i, const Plan& plan, TimedCall call) {
    call.kv_len = cuda::DeviceCount::on_device(kv_lens_.data());
    if (at_once_) return caches_.attend_rows(i, plan.rows, call);
    const std::int64_t n_row = call.q.extent[1];
    call.q.extent[1] = call.out.extent[1] = 1;
    for (std::int64_t row = 0; row < n_row; ++row) {
      caches_.attend(i, plan.one, call);
      call.q.data += call.q.stride[1];
      call.out.data += call.out.stride[1];
      ++call.kv_len.device;
    }
  }
  void reference(const View<const double, 4>& q, const AttentionOptions& options, std::int64_t n,
                 const View<double, 4>& out, cudaStream_t stream) {
    caches_.reference(q, options, n, out, stream);
  }

 private:
  TCaches& caches_;
  bool at_once_;
  cuda::DeviceBuffer<std::int32_t> kv_lens_{1};
};

}  // namespace gemma4::experiment
