// SPDX-License-Identifier: Apache-2.0
#include "reference/bf16_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemma4/rotation.hpp"
#include "tests/support/property.hpp"

namespace {

using namespace gemma4;
using reference::bf16_cache_update;
using reference::FlatCache;

/// New rows [batch, n_new, n_head_kv, head_dim] and where they go.
struct Update {
  std::int64_t batch, n_head_kv, buffer_len, head_dim;
  std::vector<std::int32_t> positions;
  std::vector<float> k, v;

  [[nodiscard]] View<const float, 4> k_view() const { return view(k); }
  [[nodiscard]] View<const float, 4> v_view() const { return view(v); }

 private:
  [[nodiscard]] View<const float, 4> view(const std::vector<float>& data) const {
    return make_view(data.data(), batch, static_cast<std::int64_t>(positions.size()), n_head_kv, head_dim);
  }
};

Update make_update(std::uint64_t seed, std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len,
                   std::int64_t head_dim, std::vector<std::int32_t> positions) {
  Update update{batch, n_head_kv, buffer_len, head_dim, std::move(positions), {}, {}};
  const auto count = batch * static_cast<std::int64_t>(update.positions.size()) * n_head_kv * head_dim;
  for (const auto& [values, salt] : {std::pair{&update.k, 1}, std::pair{&update.v, 2}}) {
    for (const double x : haar_gaussians(2 * seed + static_cast<std::uint64_t>(salt), count)) {
      values->push_back(static_cast<float>(x));
    }
  }
  return update;
}

/// Some positions of [0, buffer_len), each once, in any order.
std::vector<std::int32_t> any_positions(std::int64_t buffer_len) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(buffer_len));
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[*rc::gen::inRange<std::size_t>(0, i)]);
  all.resize(*rc::gen::inRange<std::size_t>(1, all.size() + 1));
  return all;
}

template <class TStorage>
void fill(View<TStorage, 4> view, TStorage value) {
  std::fill_n(view.data, view.size(), value);
}

template <class TStorage>
void check_scatter(const Update& u, TStorage poison) {
  FlatCache<TStorage> cache(u.batch, u.n_head_kv, u.buffer_len, u.head_dim);
  fill(cache.k(), poison);
  fill(cache.v(), poison);
  bf16_cache_update<float, TStorage>(u.k_view(), u.v_view(), u.positions, cache);
  for (std::int64_t b = 0; b < u.batch; ++b) {
    for (std::int64_t h = 0; h < u.n_head_kv; ++h) {
      for (std::int32_t p = 0; p < u.buffer_len; ++p) {
        const auto found = std::find(u.positions.begin(), u.positions.end(), p);
        for (std::int64_t i = 0; i < u.head_dim; ++i) {
          const bool is_new = found != u.positions.end();
          const auto t = found - u.positions.begin();
          RC_ASSERT(cache.k()(b, h, p, i) == (is_new ? from_float<TStorage>(u.k_view()(b, t, h, i)) : poison));
          RC_ASSERT(cache.v()(b, h, p, i) == (is_new ? from_float<TStorage>(u.v_view()(b, t, h, i)) : poison));
        }
      }
    }
  }
}

RC_GTEST_PROP(Bf16Cache, RowsGoToTheirPositionsAndNoOtherByteChanges, (std::uint64_t seed)) {
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 12);
  const Update u = make_update(seed, *rc::gen::inRange(1, 3), *rc::gen::inRange(1, 4), buffer_len,
                               *rc::gen::element<std::int64_t>(2, 64), any_positions(buffer_len));
  check_scatter<Bf16>(u, Bf16{0x7FC1});  // a NaN that no rounding makes
  check_scatter<float>(u, -1e30f);
}

