// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// What every attention over a flat cache promises, as properties of a random case with their negative controls. They
/// are written once; a subject says which cache and which room is held to them:
///
///   explicit TSubject(const AttentionCase&, settings...)  its cache holds the rows [0, buffer_len) of case.k() and
///                                                         case.v(); settings are what a promise was given besides
///   void spoil(first, last, Spoil)                     overwrites rows [first, last) of every head and batch
///   TSubject sliced(kv_len) const                      the same in a buffer of exactly kv_len rows
///   std::vector<float> attend(options, kv_len) const   the call itself, on case.q()
///   NaiveAttention exact(sees) const                   the oracle on what the cache really holds
///   AttentionRounding rounding() const                 of the implementation, for attention_bound
namespace gemma4::testkit {

enum class Spoil { kThousandTimes, kNaN };
inline std::ostream& operator<<(std::ostream& out, Spoil kind) {
  return out << (kind == Spoil::kNaN ? "NaN" : "a thousand times larger");
}

[[nodiscard]] inline Sees sees_of(const AttentionCase& c) {
  return [c](std::int64_t, std::int64_t t, std::int64_t j) { return j < c.limit(t); };
}

/// close() of a result with the oracle's, element by element within the derived bound, or as the subject compares:
/// testing::AssertionResult compare(actual, exact) const.
template <class TSubject>
[[nodiscard]] testing::AssertionResult close_to_exact(const TSubject& subject, const std::vector<float>& actual,
                                                      const NaiveAttention& exact, std::int64_t head_dim) {
  if constexpr (requires { subject.compare(actual, exact); }) {
    return subject.compare(actual, exact);
  } else {
    return close(actual, exact.out, exact.bounds(subject.rounding(), head_dim));
  }
}

/// A mask [batch, 1, n_query, extent] of random bytes 0, 1 or 255, about a quarter of them 0.
struct RandomMask {
  std::int64_t batch, n_query, extent;
  std::vector<std::uint8_t> bytes;

