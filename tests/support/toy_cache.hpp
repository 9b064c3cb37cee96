// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "gemma4/attention.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/report/nvtx.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/session/stored_part.hpp"

/// A model of whole numbers that is all cache: a layer's output is a hash of every row that it may look at, in order,
/// so that one wrong byte anywhere shows in every later logit. It has whatever a cache can have: rings with spare
/// slots, records, heads, a tail, tiles, and rounding that hangs on the pass that a token came in.
namespace gemma4::testkit {

struct ToyOptions {
  std::vector<std::uint8_t> is_sliding = {1, 0, 1};
  std::int64_t context = 200, max_chunk = 16, window = 8, spare = 4;
  std::int64_t n_head = 2;
  std::int64_t record = 1;  ///< tokens of a row of the full layers
  std::int64_t tail = 0, tile = 1;
  bool pass_shows = false;  ///< a token's numbers hang on the length of its pass
  CacheSpec cache = Bf16Format{};
  RingSpec ring = {};
  std::string_view part = "rows";
};

class ToyCache {
 public:
  static constexpr std::int64_t kVocab = 50;

  explicit ToyCache(const ToyOptions& options) : options_(options) {
    config_.vocab = kVocab;
    config_.window = options.window;
    config_.is_sliding = options.is_sliding;
    config_.context = 100000;
    reset();
  }

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] std::int64_t context() const { return options_.context; }
  [[nodiscard]] std::int64_t max_chunk() const { return options_.max_chunk; }
  [[nodiscard]] std::int64_t max_rewind() const { return options_.spare; }
  [[nodiscard]] const CacheSpec& cache() const { return options_.cache; }
  [[nodiscard]] const RingSpec& ring() const { return options_.ring; }

  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    if (position != position_) throw std::logic_error("toy: the graph and the caches are at different positions");
    x_.assign(tokens.begin(), tokens.end());
    n_token_ += static_cast<std::int64_t>(tokens.size());
    if (!options_.pass_shows) return;
    for (std::uint64_t& x : x_) x += 1000 * tokens.size();
  }
  void project_qkv(std::int64_t /*layer*/) {}
  void attend(std::int64_t layer) {
    for (std::size_t t = 0; t < x_.size(); ++t) attend(layer, position_ + static_cast<std::int64_t>(t), x_[t]);
  }
  void project_output(std::int64_t /*layer*/) {}
  void gate_up(std::int64_t /*layer*/) {}
  void down(std::int64_t layer) {
    if (layer + 1 == config_.n_layer()) position_ += static_cast<std::int64_t>(x_.size());
  }
  void lm_head(std::span<const std::int64_t> rows) {
    logits_.clear();
    for (const std::int64_t row : rows) {
      for (std::int64_t i = 0; i < kVocab; ++i) {
        logits_.push_back(
            static_cast<float>(mix(x_[static_cast<std::size_t>(row)], static_cast<std::uint64_t>(i)) % 65536));
      }
    }
  }
  void copy_logits(std::int64_t row, std::span<float> out) const {
    std::copy_n(logits_.begin() + row * kVocab, out.size(), out.begin());
  }
  void set_logits(std::span<const float> logits) { logits_.assign(logits.begin(), logits.end()); }
  void reset() {
    bytes_.clear();
    for (const bool sliding : options_.is_sliding) {
      const std::int64_t n_row =
          sliding ? n_slot() : (options_.context + options_.record - 1) / options_.record * options_.record;
      bytes_.emplace_back(static_cast<std::size_t>(options_.n_head * n_row) * kRowBytes);
    }
    poison();
    position_ = 0;
  }
  [[nodiscard]] NvtxRange range(const char* name) const { return NvtxRange(name); }

  [[nodiscard]] std::vector<StoredLayer> stored_layers() {
    std::vector<StoredLayer> layers;
    for (std::size_t layer = 0; layer < bytes_.size(); ++layer) {
      const bool sliding = config_.sliding_layer(static_cast<std::int64_t>(layer));
      const std::int64_t record = sliding ? 1 : options_.record;
      layers.push_back({.is_ring = sliding,
                        .parts = {{.name = options_.part,
                                   .data = bytes_[layer].data(),
                                   .n_head = options_.n_head,
                                   .n_row = n_row(layer) / record,
                                   .row_bytes = record * static_cast<std::int64_t>(kRowBytes),
                                   .row_tokens = record}},
                        .tail = sliding ? 0 : options_.tail,
                        .tile = sliding ? 1 : options_.tile});
    }
    return layers;
  }
  static void copy_stored(const std::byte* from, std::span<std::byte> to) { std::copy_n(from, to.size(), to.data()); }
  static void set_stored(std::byte* to, std::span<const std::byte> from) { std::ranges::copy(from, to); }
  void set_position(std::int64_t position, std::int64_t /*farthest*/) { position_ = position; }

  /// Garbage wherever nothing may look: beyond the tokens, and in slots that no token to come sees.
  void poison() {
    for (std::size_t layer = 0; layer < bytes_.size(); ++layer) {
      for (std::int64_t p = position_;
           config_.sliding_layer(static_cast<std::int64_t>(layer)) ? false : p < options_.context; ++p) {
        for (std::int64_t h = 0; h < options_.n_head; ++h) put(layer, h, p, 0xABABABABABABABABu);
      }
    }
  }
  /// Tokens that went through since the beginning.
  [[nodiscard]] std::int64_t n_token() const { return n_token_; }

 private:
  static constexpr std::size_t kRowBytes = sizeof(std::uint64_t);

  [[nodiscard]] static std::uint64_t mix(std::uint64_t state, std::uint64_t value) {
    state = (state ^ value) * 0xD1342543DE82EF95u + 1;
    return state ^ state >> 31;
  }
  [[nodiscard]] std::int64_t n_slot() const { return options_.window + options_.spare; }
  [[nodiscard]] std::int64_t n_row(std::size_t layer) const {
    return static_cast<std::int64_t>(bytes_[layer].size() / kRowBytes) / options_.n_head;
  }
  [[nodiscard]] std::byte* at(std::size_t layer, std::int64_t head, std::int64_t position) {
    const bool sliding = config_.sliding_layer(static_cast<std::int64_t>(layer));
    const std::int64_t row = sliding ? ring_slot(position, n_slot()) : position;
    return bytes_[layer].data() + static_cast<std::size_t>(head * n_row(layer) + row) * kRowBytes;
  }
  [[nodiscard]] std::uint64_t get(std::size_t layer, std::int64_t head, std::int64_t position) {
    std::uint64_t value = 0;
    std::memcpy(&value, at(layer, head, position), kRowBytes);
    return value;
  }
  void put(std::size_t layer, std::int64_t head, std::int64_t position, std::uint64_t value) {
    std::memcpy(at(layer, head, position), &value, kRowBytes);
  }
  void quantise(std::size_t layer, std::int64_t position) {
    for (std::int64_t h = 0; h < options_.n_head; ++h) put(layer, h, position, get(layer, h, position) | 0xFF);
  }

  void attend(std::int64_t index, std::int64_t position, std::uint64_t& x) {
    const auto layer = static_cast<std::size_t>(index);
    const bool sliding = config_.sliding_layer(index);
    for (std::int64_t h = 0; h < options_.n_head; ++h) put(layer, h, position, mix(x, static_cast<std::uint64_t>(h)));
    if (!sliding && options_.tail > 0 && position >= options_.tail) quantise(layer, position - options_.tail);
    if (!sliding && options_.tile > 1 && (position + 1) % options_.tile == 0) {
      for (std::int64_t p = position + 1 - options_.tile; p <= position; ++p) quantise(layer, p);
    }
    const std::int64_t first = sliding ? std::max<std::int64_t>(0, position + 1 - options_.window) : 0;
    for (std::int64_t h = 0; h < options_.n_head; ++h) {
      for (std::int64_t p = first; p <= position; ++p) x = mix(x, get(layer, h, p));
    }
  }

  ToyOptions options_;
  ModelConfig config_;
  std::vector<std::vector<std::byte>> bytes_;  ///< of each layer [n_head, n_row]
  std::int64_t position_ = 0, n_token_ = 0;
  std::vector<std::uint64_t> x_;
  std::vector<float> logits_;
};
static_assert(StoringBackend<ToyCache>);

}  // namespace gemma4::testkit
