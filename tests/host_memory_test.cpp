// SPDX-License-Identifier: Apache-2.0
#include "gemma4/host_memory.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "reference/layer_cache.hpp"

/// Memory that is not there is refused with what was asked for and what there is, before the system would end the
/// process for it.
namespace {

using namespace gemma4;

template <class TCall>
std::string refusal_of(TCall&& call) {
  try {
    call();
  } catch (const HostMemoryError& error) {
    return error.what();
  }
  return "";
}

TEST(HostMemory, ThereIsSome) {
  EXPECT_GT(host_bytes_available(), std::int64_t{1} << 20);
  EXPECT_LT(host_bytes_available(), std::int64_t{1} << 50) << "something says how much";
}

TEST(HostMemory, WhatFitsIsMade) {
  bool made = false;
  allocate_for("a test", 1, [&] { made = true; });
  EXPECT_TRUE(made);
}

TEST(HostMemory, MoreThanThereIsIsNotTried) {
  bool made = false;
  const std::string said = refusal_of([&] { allocate_for("a test", std::int64_t{1} << 60, [&] { made = true; }); });
  EXPECT_FALSE(made);
  EXPECT_NE(said.find("a test: 1152921504606846976 B of memory asked for, available are "), std::string::npos) << said;
}

TEST(HostMemory, ARefusalOnTheWaySaysTheSame) {
  EXPECT_NE(refusal_of([] { allocate_for("x", 7, [] { throw std::bad_alloc(); }); }).find("x: 7 B"), std::string::npos);
  EXPECT_NE(refusal_of([] { allocate_for("x", 7, [] { throw std::length_error(""); }); }).find("x: 7 B"),
            std::string::npos);
  EXPECT_THROW(allocate_for("x", 7, [] { throw std::runtime_error("another"); }), std::runtime_error);
}

TEST(HostMemory, CachesOfTheReferenceSayWhatTheyNeed) {
  ModelConfig config = gemma4_31b();
  const auto make = [&](const char* cache, std::int64_t context) {
    return refusal_of([&] { (void)reference::make_layer_caches<float>(config, parse_cache_spec(cache), context); });
  };
  // 10 full layers x 4 heads x 2 sides x 512 values of 2 or 4 bytes a token.
  EXPECT_NE(make("bf16", std::int64_t{1} << 40).find("as bf16 for a context of 1099511627776: 90071992547409920 B"),
            std::string::npos)
      << make("bf16", std::int64_t{1} << 40);
  EXPECT_NE(make("f32", std::int64_t{1} << 40).find("180143985094819840 B"), std::string::npos);
  EXPECT_NE(make("tq4", std::numeric_limits<std::int64_t>::max()).find("9223372036854775807 B"), std::string::npos);
  EXPECT_EQ(make("bf16", 16), "");
}

}  // namespace