  RandomMask(const AttentionCase& c, std::int64_t extent_in)
      : batch(c.shape.batch), n_query(c.shape.n_query), extent(extent_in) {
    for (const float value : draw(c.seed + 17, batch * n_query * extent, 1.0f)) {
      bytes.push_back(value < -0.5f ? 0 : (value < 0.5f ? 1 : 255));
    }
  }
  [[nodiscard]] bool sees(std::int64_t b, std::int64_t t, std::int64_t j) const {
    return bytes[static_cast<std::size_t>((b * n_query + t) * extent + j)] != 0;
  }
  [[nodiscard]] MaskView view() const {
    return {.data = bytes.data(), .type = ElementType::kBool, .shape = {batch, 1, n_query, extent}};
  }
};

/// A call whose weights are so even, and whose keys so few, that every key of it matters above the bounds: what
/// negative controls need. (One key of 63 did not always: 0.86 of the bound of bf16 at D = 512.)
[[nodiscard]] inline AttentionCase even_case(AttentionCase c) {
  c.scale = 0.25f / std::sqrt(static_cast<float>(c.shape.head_dim));
  c.shape.n_query = std::min<std::int64_t>(c.shape.n_query, 24);
  c.kv_len = std::clamp<std::int64_t>(c.kv_len, c.shape.n_query + 1, 28);
  c.shape.buffer_len = c.kv_len + 3;
  return c;
}

/// Every shape: the result is the oracle's within the derived bound. Control: an oracle whose causal diagonal is one
/// key too short is not within it.
template <class TSubject, class... TSettings>
void agrees_with_exact(const AttentionCase& c, const TSettings&... settings) {
  const TSubject subject(c, settings...);
  rc_require(
      close_to_exact(subject, subject.attend(c.options(), c.kv_len), subject.exact(sees_of(c)), c.shape.head_dim));
  const AttentionCase even = even_case(c);
  const TSubject control(even, settings...);
  const Sees one_short = [&even](std::int64_t, std::int64_t t, std::int64_t j) { return j < even.limit(t) - 1; };
  const std::vector<float> out = control.attend(even.options(), even.kv_len);
  rc_require(close_to_exact(control, out, control.exact(sees_of(even)), c.shape.head_dim));
  RC_ASSERT(!close_to_exact(control, out, control.exact(one_short), c.shape.head_dim));
}

/// Promise 1. Control: without kv_len the garbage shows (NaN for certain; a key a thousand times larger may by chance
/// get no weight at all).
template <class TSubject, class... TSettings>
void garbage_tail_is_never_read(const AttentionCase& c, const TSettings&... settings) {
  const Spoil kind = *rc::gen::element(Spoil::kThousandTimes, Spoil::kNaN);
  const TSubject clean(c, settings...);
  TSubject dirty(c, settings...);
  dirty.spoil(c.kv_len, c.shape.buffer_len, kind);
  const std::vector<float> expected = clean.attend(c.options(), c.kv_len);
  rc_require(same_bits(dirty.attend(c.options(), c.kv_len), expected));
  dirty.spoil(c.kv_len, c.shape.buffer_len, Spoil::kNaN);
  RC_ASSERT(!close(dirty.attend(c.options(), std::nullopt), expected, 1e30));
}

/// Promise 2. Control: one row fewer differs.
template <class TSubject, class... TSettings>
void clamp_equals_slice(const AttentionCase& c, const TSettings&... settings) {
  const TSubject subject(c, settings...);
  const std::vector<float> clamped = subject.attend(c.options(), c.kv_len);
  const TSubject slice = subject.sliced(c.kv_len);
  rc_require(same_bits(slice.attend(c.options(), c.kv_len), clamped));
  rc_require(same_bits(slice.attend(c.options(), std::nullopt), clamped), "kv_len absent");
  const AttentionCase even = even_case(c);
  const TSubject control(even, settings...);
  RC_ASSERT(!same_bits(control.attend(even.options(), even.kv_len - 1), control.attend(even.options(), even.kv_len)));
}

/// Promise 3: skip on and off are the same bits, also when the rows that the first queries do not see hold garbage;
/// those queries do not notice. Control: the queries that see garbage do.
template <class TSubject, class... TSettings>
void causal_skip_changes_nothing(AttentionCase c, const TSettings&... settings) {
  c.causal = true;
  if (*rc::gen::arbitrary<bool>()) {  // a multiple of 256, and so the end of a block of keys, among the limits
    c.shape.n_query = std::max<std::int64_t>(c.shape.n_query, 2);
    c.kv_len = (c.kv_len / 256 + 1) * 256 + *rc::gen::inRange<std::int64_t>(1, c.shape.n_query);
  }
  c.kv_len = std::max(c.kv_len, c.shape.n_query);
  c.shape.buffer_len = std::max(c.shape.buffer_len, c.kv_len);
  AttentionOptions with = c.options(), without = c.options();
  without.causal_skip = false;
  const TSubject clean(c, settings...);
  const std::vector<float> expected = clean.attend(with, c.kv_len);
  rc_require(same_bits(clean.attend(without, c.kv_len), expected), "clean");

  const auto n_dirty = *rc::gen::inRange<std::int64_t>(1, c.shape.n_query + 1);
  TSubject dirty(c, settings...);
  dirty.spoil(c.kv_len - n_dirty, c.kv_len, Spoil::kNaN);
  const std::vector<float> on = dirty.attend(with, c.kv_len), off = dirty.attend(without, c.kv_len);
  const auto row = static_cast<std::size_t>(c.shape.n_head * c.shape.head_dim);
  for (std::int64_t b = 0; b < c.shape.batch; ++b) {
    for (std::int64_t t = 0; t < c.shape.n_query; ++t) {
      const std::size_t first = static_cast<std::size_t>(b * c.shape.n_query + t) * row;
      const auto part = [&](const std::vector<float>& values) { return std::span(values).subspan(first, row); };
      if (t < c.shape.n_query - n_dirty) {
        rc_require(same_bits(part(on), part(expected)), "skip on, garbage behind query " + std::to_string(t));
        rc_require(same_bits(part(off), part(expected)), "skip off, garbage behind query " + std::to_string(t));
      } else {
        RC_ASSERT(!same_bits(part(on), part(expected)));
      }
    }
  }
}

/// Promise 3, any chunk size: queries in two pieces, each with the kv_len it then has, give the oracle's result of one
/// call. Control: the first piece with the kv_len of the whole call does not, wherever the oracle puts the two further
/// apart than both bounds together (among many keys one more may hide in the rounding of a bf16 device).
template <class TSubject, class... TSettings>
void any_chunk_size_agrees(AttentionCase c, const TSettings&... settings) {
  c.causal = true;
  c.shape.batch = 1;
  c.shape.n_query = std::max<std::int64_t>(c.shape.n_query, 2);
  c = even_case(c);
  const TSubject subject(c, settings...);
  const NaiveAttention exact = subject.exact(sees_of(c));
  const auto first = *rc::gen::inRange<std::int64_t>(1, c.shape.n_query);
  const std::int64_t second = c.shape.n_query - first;
  std::vector<float> joined = subject.attend(c.options(), c.kv_len - second, 0, first);
  const std::vector<float> wrong = subject.attend(c.options(), c.kv_len, 0, first);
  const std::vector<float> tail = subject.attend(c.options(), c.kv_len, first, second);
  const std::vector<double> bounds = exact.bounds(subject.rounding(), c.shape.head_dim);
  const NaiveAttention misplaced =
      subject.exact([&](std::int64_t, std::int64_t t, std::int64_t j) { return j < c.kv_len - first + t + 1; });
  bool shows = false;
  for (std::size_t i = 0; i < wrong.size(); ++i) {
    shows = shows || std::abs(misplaced.out[i] - exact.out[i]) > 2 * bounds[i];
  }
  RC_CLASSIFY(shows, "the control shows");
  RC_ASSERT(!shows || !close(wrong, std::span(exact.out).first(wrong.size()), std::span(bounds).first(wrong.size())));
  joined.insert(joined.end(), tail.begin(), tail.end());
  rc_require(close(joined, exact.out, bounds));
}

/// Promise 4, second half: the same call gives the same bits. (No control: nothing to break from outside.)
template <class TSubject, class... TSettings>
void same_call_gives_same_bits(const AttentionCase& c, const TSettings&... settings) {
  const TSubject subject(c, settings...);
  rc_require(same_bits(subject.attend(c.options(), c.kv_len), subject.attend(c.options(), c.kv_len)));
}

/// Promise 5: a mask hides what it hides, together with causality; a row masked everywhere gives zeros, whatever the
/// cache holds; a mask of ones changes no bit; columns at kv_len and beyond are not looked at. Control: the complement
/// of the mask gives another result.
template <class TSubject, class... TSettings>
void mask_hides_keys(AttentionCase c, const TSettings&... settings) {
  if (*rc::gen::arbitrary<bool>()) c = even_case(c);
  RandomMask mask(c, *rc::gen::element(c.kv_len, c.kv_len + 5, c.shape.buffer_len));
  const auto hidden = *rc::gen::inRange<std::int64_t>(0, c.shape.n_query);  // this query sees nothing
  for (std::int64_t b = 0; b < c.shape.batch; ++b) {
    const auto row = mask.bytes.begin() + (b * c.shape.n_query + hidden) * mask.extent;
    std::fill(row, row + mask.extent, std::uint8_t{0});
  }
  const TSubject subject(c, settings...);
  AttentionOptions options = c.options();
  options.mask = mask.view();
  const std::vector<float> out = subject.attend(options, c.kv_len);
  const Sees sees = [&](std::int64_t b, std::int64_t t, std::int64_t j) {
    return j < c.limit(t) && mask.sees(b, t, j);
  };
  const NaiveAttention exact = subject.exact(sees);
  rc_require(close_to_exact(subject, out, exact, c.shape.head_dim));
  const auto row = static_cast<std::size_t>(c.shape.n_head * c.shape.head_dim);
  for (std::int64_t b = 0; b < c.shape.batch; ++b) {
    const std::size_t first = static_cast<std::size_t>(b * c.shape.n_query + hidden) * row;
    rc_require(close(std::span(out).subspan(first, row), std::vector<float>(row), 0.0), "the row masked everywhere");
  }
  for (std::uint8_t& byte : mask.bytes) byte = byte == 0;
  if (c.kv_len <= 64) {  // the row masked everywhere now sees a key at least
    RC_ASSERT(!close_to_exact(subject, subject.attend(options, c.kv_len), exact, c.shape.head_dim));
  }
  std::fill(mask.bytes.begin(), mask.bytes.end(), std::uint8_t{1});
  rc_require(same_bits(subject.attend(options, c.kv_len), subject.attend(c.options(), c.kv_len)), "a mask of ones");
}

/// A key that the mask hides has no influence even when its rows are NaN. Control: shown, it has.
template <class TSubject, class... TSettings>
void masked_garbage_has_no_influence(const AttentionCase& c, const TSettings&... settings) {
  const auto bad = *rc::gen::inRange<std::int64_t>(0, c.kv_len);
  RandomMask mask(c, c.kv_len);
  const auto set_column = [&](std::uint8_t value) {
    for (std::int64_t i = 0; i < mask.batch * mask.n_query; ++i) {
      mask.bytes[static_cast<std::size_t>(i * mask.extent + bad)] = value;
    }
  };
  set_column(0);
  AttentionOptions options = c.options();
  options.mask = mask.view();
  const TSubject clean(c, settings...);
  TSubject dirty(c, settings...);
  dirty.spoil(bad, bad + 1, Spoil::kNaN);
  const std::vector<float> expected = clean.attend(options, c.kv_len);
  rc_require(same_bits(dirty.attend(options, c.kv_len), expected));
  set_column(1);
  RC_ASSERT(!same_bits(dirty.attend(options, c.kv_len), expected));
}

}  // namespace gemma4::testkit
