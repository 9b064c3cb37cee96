// SPDX-License-Identifier: Apache-2.0
#include "reference/tq4_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/tq4_rows.hpp"

/// The update of a cache, and the rows of it that are read back.
namespace {

using namespace gemma4;
using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4CacheBuffer;
using reference::Tq4Codec;
using Rows = Tq4Rows;

/// Some positions of [0, buffer_len), each once, in any order.
std::vector<std::int32_t> any_positions(std::int64_t buffer_len) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(buffer_len));
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[*rc::gen::inRange<std::size_t>(0, i)]);
  all.resize(*rc::gen::inRange<std::size_t>(1, all.size() + 1));
  return all;
}

constexpr std::uint8_t kPoisonCode = 0xA5;
constexpr Tq4Norm kPoisonNorm{0xFFA5};  // a NaN that no rounding makes

Tq4CacheBuffer poisoned(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t head_dim) {
  Tq4CacheBuffer buffer(batch, n_head_kv, buffer_len, head_dim);
  for (const auto codes : {buffer.k_codes(), buffer.v_codes()}) std::fill(codes.begin(), codes.end(), kPoisonCode);
  for (const auto norms : {buffer.k_norm(), buffer.v_norm()}) std::fill(norms.begin(), norms.end(), kPoisonNorm);
  return buffer;
}

RC_GTEST_PROP(Tq4Cache, RowsGoToTheirPositionsAndNoOtherByteChanges, (std::uint64_t seed)) {
  const auto batch = *rc::gen::inRange<std::int64_t>(1, 3), n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 12);
  const Tq4Codec<float> codec(any_head_dim(), any_options());
  const std::vector<std::int32_t> positions = any_positions(buffer_len);
  const auto n_new = static_cast<std::int64_t>(positions.size());
  const Matrix<float> k = normal_rows(2 * seed, batch * n_new * n_head_kv, codec.head_dim());
  const Matrix<float> v = normal_rows(2 * seed + 1, batch * n_new * n_head_kv, codec.head_dim());
  Tq4CacheBuffer buffer = poisoned(batch, n_head_kv, buffer_len, codec.head_dim());
  const auto as_view = [&](const Matrix<float>& m) {
    return View<const float, 4>(make_view(m.data(), batch, n_new, n_head_kv, codec.head_dim()));
  };
  tq4_cache_update<float>(codec, as_view(k), as_view(v), positions, buffer.view());
  const auto check = [&](CacheSide side, const Matrix<float>& x, View<std::uint8_t, 4> codes, View<Tq4Norm, 3> norms) {
    const Rows rows = compress(codec, side, x);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t h = 0; h < n_head_kv; ++h) {
        for (std::int32_t p = 0; p < buffer_len; ++p) {
          const auto found = std::find(positions.begin(), positions.end(), p);
          const bool is_new = found != positions.end();
          const auto row = is_new ? (b * n_new + (found - positions.begin())) * n_head_kv + h : 0;
          for (std::int64_t j = 0; j < codec.head_dim() / 2; ++j) {
            RC_ASSERT(codes(b, h, p, j) == (is_new ? rows.codes(row, j) : kPoisonCode));
          }
          RC_ASSERT(norms(b, h, p) == (is_new ? rows.norms[static_cast<std::size_t>(row)] : kPoisonNorm));
        }
      }
    }
  };
  check(CacheSide::kKey, k, buffer.view().k_codes, buffer.view().k_norm);
  check(CacheSide::kValue, v, buffer.view().v_codes, buffer.view().v_norm);
}

TEST(Tq4Cache, PiecesOfAUpdateMakeTheWhole) {
  // Any chunk length gives the same bytes; one head of it reads back through tq4_rows.
  const Tq4Codec<float> codec(64, {});
  const Matrix<float> k = normal_rows(1, 21 * 2, 64), v = normal_rows(2, 21 * 2, 64);
  const auto part = [&](const Matrix<float>& m, std::int64_t first, std::int64_t count) {
    return View<const float, 4>(make_view(m.row(2 * first).data(), 1, count, 2, 64));
  };
  const auto filled = [&](std::int64_t chunk) {
    Tq4CacheBuffer buffer = poisoned(1, 2, 24, 64);
    for (std::int64_t first = 0; first < 21; first += chunk) {
      std::vector<std::int32_t> positions(static_cast<std::size_t>(std::min<std::int64_t>(chunk, 21 - first)));
      std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first));
      const auto count = static_cast<std::int64_t>(positions.size());
      tq4_cache_update<float>(codec, part(k, first, count), part(v, first, count), positions, buffer.view());
    }
    return buffer;
  };
  const Tq4CacheBuffer whole = filled(21);
  for (const std::int64_t chunk : {1, 4, 16, 20}) EXPECT_EQ(filled(chunk), whole) << chunk;
  const auto [codes, norms] = reference::tq4_rows(whole.view().v_codes, whole.view().v_norm, 0, 1, 3, 5);
  Matrix<float> rotated(5, 64), back(5, 64);
  codec.decompress_rotated(CacheSide::kValue, codes, norms, rotated);
  codec.decompress(CacheSide::kValue, codes, norms, back);
  for (Eigen::Index t = 0; t < 5; ++t) {
    const auto row = v.row(2 * (3 + t) + 1);
    EXPECT_LE((back.row(t) - row).squaredNorm(), 0.02f * row.squaredNorm());
    EXPECT_GT((rotated.row(t) - row).squaredNorm(), 0.2f * row.squaredNorm()) << "negative control: not rotated back";
    EXPECT_GT((back.row(t) - v.row(2 * (3 + t))).squaredNorm(), 0.2f * row.squaredNorm()) << "the other head";
  }
}

