// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/accuracy_case.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;
using testkit::refuses;

TEST(AccuracyCase, NamesAreReadAndWritten) {
  const AccuracyCase all = parse_accuracy_case("tq4@ring=sim-int8-had@chunk=512@off=split_k+causal_skip");
  EXPECT_EQ(all.cache, CacheSpec(Tq4Format{}));
  EXPECT_EQ(all.ring, parse_ring_spec("sim-int8-had"));
  EXPECT_EQ(all.chunk, 512);
  EXPECT_EQ(all.off, (std::vector<std::string>{"split_k", "causal_skip"}));
  for (const char* name : {"bf16", "tq4@ring=sim-int8", "bf16@chunk=1", "bf16@off=split_k",
                           "tq4@ring=sim-int8-had@chunk=512@off=split_k+causal_skip"}) {
    EXPECT_EQ(parse_accuracy_case(name).canonical_name(), name);
    EXPECT_EQ(parse_accuracy_case(name).name(), name);
  }
  EXPECT_EQ(parse_accuracy_case("tq4@ring=bf16"), parse_accuracy_case("tq4")) << "the ring that it has anyway";
  const AccuracyCase peer = parse_accuracy_case("tq4-peer");
  EXPECT_EQ(peer.name(), "tq4-peer") << "tables are asked for it under this name";
  EXPECT_EQ(peer.canonical_name(), "tq4-cut-raw-haar");
  EXPECT_EQ(peer, parse_accuracy_case("tq4-cut-raw-haar"));
}

TEST(AccuracyCase, WhatIsNotUnderstoodIsNamed) {
  for (const auto& [name, part] :
       std::vector<std::pair<std::string, std::string>>{{"bf17", "bf17"},
                                                        {"bf16@", "'@'"},
                                                        {"bf16@ring=", "@ring="},
                                                        {"bf16@ring=tq4", "tq4"},
                                                        {"bf16@chunk=x", "'x'"},
                                                        {"bf16@chunk=0", "'0'"},
                                                        {"bf16@chunk=5k", "'5k'"},
                                                        {"bf16@chunk=-4", "'-4'"},
                                                        {"bf16@off=speed", "speed"},
                                                        {"bf16@off=", "@off="},
                                                        {"bf16@off=split_k+", "none of that name"},
                                                        {"bf16@chunk=4@ring=sim-int8", "@ring=sim-int8"},
                                                        {"bf16@chunk=4@chunk=5", "@chunk=5"}}) {
    EXPECT_TRUE(refuses([&] { (void)parse_accuracy_case(name); }, {part})) << name;
  }
}

RC_GTEST_PROP(AccuracyCase, AnyTextIsReadOrRefused, (const std::string& tail)) {
  for (const std::string& name :
       {tail, "bf16@" + tail, "bf16@ring=" + tail, "bf16@chunk=1" + tail, "bf16@off=" + tail}) {
    try {
      const AccuracyCase read = parse_accuracy_case(name);
      RC_ASSERT(parse_accuracy_case(read.canonical_name()) == read);
    } catch (const std::invalid_argument&) {
    }
  }
}

// ---- Bytes

TEST(CacheBytes, StoredOnesAreThoseOfTheMemoryPlan) {
  const ModelConfig config = gemma4_nano();
  for (const char* name : {"bf16", "f32", "tq4", "sim-int8-had-tail128", "sim-k3v5"}) {
    MemoryPlanOptions options{.target = PlanTarget::kReference, .context = 4096, .cache = parse_cache_spec(name)};
    const MemoryPlan plan = plan_memory(config, model_tensors(config), options);
    const CacheBytes stored = stored_bytes(config, options.cache, 4096, ring_slots(config.window));
    EXPECT_EQ(stored.full, plan.bytes("cache_full")) << name;
    EXPECT_EQ(stored.sliding, plan.bytes("cache_sliding")) << name;
  }
}

