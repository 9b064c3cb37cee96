// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/backend.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/session.cuh"
#include "gemma4/plan/execution.hpp"
#include "tests/support/small_model.hpp"

/// That each switch acts, in each phase that its table names, and in no other; and what a plan says. That the result
/// stays the same is backend_test's.
namespace {

using namespace gemma4;
using testkit::SmallModel;

/// What a run of a decode step and of a long chunk leaves to look at.
struct Evidence {
  std::vector<StepPlan> plans;       ///< decode, prefill
  std::size_t n_graph_node = 0;      ///< of a captured step
  std::uint64_t n_tile[2] = {0, 0};  ///< key tiles and records: decode, prefill
};

/// Both kinds of layer, gate and up of one type, and a chunk of whole key tiles beyond what its first queries see.
Evidence evidence_of(const cuda::PackedModel& packed, const ExecutionPolicy& policy) {
  cuda::Backend backend(packed,
                        {.cache = parse_cache_spec("tq4"), .context = 1024, .max_chunk = 512, .policy = policy});
  cuda::DeviceBuffer<unsigned long long> count{std::vector<unsigned long long>{0}};
  cuda::Session session(backend, {.use_graph = policy.graph});
  const auto counted = [&](auto&& work) {
    const unsigned long long before = count.to_host(backend.stream())[0];
    backend.set_work_count(count.data());
    work();
    backend.set_work_count(nullptr);
    backend.stream().synchronize();
    return count.to_host(backend.stream())[0] - before;
  };
  Evidence evidence{.plans = backend.step_plans()};
  const std::vector<std::int32_t> tokens(512, 5);
  evidence.n_tile[1] = counted([&] { (void)session.prefill(tokens, 512); });
  (void)session.decode(2, {});
  evidence.n_graph_node = session.n_graph_node();
  session.set_use_graph(false);
  evidence.n_tile[0] = counted([&] { (void)session.decode(1, {}); });
  return evidence;
}

[[nodiscard]] bool differs(const Evidence& a, const Evidence& b, const ExecutionSwitch& entry, Phase phase) {
  const std::size_t i = phase == Phase::kDecode ? 0 : 1;
  switch (entry.evidence) {
    case SwitchEvidence::kPlan:
      return a.plans[i] != b.plans[i];
    case SwitchEvidence::kTiles:
      return a.n_tile[i] != b.n_tile[i];
    case SwitchEvidence::kGraphNodes:
      return phase == Phase::kDecode ? a.n_graph_node != b.n_graph_node : a.plans[i] != b.plans[i];
    case SwitchEvidence::kReplays:
      return (a.n_graph_node == 0) != (b.n_graph_node == 0);
  }
  return false;
}

TEST(CudaBackendSwitches, EverySwitchActsWhereItsTableSaysAndNowhereElse) {
  // A window that a step of a sliding layer takes in one launch.
  ModelConfig config = gemma4_tiny();
  config.window = 256;
  const SmallModel small(config, 21);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const cuda::PackedModel apart = cuda::load_model(*small.file, {.join_gate_up = false});
  const Evidence on = evidence_of(packed, {});
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    ExecutionPolicy policy;
    policy.*entry.field = false;
    const Evidence off = evidence_of(policy.gate_up_fusion ? packed : apart, policy);
    for (const Phase phase : {Phase::kDecode, Phase::kPrefill}) {
      const std::string what = std::string(entry.name) + (phase == Phase::kDecode ? " in decode" : " in prefill");
      if (entry.acts_in(phase)) {
        EXPECT_TRUE(differs(on, off, entry, phase)) << what << " changes nothing";
      } else {
        EXPECT_EQ(on.plans[phase == Phase::kDecode ? 0 : 1], off.plans[phase == Phase::kDecode ? 0 : 1]) << what;
      }
    }
  }
  EXPECT_FALSE(differs(on, evidence_of(packed, {}), kExecutionSwitches.front(), Phase::kDecode)) << "the control";
  const Evidence again = evidence_of(packed, {});
  EXPECT_EQ(on.plans, again.plans);
  EXPECT_EQ(on.n_graph_node, again.n_graph_node);
  EXPECT_EQ(on.n_tile[0], again.n_tile[0]);
  EXPECT_EQ(on.n_tile[1], again.n_tile[1]);
}

cuda::BackendOptions small_options(const char* cache) {
  return {.cache = parse_cache_spec(cache), .context = 128, .max_chunk = 100};
}

TEST(CudaBackendSwitches, APlanNamesEveryComponentAndItsDigestFollowsIt) {
  const SmallModel small(gemma4_tiny(), 22);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend tq4(packed, small_options("tq4")), bf16(packed, small_options("bf16"));
  for (const StepPlan& plan : tq4.step_plans()) {
    for (const char* component : {"project_qkv", "qkv_prologue", "attention_sliding", "attention_full",
                                  "project_output", "gate_up", "down", "lm_head"}) {
      EXPECT_FALSE(plan.row(component).path.empty()) << plan.name << " " << component;
    }
  }
  EXPECT_EQ(digest(tq4.step_plans()), digest(cuda::Backend(packed, small_options("tq4")).step_plans()));
  EXPECT_NE(digest(tq4.step_plans()), digest(bf16.step_plans()));
}

}  // namespace
