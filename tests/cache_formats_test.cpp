// SPDX-License-Identifier: Apache-2.0
#include "gemma4/cache_formats.hpp"

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/property.hpp"

namespace {

using namespace gemma4;

Tq4Options tq4_options(const std::string& name) {
  return std::get<Tq4Format>(parse_cache_spec(name)).options;
}

TEST(CacheFormats, NamesMeanWhatTheGrammarSays) {
  EXPECT_EQ(parse_cache_spec("f32"), CacheSpec(F32Format{}));
  EXPECT_EQ(parse_cache_spec("bf16"), CacheSpec(Bf16Format{}));
  EXPECT_EQ(parse_cache_spec("tq4"), CacheSpec(Tq4Format{}));
  EXPECT_EQ(tq4_options("tq4-k4v3"), (Tq4Options{.v_bits = 3}));
  EXPECT_EQ(tq4_options("tq4-k2v4-cut"), (Tq4Options{.codebook = CodebookKind::kCutAtThreeSigma, .k_bits = 2}));
  EXPECT_EQ(tq4_options("tq4-raw"), (Tq4Options{.norm = NormKind::kRaw}));
  EXPECT_EQ(tq4_options("tq4-haar"), (Tq4Options{.rotation = RotationKind::kDenseHaar}));
  const Tq4Options peer = {RotationKind::kDenseHaar, CodebookKind::kCutAtThreeSigma, NormKind::kRaw};
  EXPECT_EQ(tq4_options("tq4-peer"), peer);
  EXPECT_EQ(tq4_options("tq4-cut-raw-haar"), peer);
}

TEST(CacheFormats, EveryFormatHasItsOwnNameThatReadsBack) {
  std::set<std::string> names = {to_string(F32Format{}), to_string(Bf16Format{})};
  std::size_t count = names.size();
  for (const auto rotation : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    for (const auto codebook : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
      for (const auto norm : {NormKind::kCorrected, NormKind::kRaw}) {
        for (int bits = 0; bits < 9; ++bits) {
          const CacheSpec spec = Tq4Format{{rotation, codebook, norm, 2 + bits / 3, 2 + bits % 3}};
          EXPECT_EQ(parse_cache_spec(to_string(spec)), spec) << to_string(spec);
          names.insert(to_string(spec));
          ++count;
        }
      }
    }
  }
  EXPECT_EQ(names.size(), count);
}

TEST(CacheFormats, SimulatedOnesTakeTheBytesOfBf16AndClaimTheirOwn) {
  const auto bytes = [](const std::string& name, CacheSide side, bool allocated) {
    return std::visit(
        [&](const auto& format) {
          return allocated ? format.allocated_row_bytes(side, 512) : format.row_bytes(side, 512);
        },
        parse_cache_spec(name));
  };
  for (const std::string name : {"sim-int8", "sim-q8_0-had", "sim-q4_0", "sim-k2v8", "sim-k4v4-had"}) {
    EXPECT_EQ(to_string(parse_cache_spec(name)), name);
    for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
      EXPECT_EQ(bytes(name, side, true), 2 * 512) << name;
      EXPECT_LT(bytes(name, side, false), 2 * 512) << name;
    }
  }
  EXPECT_EQ(bytes("sim-k2v8", CacheSide::kKey, false), 512 * 2 / 8 + 2);
  EXPECT_EQ(bytes("sim-k2v8", CacheSide::kValue, false), 512 + 2);
  EXPECT_EQ(bytes("sim-q4_0", CacheSide::kKey, false), 512 / 32 * 18);
  EXPECT_NE(with_seed(parse_cache_spec("sim-int8-had"), 3), parse_cache_spec("sim-int8-had"));
}

TEST(CacheFormats, AWrongNameIsRefusedWithItselfAndTheGrammar) {
  const std::vector<std::string> wrong = {
      "",         "fp16",     "BF16",      "bf16 ",    "tq",          "tq4x",        "tq4-",         "tq4-k4",
      "tq4-k5v4", "tq4-k4v1", "tq4-k44v4", "tq4-v4k4", "tq4-raw-cut", "tq4-cut-cut", "tq4-peer-raw", "tq4-k4v3-peer",
      "bf16-raw", "tq4-k4v"};
  for (const std::string& name : wrong) {
    try {
      (void)parse_cache_spec(name);
      ADD_FAILURE() << "'" << name << "' was accepted";
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("'" + name + "'"), std::string::npos) << message;
      EXPECT_NE(message.find(name.starts_with("tq4") && name != "tq4x" ? std::string(Tq4Format::kGrammar)
                                                                       : CacheFormats::grammar()),
                std::string::npos)
          << message;
    }
  }
}

RC_GTEST_PROP(CacheFormats, AnyTextIsReadOrRefused, (const std::string& tail)) {
  for (const std::string& name : {tail, "tq4" + tail, "tq4-k" + tail, "kv" + tail, "kv5r4" + tail}) {
    try {
      const CacheSpec spec = parse_cache_spec(name);
      RC_ASSERT(parse_cache_spec(to_string(spec)) == spec);
    } catch (const std::invalid_argument&) {
    }
  }
}

TEST(CacheFormats, RowBytes) {
  EXPECT_EQ(F32Format::allocated_row_bytes(CacheSide::kKey, 512), 2048);
  EXPECT_EQ(Bf16Format::allocated_row_bytes(CacheSide::kKey, 512), 1024);
  EXPECT_EQ(Tq4Format::allocated_row_bytes(CacheSide::kKey, 512), 258);
}

}  // namespace
