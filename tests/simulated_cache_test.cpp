// SPDX-License-Identifier: Apache-2.0
#include "reference/simulated_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gemma4/quantisers.hpp"
#include "gemma4/rotation.hpp"
#include "reference/cache/simulated_layer_cache.hpp"
#include "reference/layer_cache.hpp"
#include "reference/tq4_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;
using reference::FlatCache;
using reference::Matrix;
using reference::simulated_cache_update;
using reference::SimulatedCodec;
using testkit::close;
using testkit::rc_require;
using testkit::refuses;

template <class Scalar = float>
Matrix<Scalar> normal_rows(std::uint64_t seed, Eigen::Index rows, Eigen::Index cols) {
  const std::vector<double> values = haar_gaussians(seed, rows * cols);
  return Eigen::Map<const Matrix<double>>(values.data(), rows, cols).cast<float>().cast<Scalar>();
}

template <class TQuantiser>
Matrix<float> read_back(const Simulated<TQuantiser>& format, CacheSide side, Matrix<float> rows) {
  SimulatedCodec<TQuantiser>(rows.cols(), format).roundtrip(side, rows);
  return rows;
}

/// fn(format) for each shipped kind, K and V apart, with the rotation and without.
template <class TFunction>
void for_each_format(const TFunction& fn) {
  for (const char* name : {"sim-k4v3", "sim-k2v8-had", "sim-int8", "sim-int8-had", "sim-q8_0", "sim-q8_0-had",
                           "sim-q4_0", "sim-q4_0-had", "sim-t4l8", "sim-t3l9-had"}) {
    std::visit(fn, *ShippedSimulatedFormats::parse(name));
  }
}

// ---- Agreement with TQ4

/// What the compressed cache of the same widths and seed reads back.
Matrix<float> tq4_reads(const reference::Tq4Codec<float>& codec, CacheSide side, const Matrix<float>& x) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(x.size() / 2));
  std::vector<Tq4Norm> norms(static_cast<std::size_t>(x.rows()));
  const auto code_view = make_view(codes.data(), x.rows(), x.cols() / 2);
  codec.compress(side, x, code_view, make_view(norms.data(), x.rows()));
  Matrix<float> out(x.rows(), x.cols());
  codec.decompress(side, code_view, make_view(norms.data(), x.rows()), out);
  return out;
}

/// How many decisions about x [head_dim] rounding may turn: values within `margin` of a boundary of their code, and a
/// norm within `margin` of the middle of two bf16. In double, from the definition.
struct Doubt {
  int n_code = 0;
  bool norm = false;
};
Doubt doubt_of(const Codebook& book, Matrix<double> x, const reference::Rotation<double>& rotation, double margin) {
  const double length = x.norm();
  x /= length;
  rotation.forward(x);
  Doubt doubt;
  double squares = 0.0;
  for (const double y : x.reshaped()) {
    const int code = codebook_index(book, y);
    const bool near = std::any_of(book.boundaries.begin(), book.boundaries.begin() + book.n_level - 1,
                                  [&](float boundary) { return std::abs(y - boundary) <= margin; });
    doubt.n_code += near ? 1 : 0;
    squares += std::pow(book.centroids[static_cast<std::size_t>(code)], 2);
  }
  const double norm = length / std::sqrt(squares);
  const auto rounded = [&](double factor) { return to_bf16(static_cast<float>(norm * factor)); };
  doubt.norm = !(rounded(1.0 - margin) == rounded(1.0 + margin));
  return doubt;
}

/// sim-k<b>v<b>-had reads back what a TQ4 cache reads back, within rounding: TQ4 divides by the length before it
/// rotates, the quantiser after. Each of the two rotations there and back makes log2(head_dim) + 2 roundings of 2^-24
/// relative to the length on either side. A decision that they turn moves the vector by a gap of the table (and by a
/// third of it through the corrected norm: |level| / |c| <= 2.8 / sqrt(64)), a bf16 norm by 2^-7 of it.
RC_GTEST_PROP(SimulatedCache, ScalarCodesAgreeWithTq4, ()) {
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  const int k_bits = *rc::gen::inRange(2, 5), v_bits = *rc::gen::inRange(2, 5);
  const auto seed = *rc::gen::inRange<std::uint64_t>(0, 1000);
  const Simulated<ScalarCodes> format{ScalarCodes::make(k_bits, v_bits), true, seed};
  const reference::Tq4Codec<float> codec(head_dim, {.k_bits = k_bits, .v_bits = v_bits, .seed = seed});
  const auto rotation = reference::Rotation<double>::signed_hadamard(head_dim, seed);
  const double rounding = 4.0 * (std::log2(static_cast<double>(head_dim)) + 2.0) * 0x1p-24;
  const Matrix<float> x = std::ldexp(1.0f, *rc::gen::inRange(-60, 60)) * normal_rows(seed + 7, 24, head_dim);
  int n_plain = 0;
  for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
    const Codebook& book = codec.codebook(side);
    const double gap = book.centroids[1] - book.centroids[0];  // the widest
    const Matrix<float> expected = tq4_reads(codec, side, x), actual = read_back(format, side, x);
    for (Eigen::Index r = 0; r < x.rows(); ++r) {
      const Doubt doubt = doubt_of(book, x.row(r).cast<double>(), rotation, rounding);
      const double bound = rounding + 1.4 * gap * std::sqrt(doubt.n_code) + (doubt.norm ? 0x1p-7 : 0.0);
      const double error = (actual.row(r) - expected.row(r)).cast<double>().norm();
      RC_ASSERT(error <= bound * x.row(r).cast<double>().norm());
      n_plain += doubt.n_code == 0 && !doubt.norm ? 1 : 0;
    }
  }
  RC_ASSERT(n_plain >= 24);  // most vectors are held to rounding alone
  // Negative controls: another seed, no rotation, and the widths of the other side are other formats.
  const Matrix<float> expected = tq4_reads(codec, CacheSide::kKey, x);
  const auto differs = [&](const Simulated<ScalarCodes>& other) {
    return (read_back(other, CacheSide::kKey, x) - expected).norm() > 0.01f * expected.norm();
  };
  RC_ASSERT(differs({format.quantiser, true, seed + 1}));
  RC_ASSERT(differs({format.quantiser, false, seed}));
  RC_ASSERT(k_bits == v_bits || differs({ScalarCodes::make(v_bits, k_bits), true, seed}));
}

