// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/cache_update.hpp"
#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/platform.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/quantisers/unit_codebook.hpp"
#include "gemma4/rotation.hpp"

namespace gemma4 {

/// A trellis code whose states are shifted bits (A. Tseng et al., QTIP, arXiv:2406.11235, section 3.1): value t has a
/// state s[t] of `state_bits` bits, of which `bits` are new,
///   s[t] = (s[t - 1] << bits | new bits) mod 2^state_bits,   read back: level[s[t]]
/// so that a value is read from state_bits consecutive bits of the row and costs `bits` of them, while the level may be
/// one of 2^state_bits. The path with the least sum of squares is found by Viterbi's algorithm when a row is stored.
struct TrellisTable {
  static constexpr int kMaxStates = 1024;
  float level[kMaxStates] = {};
  bool operator==(const TrellisTable&) const = default;
};

/// 3 or 4 bits a value, 2^8 to 2^10 states, and the norm of ScalarCodes: sim-t4l10-had has 4 bits and 2^10 states.
///   y = x sqrt(head_dim) / |x|,  level[] = the path nearest to y,  norm = bf16(|x| / |c|), c = level / sqrt(head_dim)
///   read back: norm * c
/// The first state is stored whole: ceil((bits * head_dim + state_bits - bits) / 8) bytes a row, and the norm.
struct TrellisCodes {
  static constexpr std::string_view kGrammar = "t<3|4>l<8|9|10>";
  static constexpr int kMaxGroups = TrellisTable::kMaxStates / 8, kMaxBlock = 512;
  int bits = 0;
  int state_bits = 0;
  TrellisTable table;
  bool operator==(const TrellisCodes&) const = default;

  /// What a search needs: the cost of the best path into each group of states (those that agree in what the next step
  /// keeps of them), before and after a value, and which state of the group it was, two values a byte.
  template <int kLength>
  struct Scratch {
    float cost[2][kMaxGroups];
    unsigned char choice[kLength / 2][kMaxGroups];
  };

  /// @throws std::invalid_argument unless bits is 3 or 4 and state_bits 8 to 10
  [[nodiscard]] static TrellisCodes make(int bits, int state_bits);

  [[nodiscard]] std::int64_t block_size(std::int64_t head_dim) const { return head_dim; }

  /// One lane's part of a block of n values, even and at most kLength.
  template <class TTeam, int kLength>
  GEMMA4_HD void roundtrip_by(CacheSide /*side*/, float* values, int n, Scratch<kLength>& scratch) const {
    double squares = 0.0;
    for (int i = 0; i < n; ++i) squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);  // exact
    const double length = sqrt(squares), root = sqrt(static_cast<double>(n));
    const double to_unit = length == 0.0 ? 0.0 : root / length;
    TTeam::sync();
    for (int i = TTeam::lane(); i < n; i += TTeam::kSize) {
      values[i] = static_cast<float>(static_cast<double>(values[i]) * to_unit);
    }
    TTeam::sync();
    const double level_squares = nearest_path<TTeam>(values, n, scratch);
    const float norm = to_float(to_bf16(static_cast<float>(length * root / sqrt(level_squares))));
    const double sigma = 1.0 / root;
    for (int i = TTeam::lane(); i < n; i += TTeam::kSize) {
      values[i] = norm * static_cast<float>(static_cast<double>(values[i]) * sigma);
    }
    TTeam::sync();
  }

  GEMMA4_HD void roundtrip(CacheSide side, float* values, int n) const {
    Scratch<kMaxBlock> scratch;
    roundtrip_by<LoneTeam>(side, values, n, scratch);
  }

  /// The values become the levels of the path nearest to them; ties go to the lower state. @return the sum of the
  /// levels' squares
  template <class TTeam, int kLength>
  GEMMA4_HD double nearest_path(float* values, int n, Scratch<kLength>& scratch) const {
    const int groups = 1 << (state_bits - bits), branches = 1 << bits;
    for (int j = TTeam::lane(); j < groups; j += TTeam::kSize) scratch.cost[0][j] = 0.0f;  // any first state
    TTeam::sync();
    for (int t = 0; t < n; ++t) {
      const float y = values[t];
      const float* const before = scratch.cost[t & 1];
      for (int j = TTeam::lane(); j < groups; j += TTeam::kSize) {
        float least = kFar;
        int choice = 0;
        for (int branch = 0; branch < branches; ++branch) {
          const int state = branch * groups + j;
          const float off = y - table.level[state];
          const float cost = before[state >> bits] + product(off, off);
          if (cost < least) least = cost, choice = branch;
        }
        scratch.cost[(t & 1) ^ 1][j] = least;
        unsigned char& pair = scratch.choice[t / 2][j];
        pair = static_cast<unsigned char>((t & 1) == 0 ? choice : pair | choice << 4);
      }
      TTeam::sync();
    }
    const float* const last = scratch.cost[n & 1];
    int group = 0;
    for (int j = 1; j < groups; ++j) group = last[j] < last[group] ? j : group;
    double level_squares = 0.0;
    for (int t = n; t-- > 0;) {
      const int choice = scratch.choice[t / 2][group] >> ((t & 1) == 0 ? 0 : 4) & 15;
      const int state = choice * groups + group;
      const float level = table.level[state];
      if (t % TTeam::kSize == TTeam::lane()) values[t] = level;
      level_squares += static_cast<double>(level) * static_cast<double>(level);  // exact
      group = state >> bits;
    }
    TTeam::sync();
    return level_squares;
  }