TEST(Bf16Cache, StorageRoundsToNearestEven) {
  // 1 + 2^-8 is half way between 1 and 1 + 2^-7; 1 + 3 * 2^-8 half way between 1 + 2^-7 and 1 + 2^-6.
  const std::vector<float> k = {1.0f + 0x1p-8f, 1.0f + 0x3p-8f},
                           v = {-1.0f - 0x1p-8f, std::nextafter(1.0f + 0x1p-8f, 2.0f)};
  FlatCache<Bf16> cache(1, 1, 1, 2);
  const std::vector<std::int32_t> positions = {0};
  bf16_cache_update<float>(make_view(k.data(), 1, 1, 1, 2), make_view(v.data(), 1, 1, 1, 2), positions, cache);
  EXPECT_EQ(to_float(cache.k()(0, 0, 0, 0)), 1.0f);
  EXPECT_EQ(to_float(cache.k()(0, 0, 0, 1)), 1.0f + 0x1p-6f);
  EXPECT_EQ(to_float(cache.v()(0, 0, 0, 0)), -1.0f);
  EXPECT_EQ(to_float(cache.v()(0, 0, 0, 1)), 1.0f + 0x1p-7f);
}

TEST(Bf16Cache, NewValuesMayBeStrided) {
  // K and V side by side in one projection [n_new, 2 * head_dim].
  const std::vector<float> kv = {1, 2, 3, 4, 5, 6, 7, 8};
  auto k = make_view(kv.data(), 1, 2, 1, 4), v = k;
  k.extent[3] = v.extent[3] = 2;
  v.data += 2;
  FlatCache<float> cache(1, 1, 3, 2);
  const std::vector<std::int32_t> positions = {2, 0};
  bf16_cache_update<float>(k, v, positions, cache);
  const std::vector<float> expected_k = {5, 6, 0, 0, 1, 2}, expected_v = {7, 8, 0, 0, 3, 4};
  EXPECT_TRUE(std::equal(expected_k.begin(), expected_k.end(), cache.k().data));
  EXPECT_TRUE(std::equal(expected_v.begin(), expected_v.end(), cache.v().data));
}

TEST(Bf16Cache, MisuseIsRefusedByNameAndWritesNothing) {
  const auto refused = [](std::vector<std::int32_t> positions, std::vector<std::string> words, auto bend) {
    Update u = make_update(1, 1, 2, 8, 64, std::move(positions));
    FlatCache<Bf16> cache(u.batch, u.n_head_kv, u.buffer_len, u.head_dim);
    auto k = u.k_view(), v = u.v_view();
    bend(k, v);
    const FlatCache<Bf16> before = cache.clone();
    try {
      bf16_cache_update<float>(k, v, u.positions, cache);
      ADD_FAILURE() << "accepted, expected a refusal that says " << words.front();
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      for (const std::string& word : words) EXPECT_NE(message.find(word), std::string::npos) << message;
    }
    EXPECT_EQ(cache, before);
  };
  const auto straight = [](auto&, auto&) {};
  refused({0, 8, 1}, {"positions[1] is 8", "buffer_len = 8"}, straight);
  refused({0, 1, -1}, {"positions[2] is -1"}, straight);
  refused({5, 3, 0, 3}, {"positions[1]", "positions[3]", "both 3"}, straight);
  refused({0, 1}, {"k has extent 3 on axis 1", "= 2"}, [](auto& k, auto&) { k.extent[1] = 3; });
  refused({0, 1}, {"v has extent 1 on axis 2", "n_head_kv = 2"}, [](auto&, auto& v) { v.extent[2] = 1; });
  refused({0, 1}, {"v has extent 32 on axis 3", "head_dim = 64"}, [](auto&, auto& v) { v.extent[3] = 32; });
  refused({0, 1}, {"k has extent 2 on axis 0", "batch = 1"}, [](auto& k, auto&) { k.extent[0] = 2; });
  refused({0, 1}, {"k has stride 2"}, [](auto& k, auto&) { k.stride[3] = 2; });
}

TEST(Bf16Cache, BytesAreThoseOfTheStorage) {
  EXPECT_EQ(FlatCache<Bf16>(2, 4, 100, 512).bytes(), 2 * 2 * 4 * 100 * 512 * 2);
  EXPECT_EQ(FlatCache<float>(2, 4, 100, 512).bytes(), 2 * 2 * 4 * 100 * 512 * 4);
}

}  // namespace