// ---- The update

/// Rows go where they belong, each through the functor of its side, rounded once to bf16; no other byte changes.
TEST(SimulatedCache, StoresWhatTheFormatReadsBackAndNothingElse) {
  constexpr std::int64_t kBatch = 2, kHeads = 3, kLength = 9, kHeadDim = 64;
  const std::vector<std::int32_t> positions = {7, 0, 4};
  const Matrix<float> k = normal_rows(1, kBatch * 3 * kHeads, kHeadDim), v = normal_rows(2, k.rows(), kHeadDim);
  const auto view = [&](const Matrix<float>& m) {
    return View<const float, 4>(make_view(m.data(), kBatch, 3, kHeads, kHeadDim));
  };
  const Bf16 poison{0x7FC1};
  for_each_format([&]<class TQuantiser>(const Simulated<TQuantiser>& format) {
    const SimulatedCodec<TQuantiser> codec(kHeadDim, format);
    FlatCache<Bf16> cache(kBatch, kHeads, kLength, kHeadDim);
    std::fill_n(cache.k().data, cache.k().size(), poison);
    std::fill_n(cache.v().data, cache.v().size(), poison);
    simulated_cache_update<float>(codec, view(k), view(v), positions, cache);
    const Matrix<float> k_read = read_back(format, CacheSide::kKey, k),
                        v_read = read_back(format, CacheSide::kValue, v);
    EXPECT_FALSE(k_read == k) << "negative control: the functor does something";
    std::int64_t n_wrong = 0;
    for (std::int64_t item = 0; item < kBatch * kHeads * kLength * kHeadDim; ++item) {
      const std::int64_t i = item % kHeadDim, p = item / kHeadDim % kLength, h = item / kHeadDim / kLength % kHeads,
                         b = item / kHeadDim / kLength / kHeads;
      const auto found = std::find(positions.begin(), positions.end(), p);
      const bool is_new = found != positions.end();
      const auto row = (b * 3 + (found - positions.begin())) * kHeads + h;
      n_wrong += cache.k()(b, h, p, i) == (is_new ? to_bf16(k_read(row, i)) : poison) ? 0 : 1;
      n_wrong += cache.v()(b, h, p, i) == (is_new ? to_bf16(v_read(row, i)) : poison) ? 0 : 1;
    }
    EXPECT_EQ(n_wrong, 0) << format.name();
  });
}

TEST(SimulatedCache, EveryBlockOfARowIsQuantisedByItself) {
  const Matrix<float> x = normal_rows(23, 5, 128);
  const auto expect_blocks = [&](const auto& quantiser) {
    Matrix<float> expected = x;
    for (Eigen::Index r = 0; r < x.rows(); ++r) {
      for (Eigen::Index at = 0; at < 128; at += 32) quantiser.roundtrip(CacheSide::kKey, &expected(r, at), 32);
    }
    const Simulated<std::remove_cvref_t<decltype(quantiser)>> format{.quantiser = quantiser};
    EXPECT_EQ(read_back(format, CacheSide::kKey, x), expected) << format.name();
    for (Eigen::Index at = 0; at < 128; at += 32) {
      EXPECT_NE(expected.middleCols(at, 32), x.middleCols(at, 32)) << "the control: each of them rounds";
    }
  };
  expect_blocks(Q80Cache{});
  expect_blocks(Q40Cache{});
}

