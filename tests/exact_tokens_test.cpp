// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "gemma4/ring_format.hpp"
#include "gemma4/rotation.hpp"
#include "reference/cache/simulated_layer_cache.hpp"
#include "reference/layer_cache.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// Which tokens of a simulated cache are exact: the newest of a tail, the first of a sink, and none of a ring. Held
/// against attention over keys and values that are written out for each query.
namespace {

using namespace gemma4;
using reference::Matrix;
using reference::Qkv;
using reference::SimulatedCodec;
using testkit::refuses;

constexpr std::int64_t kHeadDim = 64, kTokens = 48;

AttentionConfig one_head() {
  AttentionConfig attention;
  attention.head_dim = kHeadDim;
  attention.n_head_kv = 1;
  return attention;
}

Matrix<float> rounded(Matrix<float> m) {
  return m.unaryExpr([](float x) { return to_float(to_bf16(x)); });
}

Qkv<float> random_qkv(std::uint64_t seed, std::int64_t n = kTokens) {
  const auto matrix = [&](std::uint64_t s, std::int64_t cols) {
    const std::vector<double> values = haar_gaussians(s, n * cols);
    return rounded(Eigen::Map<const Matrix<double>>(values.data(), n, cols).cast<float>());
  };
  return {matrix(3 * seed, 2 * kHeadDim), matrix(3 * seed + 1, kHeadDim), matrix(3 * seed + 2, kHeadDim)};
}

Qkv<float> rows_of(const Qkv<float>& qkv, std::int64_t first, std::int64_t count) {
  return {qkv.q.middleRows(first, count), qkv.k.middleRows(first, count), qkv.v.middleRows(first, count)};
}

/// Equal but for the order of float sums, which depends on how many rows are computed together: 2^-23 of each of 48
/// terms at the most.
bool near(const Matrix<float>& a, const Matrix<float>& b) {
  return (a - b).norm() <= 48 * 0x1p-23f * b.norm();
}

/// Attention of the query at `position`, the last of those that `is_exact(key)` says to be bf16 and the rest quantised.
template <class TQuantiser, class TIsExact>
Matrix<float> attended(const SimulatedCodec<TQuantiser>& codec, const Qkv<float>& qkv, std::int64_t position,
                       TIsExact&& is_exact) {
  Qkv<float> seen = rows_of(qkv, 0, position + 1);
  Matrix<float> k = seen.k, v = seen.v;
  codec.roundtrip(CacheSide::kKey, k);
  codec.roundtrip(CacheSide::kValue, v);
  for (std::int64_t key = 0; key <= position; ++key) {
    if (!is_exact(key)) seen.k.row(key) = rounded(k.row(key)), seen.v.row(key) = rounded(v.row(key));
  }
  reference::FlatLayerCache<Bf16> flat(one_head(), kTokens);
  return flat.attend(seen, 0).row(position);
}

/// All tokens through a layer's cache of the format, in chunks of so many in turn.
template <class TQuantiser>
Matrix<float> through(const Simulated<TQuantiser>& format, const Qkv<float>& qkv,
                      const std::vector<std::int64_t>& chunks) {
  const auto codec = std::make_shared<const SimulatedCodec<TQuantiser>>(kHeadDim, format);
  reference::SimulatedLayerCache<TQuantiser> cache(one_head(), kTokens, codec);
  Matrix<float> out(qkv.q.rows(), qkv.q.cols());
  std::int64_t position = 0;
  for (std::size_t i = 0; position < qkv.q.rows(); ++i) {
    const std::int64_t count = std::min(chunks[i % chunks.size()], qkv.q.rows() - position);
    out.middleRows(position, count) = cache.attend(rows_of(qkv, position, count), position);
    position += count;
  }
  return out;
}

TEST(ExactTokens, NamesAreReadAndWritten) {
  const auto format = *Simulated<Int8Token>::parse("sim-int8-had-tail128-sink4");
  EXPECT_EQ(format.tail, 128);
  EXPECT_EQ(format.sink, 4);
  EXPECT_TRUE(format.hadamard);
  EXPECT_EQ(format.exact_tokens(), 132);
  for (const char* name : {"sim-int8", "sim-int8-tail1", "sim-q8_0-sink4", "sim-t4l8-had-tail4096",
                           "sim-k4v4-had-sink9", "sim-int8-had-tail128-sink4"}) {
    EXPECT_EQ(to_string(parse_cache_spec(name)), name);
    EXPECT_EQ(to_string(with_seed(parse_cache_spec(name), 7)), name) << "another seed is the same format";
  }
  for (const char* name : {"sim-int8-tail", "sim-int8-tail0", "sim-int8-tail01", "sim-int8-tail4097", "sim-int8-tail-1",
                           "sim-int8-sink4-tail128", "sim-int8-tail128-had", "sim-int8-sink4-sink4", "sim-tail128",
                           "sim-int8-tail12x", "sim-int8-tail99999999999999999999"}) {
    EXPECT_FALSE(Simulated<Int8Token>::parse(name)) << name;
    EXPECT_TRUE(refuses([&] { (void)parse_cache_spec(name); }, {name})) << name;
  }
  EXPECT_FALSE(parse_cache_spec("sim-int8-tail8") == parse_cache_spec("sim-int8-tail9"));
  EXPECT_FALSE(parse_cache_spec("sim-int8-tail8") == parse_cache_spec("sim-int8-sink8"));
}

TEST(ExactTokens, PiecesFillTheChunkAndAreNoLongerThanTheTail) {
  for (std::int64_t n = 1; n <= 300; ++n) {
    for (const std::int64_t tail : {1, 2, 7, 16, 128}) {
      const std::int64_t piece = tail_piece(n, tail);
      ASSERT_TRUE(piece >= 1 && piece <= 16 && piece <= tail && n % piece == 0) << n << ' ' << tail << ' ' << piece;
      for (std::int64_t longer = piece + 1; longer <= std::min<std::int64_t>(16, tail); ++longer) {
        ASSERT_NE(n % longer, 0) << n << ": a piece of " << longer << " would do";
      }
    }
  }
  EXPECT_EQ(tail_piece(2048, 128), 16);
}

/// Token by token the newest `tail` keys of each query and the first `sink` are exact, and no other; in chunks the
/// first query of a piece of s has s - 1 fewer. Held
/// to the flat cache of what each query should see.
RC_GTEST_PROP(ExactTokens, AreTheNewestAndTheFirst, ()) {
  const int tail = *rc::gen::inRange(0, 20), sink = *rc::gen::inRange(0, 6);
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const auto chunks =
      *rc::gen::nonEmpty(rc::gen::container<std::vector<std::int64_t>>(rc::gen::inRange<std::int64_t>(1, 40)));
  const Qkv<float> qkv = random_qkv(seed);
  Simulated<ScalarCodes> format{.quantiser = ScalarCodes::make(3, 2), .hadamard = true, .tail = tail, .sink = sink};
  const SimulatedCodec<ScalarCodes> codec(kHeadDim, format);
  const Matrix<float> out = through(format, qkv, chunks);
  std::int64_t position = 0;
  bool longer_shows = false, shorter_shows = tail == 0, sink_shows = false;
  for (std::size_t i = 0; position < kTokens; ++i) {
    const std::int64_t count = std::min(chunks[i % chunks.size()], kTokens - position);
    const std::int64_t piece = tail > 0 ? tail_piece(count, tail) : count;
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t oldest_exact = tail == 0 ? kTokens : position + t / piece * piece + piece - tail;
      const auto with = [&](std::int64_t oldest, std::int64_t first) {
        return attended(codec, qkv, position + t, [=](std::int64_t key) { return key >= oldest || key < first; });
      };
      const auto is_near = [&](std::int64_t oldest, std::int64_t first_coded) {
        return near(out.row(position + t), with(oldest, first_coded));
      };
      RC_ASSERT(is_near(oldest_exact, sink));
      longer_shows = longer_shows || !is_near(std::min(oldest_exact, position + t + 1) - 1, sink);
      shorter_shows = shorter_shows || !is_near(oldest_exact + 1, sink);
      sink_shows = sink_shows || !is_near(oldest_exact, sink + 1);
    }
    position += count;
  }
  RC_ASSERT(longer_shows && shorter_shows && sink_shows);  // the controls: one exact token more or fewer is seen
}