TEST(CacheBytes, IdeasCountNormsScalesTailsAndSinks) {
  const ModelConfig config = gemma4_nano();  // 2 full layers of one head of 256, 10 sliding of 4 of 64, window 512
  const auto bytes = [&](const char* cache, const char* ring = "bf16") {
    return idea_bytes(config, parse_cache_spec(cache), parse_ring_spec(ring), 1000);
  };
  EXPECT_EQ(bytes("bf16").full, 2 * 1000 * 2 * 512);
  EXPECT_EQ(bytes("bf16").sliding, 10 * 4 * 512 * 2 * 128);
  EXPECT_EQ(bytes("f32").sliding, 10 * 4 * 512 * 2 * 256);
  EXPECT_EQ(bytes("tq4").full, 2 * 1000 * 2 * (128 + 2)) << "a norm a vector";
  EXPECT_EQ(bytes("sim-int8").full, 2 * 1000 * 2 * (256 + 2)) << "a scale a vector";
  EXPECT_EQ(bytes("sim-k2v8-had").full, 2 * 1000 * ((64 + 2) + (256 + 2)));
  EXPECT_EQ(bytes("sim-int8-tail128-sink4").full, 2 * (868 * 2 * (256 + 2) + 132 * 2 * 512));
  EXPECT_EQ(bytes("sim-int8-tail4000").full, bytes("bf16").full) << "no more exact tokens than there are";
  EXPECT_EQ(bytes("bf16", "sim-int8").sliding, 10 * 4 * 512 * 2 * (64 + 2));
  EXPECT_EQ(bytes("bf16", "sim-int8").full, bytes("bf16").full);
}

// ---- The shelf

TEST(Shelf, EveryCaseIsUnderstoodOnceAndOnlyFormatsOfOneVectorMayBeMissing) {
  for (const bool on_device : {true, false}) {
    const ShelfCases shelf = shelf_cases(on_device);
    std::set<std::string> names;
    for (const std::string& name : shelf.cases) {
      EXPECT_NO_THROW((void)parse_accuracy_case(name)) << name;
      EXPECT_TRUE(names.insert(parse_accuracy_case(name).canonical_name()).second) << name << " is there twice";
    }
    for (const std::string& name : shelf.unknown) EXPECT_TRUE(name.starts_with("kv")) << name;
    EXPECT_EQ(std::ranges::count(shelf.cases, "f32"), on_device ? 0 : 1);
    // What the noise is measured by, and what everything is measured against.
    for (const char* name : {"bf16", "bf16@chunk=512@off=split_k", "tq4", "tq4-peer", "sim-int8-tail128",
                             "sim-q4_0-had-sink4", "sim-t4l10-had", "bf16@ring=sim-k6v6-had"}) {
      EXPECT_EQ(std::ranges::count(shelf.cases, name), 1) << name;
    }
  }
}

TEST(Shelf, TheNoiseIsTheBaseRunAnotherWay) {
  const AccuracyCase base;
  std::vector<CaseCost> costs;
  const auto add = [&](const char* name, std::int64_t full, double kl) {
    costs.push_back({.of = parse_accuracy_case(name), .idea = {.full = full, .sliding = 10}, .context = 10, .kl = kl});
  };
  add("bf16", 100, 0.0);
  add("bf16@chunk=7", 100, 0.02);
  add("bf16@off=split_k", 100, 0.03);
  add("bf16@ring=sim-int8", 100, 0.5);  // another cache, not the same one run another way
  add("tq4", 25, 0.1);
  add("tq4-peer", 25, 0.12);
  add("tq4-raw", 25, 0.2);
  judge_costs(costs, base);
  for (const CaseCost& cost : costs) EXPECT_EQ(cost.noise, 0.03) << cost.of.name();
  EXPECT_EQ(costs[0].dominated_by, "");
  EXPECT_EQ(costs[2].dominated_by, "") << "the noise does not beat itself";
  EXPECT_EQ(costs[3].dominated_by, "bf16") << "here its ring takes as much";
  EXPECT_EQ(costs[5].dominated_by, "") << "0.02 apart, within the noise";
  EXPECT_EQ(costs[6].dominated_by, "tq4");
  EXPECT_EQ(costs[4].full_bytes_per_token(), 2.5);
}

}  // namespace