TEST(Tq4Cache, RowsOfAHeadAreThoseOfItsBatchAndHead) {
  // Every byte and norm of the storage is another one, as far as a byte goes.
  constexpr std::int64_t kBatch = 2, kHead = 3, kLen = 5, kBytes = 32;
  Tq4CacheBuffer buffer(kBatch, kHead, kLen, 2 * kBytes);
  for (std::size_t i = 0; i < buffer.k_codes().size(); ++i) {
    buffer.k_codes()[i] = static_cast<std::uint8_t>(i * 151 >> 3);
    buffer.v_codes()[i] = static_cast<std::uint8_t>(i * 89 >> 2);
  }
  for (std::size_t i = 0; i < buffer.k_norm().size(); ++i) {
    buffer.k_norm()[i] = Tq4Norm{static_cast<std::uint16_t>(i + 1)};
    buffer.v_norm()[i] = Tq4Norm{static_cast<std::uint16_t>(1000 + i)};
  }
  for (std::int64_t b = 0; b < kBatch; ++b) {
    for (std::int64_t h = 0; h < kHead; ++h) {
      for (std::int64_t first = 0; first < kLen; ++first) {
        for (std::int64_t count = 1; count <= kLen - first; ++count) {
          const Tq4CacheView view = buffer.view();
          const auto [k_codes, k_norm] = reference::tq4_rows(view.k_codes, view.k_norm, b, h, first, count);
          const auto [v_codes, v_norm] = reference::tq4_rows(view.v_codes, view.v_norm, b, h, first, count);
          ASSERT_EQ(k_codes.extent[0], count);
          ASSERT_EQ(k_codes.extent[1], kBytes);
          ASSERT_EQ(k_norm.extent[0], count);
          for (std::int64_t t = 0; t < count; ++t) {
            const auto row = static_cast<std::size_t>((b * kHead + h) * kLen + first + t);
            ASSERT_EQ(k_norm(t), buffer.k_norm()[row]) << b << ", " << h << ", " << first + t;
            ASSERT_EQ(v_norm(t), buffer.v_norm()[row]);
            for (std::int64_t j = 0; j < kBytes; ++j) {
              const std::size_t at = row * kBytes + static_cast<std::size_t>(j);
              ASSERT_EQ(k_codes(t, j), buffer.k_codes()[at]) << b << ", " << h << ", " << first + t;
              ASSERT_EQ(v_codes(t, j), buffer.v_codes()[at]);
            }
          }
        }
      }
    }
  }
}

TEST(Tq4Cache, MisuseIsRefusedByNameAndWritesNothing) {
  const Tq4Codec<float> codec(64, {});
  const auto refused = [&](std::vector<std::int32_t> positions, std::vector<std::string> words, auto bend) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    const Matrix<float> x = normal_rows(1, n_new * 2, 64);
    View<const float, 4> k = make_view(x.data(), 1, n_new, 2, 64), v = k;
    Tq4CacheBuffer buffer = poisoned(1, 2, 8, 64);
    const Tq4CacheBuffer before = buffer.clone();
    Tq4CacheView cache = buffer.view();
    bend(k, v, cache);
    try {
      tq4_cache_update<float>(codec, k, v, positions, cache);
      ADD_FAILURE() << "accepted, expected a refusal that says " << words.front();
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      for (const std::string& word : words) EXPECT_NE(message.find(word), std::string::npos) << message;
    }
    EXPECT_EQ(buffer, before);
  };
  const auto straight = [](auto&, auto&, auto&) {};
  refused({0, 8}, {"tq4_cache_update", "positions[1] is 8", "buffer_len = 8"}, straight);
  refused({-3, 1}, {"positions[0] is -3"}, straight);
  refused({7, 2, 7}, {"positions[0]", "positions[2]", "both 7"}, straight);
  refused({0, 1}, {"k has extent 3 on axis 1", "= 2"}, [](auto& k, auto&, auto&) { k.extent[1] = 3; });
  refused({0, 1}, {"v has extent 128 on axis 3", "head_dim = 64"}, [](auto&, auto& v, auto&) { v.extent[3] = 128; });
  refused({0, 1}, {"v_codes", "buffer_len"}, [](auto&, auto&, auto& c) { c.v_codes.extent[2] = 9; });
  refused({0, 1}, {"k_norm", "n_head_kv"}, [](auto&, auto&, auto& c) { c.k_norm.extent[1] = 1; });
  refused({0, 1}, {"rows of 64 bytes", "32"}, [](auto&, auto&, auto& c) { c.k_codes.extent[3] = 64; });
  EXPECT_THROW(Tq4Codec<float>(96, {}), std::invalid_argument);
  EXPECT_THROW(Tq4Codec<float>(1024, {}), std::invalid_argument);
  EXPECT_THROW(Tq4Codec<float>(64, {.k_bits = 5}), std::invalid_argument);
  EXPECT_THROW(Tq4Codec<float>(64, {.v_bits = 1}), std::invalid_argument);
  Matrix<float> out(3, 64);
  const Rows rows = compress<float>(codec, CacheSide::kKey, Matrix<float>::Zero(2, 64));
  EXPECT_THROW(codec.decompress(CacheSide::kKey, rows.code_view(), rows.norm_view(), out), std::invalid_argument);
}

TEST(Tq4Cache, ABufferHoldsWhatTheFormatSays) {
  const Tq4CacheBuffer buffer(1, 4, 1000, 512);
  EXPECT_EQ(buffer.bytes(), 2 * 4 * 1000 * 258);
  EXPECT_EQ(buffer.view().k_codes.size() + buffer.view().v_codes.size() +
                2 * (buffer.view().k_norm.size() + buffer.view().v_norm.size()),
            buffer.bytes());
}

}  // namespace