TEST(ExactTokens, ATailAsLongAsTheTextIsTheBf16Cache) {
  const Qkv<float> qkv = random_qkv(5);
  reference::FlatLayerCache<Bf16> flat(one_head(), kTokens);
  const Matrix<float> exact = flat.attend(qkv, 0);
  const auto is_exact = [&](const char* name) {
    return near(through(*Simulated<Q40Cache>::parse(name), qkv, {7, 1, 16}), exact);
  };
  EXPECT_TRUE(is_exact("sim-q4_0-tail64"));
  EXPECT_TRUE(is_exact("sim-q4_0-sink48"));
  EXPECT_FALSE(is_exact("sim-q4_0-sink47")) << "the control";
}

// ---- Rings

TEST(RingFormat, IsBf16OrSimulatedWithoutATail) {
  EXPECT_FALSE(parse_ring_spec("bf16").has_value());
  EXPECT_EQ(to_string(parse_ring_spec("bf16")), "bf16");
  for (const char* name : {"sim-int8", "sim-int8-had", "sim-k6v6-had", "sim-t4l8"}) {
    EXPECT_EQ(to_string(parse_ring_spec(name)), name);
    EXPECT_EQ(to_string(with_seed(parse_ring_spec(name), 3)), name);
  }
  EXPECT_NE(with_seed(parse_ring_spec("sim-int8-had"), 3), parse_ring_spec("sim-int8-had"));
  for (const char* name : {"", "tq4", "f32", "int8", "sim-int9"}) {
    EXPECT_TRUE(refuses([&] { (void)parse_ring_spec(name); }, {"ring", name, "bf16"})) << name;
  }
  EXPECT_TRUE(refuses([] { (void)parse_ring_spec("sim-int8-tail8"); }, {"sim-int8-tail8", "no tail"}));
  EXPECT_TRUE(refuses([] { (void)parse_ring_spec("sim-int8-sink4"); }, {"sim-int8-sink4", "no tail and no sink"}));
}