  [[nodiscard]] std::int64_t row_bytes(CacheSide, std::int64_t head_dim) const {
    return (bits * head_dim + state_bits - bits + 7) / 8 + static_cast<std::int64_t>(sizeof(Bf16));
  }

  [[nodiscard]] std::string name() const { return concat('t', bits, 'l', state_bits); }
  [[nodiscard]] static std::optional<TrellisCodes> parse(std::string_view stem) {
    for (const int bits : {3, 4}) {
      for (const int state_bits : {8, 9, 10}) {
        if (stem == concat('t', bits, 'l', state_bits)) return make(bits, state_bits);
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr float kFar = 3.0e38f;
};
static_assert(TeamQuantiser<TrellisCodes>);

namespace detail {

/// Where a table begins: the quantiles of the normal distribution at the middles of equal shares, dealt to the states
/// by a bijection of state_bits bits, so that states which agree in their older bits have unrelated levels.
inline TrellisTable scattered_quantiles(int state_bits) {
  const auto mask = (std::uint32_t{1} << state_bits) - 1;
  const auto low = static_cast<unsigned>(state_bits) / 2;
  TrellisTable table;
  for (std::uint32_t state = 0; state <= mask; ++state) {
    std::uint32_t rank = state * 0x9E3779B1u & mask;  // an odd factor, and a shift back: both can be undone
    rank ^= rank >> low;
    rank = rank * 0x85EBCA6Bu & mask;
    rank ^= rank >> low;
    rank = rank * 0xC2B2AE35u & mask;
    const double share = (rank + 0.5) / (mask + 1.0);
    const double level = share < 0.5 ? -normal_upper_quantile(share) : normal_upper_quantile(1.0 - share);
    table.level[state] = static_cast<float>(level);
  }
  return table;
}

/// One of Lloyd's steps: every level becomes the mean of the values whose path went through it.
inline void lloyd_step(TrellisCodes& code, const std::vector<float>& values) {
  constexpr int kLength = TrellisCodes::kMaxBlock;
  std::vector<double> sum(TrellisTable::kMaxStates), count(TrellisTable::kMaxStates);
  std::map<float, std::size_t> state_of;  // a level says which state it is of
  for (std::size_t s = 0; s < std::size_t{1} << code.state_bits; ++s) state_of[code.table.level[s]] = s;
  TrellisCodes::Scratch<kLength> scratch;
  for (std::size_t at = 0; at + kLength <= values.size(); at += kLength) {
    std::vector<float> path(values.begin() + static_cast<std::ptrdiff_t>(at),
                            values.begin() + static_cast<std::ptrdiff_t>(at + kLength));
    (void)code.nearest_path<LoneTeam>(path.data(), kLength, scratch);
    for (std::size_t i = 0; i < kLength; ++i) {
      const std::size_t s = state_of.at(path[i]);
      sum[s] += static_cast<double>(values[at + i]);
      count[s] += 1.0;
    }
  }
  for (std::size_t s = 0; s < sum.size(); ++s) {
    if (count[s] > 0.0) code.table.level[s] = static_cast<float>(sum[s] / count[s]);
  }
}

}  // namespace detail

inline TrellisCodes TrellisCodes::make(int bits, int state_bits) {
  require((bits == 3 || bits == 4) && state_bits >= 8 && state_bits <= 10, "TrellisCodes: ", bits, " bits and 2^",
          state_bits, " states, need 3 or 4 bits and 2^8 to 2^10 states");
  // Solved once a program and pair: 0.1 s to 0.5 s. Thirty-two values a state leave a level with a sixth of its cell's
  // spread; of more rounds the error on other values gains two in a hundred.
  constexpr int kRounds = 6, kValuesAState = 32;
  static std::mutex mutex;
  static std::map<std::pair<int, int>, TrellisCodes> solved;
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = solved.try_emplace({bits, state_bits});
  TrellisCodes& code = entry->second;
  if (is_new) {
    code = {bits, state_bits, detail::scattered_quantiles(state_bits)};
    std::vector<float> values;
    for (const double x : haar_gaussians(static_cast<std::uint64_t>(state_bits), kValuesAState << state_bits)) {
      values.push_back(static_cast<float>(x));
    }
    for (int round = 0; round < kRounds; ++round) detail::lloyd_step(code, values);
  }
  return code;
}

}  // namespace gemma4