/// NaN and infinity show in their own vector, as the one NaN; the rotation spreads them over it.
TEST(SimulatedCache, WhatIsNotFiniteIsNotHidden) {
  for_each_format([&](const auto& format) {
    Matrix<float> x = normal_rows(3, 3, 64);
    const Matrix<float> clean = read_back(format, CacheSide::kKey, x);
    x(1, 40) = -std::nanf("");
    x(2, 3) = INFINITY;
    const Matrix<float> read = read_back(format, CacheSide::kKey, x);
    EXPECT_TRUE(read.row(0) == clean.row(0)) << format.name();
    for (const auto& [row, i] : {std::pair{1, 40}, {2, 3}}) {
      EXPECT_EQ(bit_cast<std::uint32_t>(read(row, i)), bit_cast<std::uint32_t>(quiet_nan())) << format.name();
      if (format.hadamard) {
        EXPECT_TRUE(read.row(row).array().isNaN().all()) << format.name();
      }
    }
  });
}

/// Below the sink nothing is quantised; what both rooms store of a NaN is the same all the same.
TEST(SimulatedCache, ASinkStoresTheOneNaN) {
  const auto format = *Simulated<ScalarCodes>::parse("sim-k4v3-sink1");
  Matrix<float> x = normal_rows(4, 2, 64);
  x(0, 40) = -std::nanf("");
  x(0, 41) = -INFINITY;
  const auto view = make_view<const float>(x.data(), 1, 2, 1, 64);
  FlatCache<Bf16> cache(1, 1, 2, 64);
  simulated_cache_update<float>(SimulatedCodec<ScalarCodes>(64, format), view, view, std::vector<std::int32_t>{0, 1},
                                cache);
  int n_changed = 0;
  for (Eigen::Index i = 0; i < 64; ++i) {
    EXPECT_EQ(cache.k()(0, 0, 0, i), to_bf16(i == 40 ? quiet_nan() : x(0, i))) << i;
    EXPECT_EQ(cache.v()(0, 0, 0, i), cache.k()(0, 0, 0, i)) << i;
    n_changed += cache.k()(0, 0, 1, i) != to_bf16(x(1, i));
  }
  EXPECT_GT(n_changed, 32) << "the control: behind the sink it is quantised";
}

TEST(SimulatedCache, MisuseIsRefusedByName) {
  const auto q4 = *Simulated<Q40Cache>::parse("sim-q4_0"), rotated = *Simulated<Q40Cache>::parse("sim-q4_0-had");
  EXPECT_TRUE(refuses([&] { SimulatedCodec<Q40Cache>(80, q4); }, {"sim-q4_0", "32", "head_dim 80"}));
  EXPECT_TRUE(refuses([&] { SimulatedCodec<Q40Cache>(96, rotated); }, {"96", "power of two"}));
  const SimulatedCodec<Q40Cache> codec(64, q4);
  Matrix<float> narrow = normal_rows(1, 2, 32);
  EXPECT_TRUE(refuses([&] { codec.roundtrip(CacheSide::kKey, narrow); }, {"32", "need head_dim 64"}));
  FlatCache<Bf16> cache(1, 2, 8, 64);
  const Matrix<float> x = normal_rows(1, 4, 64);
  const auto fresh = View<const float, 4>(make_view(x.data(), 1, 2, 2, 64));
  const auto update = [&](std::vector<std::int32_t> positions) {
    return [&, positions] { simulated_cache_update<float>(codec, fresh, fresh, positions, cache); };
  };
  EXPECT_TRUE(refuses(update({0, 8}), {"simulated_cache_update", "positions[1] is 8"}));
  EXPECT_TRUE(refuses(update({5, 5}), {"both 5"}));
  EXPECT_TRUE(refuses(update({5}), {"k has extent 2 on axis 1"}));
}

// ---- In a layer

/// The layer's cache attends to the flat cache of what is read back, whatever the chunks.
TEST(SimulatedLayerCache, IsTheFlatCacheOfWhatIsReadBack) {
  AttentionConfig attention;
  attention.head_dim = 64;
  attention.n_head_kv = 2;
  const auto qkv = [&](std::uint64_t seed, std::int64_t n) {
    return reference::Qkv<float>{normal_rows(seed, n, 4 * 64), normal_rows(seed + 1, n, 2 * 64),
                                 normal_rows(seed + 2, n, 2 * 64)};
  };
  for_each_format([&]<class TQuantiser>(const Simulated<TQuantiser>& format) {
    const auto codec = std::make_shared<const SimulatedCodec<TQuantiser>>(64, format);
    reference::SimulatedLayerCache<TQuantiser> simulated(attention, 16, codec);
    reference::FlatLayerCache<Bf16> flat(attention, 16), unquantised(attention, 16);
    bool same = true;
    std::int64_t position = 0;
    for (const std::int64_t n : {5, 1, 7}) {
      const auto exact = qkv(10 * static_cast<std::uint64_t>(n), n);
      auto read = exact;
      for (auto* heads : {&read.k, &read.v}) {
        Eigen::Map<Matrix<float>> rows(heads->data(), 2 * n, 64);
        codec->roundtrip(heads == &read.k ? CacheSide::kKey : CacheSide::kValue, rows);
      }
      const Matrix<float> out = simulated.attend(exact, position);
      EXPECT_TRUE(out == flat.attend(read, position)) << format.name();
      same = same && out == unquantised.attend(exact, position);
      position += n;
    }
    EXPECT_FALSE(same) << format.name() << ": negative control";
  });
}

}  // namespace