/// The sliding layers attend to what the ring's format reads back, the chunk's own K and V included; the full layers do
/// not feel it.
TEST(RingFormat, EveryKeyOfASlidingLayerIsReadBack) {
  ModelConfig config = gemma4_tiny();
  config.n_head = 4;
  config.window = 6;
  config.sliding.head_dim = 64;
  config.sliding.n_head_kv = 2;
  config.full = config.sliding;
  config.is_sliding = {1, 0};
  const auto heads = [&](std::uint64_t seed, std::int64_t n_head) {
    const std::vector<double> values = haar_gaussians(seed, 30 * n_head * 64);
    return Matrix<float>(Eigen::Map<const Matrix<double>>(values.data(), 30, n_head * 64).cast<float>());
  };
  const Qkv<float> qkv{heads(1, 4), heads(2, 2), heads(3, 2)};
  const auto run = [&](const Qkv<float>& from, const char* ring, std::size_t layer) {
    auto caches = reference::make_layer_caches<float>(config, parse_cache_spec("bf16"), 30, parse_ring_spec(ring));
    Matrix<float> out(30, from.q.cols());
    std::int64_t position = 0;
    for (const std::int64_t n : {9, 1, 1, 14, 5}) {
      const Qkv<float> chunk = rows_of(from, position, n);
      out.middleRows(position, n) =
          std::visit([&](auto& cache) { return cache.attend(chunk, position); }, caches[layer]);
      position += n;
    }
    return out;
  };
  for (const char* name : {"sim-int8", "sim-k6v4-had"}) {
    Qkv<float> read = qkv;
    std::visit(
        [&]<class TQuantiser>(const Simulated<TQuantiser>& format) {
          const SimulatedCodec<TQuantiser> codec(64, format);
          Eigen::Map<Matrix<float>> k(read.k.data(), 60, 64), v(read.v.data(), 60, 64);
          codec.roundtrip(CacheSide::kKey, k);
          codec.roundtrip(CacheSide::kValue, v);
        },
        *parse_ring_spec(name));
    EXPECT_TRUE(run(qkv, name, 0) == run(read, "bf16", 0)) << name;
    EXPECT_FALSE(run(qkv, name, 0) == run(qkv, "bf16", 0)) << name << ": the control";
    EXPECT_TRUE(run(qkv, name, 1) == run(qkv, "bf16", 1)) << name << ": a full layer";
  }
}

}  // namespace
