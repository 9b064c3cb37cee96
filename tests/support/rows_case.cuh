// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "gemma4/attention.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/view.hpp"
#include "tests/support/refuses.hpp"

/// Rows of one sequence that go through attention at once, against a call each: what the tests of every cache share.
namespace gemma4::testkit {

struct RowsCase {
  std::int64_t n_row = 1, n_head = 8, n_head_kv = 1, head_dim = 512, kv_len = 1;  ///< kv_len of the first row
  KvOptions format = {};  ///< of one vector for K and V; others have none
  float scale = 1.0f;     ///< of the scores: how often references rise
  std::uint64_t seed = 1;

  [[nodiscard]] std::int64_t buffer_len() const { return kv_len + n_row + 5; }
  [[nodiscard]] AttentionShape shape(std::int64_t n_query) const {
    return {.batch = 1,
            .n_query = n_query,
            .n_head = n_head,
            .n_head_kv = n_head_kv,
            .head_dim = head_dim,
            .buffer_len = buffer_len()};
  }
  /// kv_len of each row.
  [[nodiscard]] std::vector<std::int32_t> lengths() const {
    std::vector<std::int32_t> lengths;
    for (std::int64_t row = 0; row < n_row; ++row) lengths.push_back(static_cast<std::int32_t>(kv_len + row));
    return lengths;
  }
  /// The values of a row among those of all.
  [[nodiscard]] std::vector<Bf16> row_of(const std::vector<Bf16>& out, std::int64_t row) const {
    return {out.begin() + row * n_head * head_dim, out.begin() + (row + 1) * n_head * head_dim};
  }
  /// Calls call(q, out, workspace) with n_query rows of q from `row` on, [1, n_query, n_head, head_dim]. @return out
  template <class TCall>
  [[nodiscard]] std::vector<Bf16> run(const std::vector<Bf16>& q, std::int64_t row, std::int64_t n_query,
                                      std::int64_t workspace_bytes, TCall&& call) const {
    const cuda::DeviceBuffer<Bf16> queries(q);
    cuda::DeviceBuffer<Bf16> out(n_query * n_head * head_dim);
    cuda::DeviceBuffer<std::byte> workspace(workspace_bytes);
    out.fill_bytes(0xFF), workspace.fill_bytes(0xFF);  // NaN: every element must be written
    call(make_view(queries.data() + row * n_head * head_dim, std::int64_t{1}, n_query, n_head, head_dim),
         make_view(out.data(), std::int64_t{1}, n_query, n_head, head_dim),
         std::span<std::byte>(workspace.data(), static_cast<std::size_t>(workspace.bytes())));
    return out.to_host();
  }
};

/// More rows than a call takes, and several sequences.
/// @param plan makes a plan for a shape
template <class TPlanner>
void expect_rows_shapes_refused(const AttentionShape& good, TPlanner&& plan) {
  AttentionShape many = good, sequences = good;
  many.n_query = 9, sequences.batch = 2;
  EXPECT_TRUE(refuses([&] { (void)plan(many); }, {"9 rows", "1 to 8"}));
  EXPECT_TRUE(refuses([&] { (void)plan(sequences); }, {"batch 2", "need 1"}));
}

/// Plans that are not the call's.
/// @param run the call, by a plan @param planner the name of what makes plans
template <class TPlan, class TRun>
void expect_other_plans_refused(const TPlan& good, const std::string& planner, TRun&& run) {
  EXPECT_NO_THROW(run(good));
  TPlan misfit = good, other = good;
  misfit.misfit = "it is Sunday";
  --other.shape.n_query;
  EXPECT_TRUE(refuses([&] { run(misfit); }, {"takes no rows at once", "Sunday"}));
  EXPECT_TRUE(refuses([&] { run(other); }, {"another shape", planner}));
}

}  // namespace gemma4::testkit
