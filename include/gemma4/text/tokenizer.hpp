// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/text/vocabulary.hpp"

namespace gemma4 {

/// Bytes [begin, end) of a text.
struct TextRange {
  std::size_t begin = 0;
  std::size_t end = 0;
};

struct EncodeOptions {
  std::optional<bool> add_bos;            ///< begin of sequence first; unset: as the vocabulary says
  bool parse_special = false;             ///< the text of a control token, such as `<|turn>`, becomes that token
  std::span<const TextRange> plain = {};  ///< ascending; here no marker is a token, not even a user-defined one
};

struct DecodeOptions {
  bool skip_control = false;  ///< control tokens, and ends of whatever type, give nothing instead of their text
};

namespace detail {

/// Bytes of the UTF-8 code point that `text` starts with; 1 where it starts with none.
[[nodiscard]] inline std::size_t code_point_bytes(std::string_view text) {
  const auto lead = static_cast<std::uint8_t>(text.front());
  const std::size_t bytes = lead >= 0xF0 && lead < 0xF8   ? 4
                            : lead >= 0xE0 && lead < 0xF0 ? 3
                            : lead >= 0xC0 && lead < 0xE0 ? 2
                                                          : 1;
  if (bytes > text.size()) return 1;
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((static_cast<std::uint8_t>(text[i]) & 0xC0) != 0x80) return 1;
  }
  return bytes;
}

/// Merges the symbols of one piece of text, always the pair of the best rank, the leftmost among equals.
/// A doubly linked list of symbols and a heap of pairs: O(n log n) for n symbols. A heap entry whose pair has changed
/// since is recognised by its ids and dropped. Memory is kept from piece to piece.
class PieceMerger {
 public:
  explicit PieceMerger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  /// Appends the tokens of `piece`.
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) {
    split(piece);
    for (std::int64_t left = 0; left + 1 < count(); ++left) push(left);
    while (!heap_.empty()) {
      const Pair pair = heap_.top();
      heap_.pop();
      apply(pair);
    }
    for (std::int64_t at = symbols_.empty() ? kNone : 0; at != kNone; at = symbol(at).next) emit(symbol(at), ids);
  }

 private:
  static constexpr std::int64_t kNone = -1;
  static constexpr std::int32_t kNoToken = -1;  // a code point outside the vocabulary
  static constexpr std::int32_t kMerged = -2;   // swallowed by its left neighbour

  struct Symbol {
    std::string_view text;
    std::int32_t id;
    std::int64_t previous, next;
  };
  struct Pair {
    std::int32_t rank, left_id, right_id, result;
    std::int64_t left;
    bool operator<(const Pair& other) const { return std::tie(other.rank, other.left) < std::tie(rank, left); }
  };

  [[nodiscard]] Symbol& symbol(std::int64_t index) { return symbols_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(symbols_.size()); }

  void split(std::string_view piece) {
    symbols_.clear();
    while (!piece.empty()) {
      const std::string_view text = piece.substr(0, code_point_bytes(piece));
      symbols_.push_back({text, vocabulary_.mergeable(text), count() - 1, count() + 1});
      piece.remove_prefix(text.size());
    }
    if (!symbols_.empty()) symbols_.back().next = kNone;
  }

  void push(std::int64_t left) {
    if (left == kNone || symbol(left).next == kNone) return;
    const std::int32_t left_id = symbol(left).id, right_id = symbol(symbol(left).next).id;
    if (left_id == kNoToken || right_id == kNoToken) return;
    const Vocabulary::Merge* const merge = vocabulary_.merge(left_id, right_id);
    if (merge != nullptr) heap_.push({merge->rank, left_id, right_id, merge->result, left});
  }

  void apply(const Pair& pair) {
    Symbol& left = symbol(pair.left);
    if (left.id != pair.left_id || left.next == kNone || symbol(left.next).id != pair.right_id) return;
    Symbol& right = symbol(left.next);
    left.id = pair.result;
    left.text = {left.text.data(), left.text.size() + right.text.size()};
    left.next = right.next;
    right.id = kMerged;
    if (left.next != kNone) symbol(left.next).previous = pair.left;
    push(left.previous);
    push(pair.left);
  }

  void emit(const Symbol& symbol, std::vector<std::int32_t>& ids) const {
    if (symbol.id != kNoToken) {
      ids.push_back(symbol.id);
      return;
    }
    for (const char byte : symbol.text) ids.push_back(vocabulary_.byte_token(static_cast<std::uint8_t>(byte)));
  }

  const Vocabulary& vocabulary_;
  std::vector<Symbol> symbols_;
  std::priority_queue<Pair> heap_;
};

}  // namespace detail

/// Text to token ids and back, for vocabularies of the `gemma4` kind: byte pair encoding of UTF-8 code points.
///
/// encode(text):
///   1. User-defined tokens (and control tokens where the caller parses them) are matched whole: the longest at the
///      earliest place. What lies between is plain text. No marker begins where the caller says that the text is plain.
///   2. In plain text each space becomes U+2581. The text is cut where newlines begin and end; nowhere else.
///   3. A run of newlines that is a token stays whole. In every other piece neighbours are merged by rank, starting
///      from single code points.
///   4. A code point without a token gives one byte token for each of its bytes; so does each byte that is no UTF-8.
/// Plain text never becomes a control token.
///
/// decode(encode(text)) is `text`, byte for byte, except that U+2581 in it comes back as a space.
///
/// Source: the GGUF metadata of Gemma 4 models; public descriptions of the `gemma4` tokenizer model; held to ids that
/// two other implementations gave (tests/data/tokenizer). Move-only.
class Tokenizer {
 public:
  /// @throws FormatError naming what is wrong with the vocabulary
  explicit Tokenizer(const GgufFile& file) : Tokenizer(vocabulary_data(file)) {}
  explicit Tokenizer(VocabularyData data) : vocabulary_(std::move(data)) {}

  [[nodiscard]] const Vocabulary& vocabulary() const { return vocabulary_; }

  /// Whether an answer ends at this token: it is one of end_tokens().
  [[nodiscard]] bool is_end(std::int32_t id) const { return vocabulary_.is_end(id); }

  /// @throws std::invalid_argument when a begin-of-sequence token is asked for and the vocabulary has none
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const {
    std::vector<std::int32_t> ids;
    if (options.add_bos.value_or(vocabulary_.add_bos())) {
      require(vocabulary_.bos_id() >= 0, "tokenizer: add_bos, but the vocabulary has no begin-of-sequence token");
      ids.push_back(static_cast<std::int32_t>(vocabulary_.bos_id()));
    }
    detail::PieceMerger merger(vocabulary_);
    bool space_prefix = vocabulary_.add_space_prefix();
    std::size_t plain_begin = 0, at = 0, range = 0;
    const auto which = [&] {  // what is matched whole at `at`
      while (range < options.plain.size() && options.plain[range].end <= at) ++range;
      if (range < options.plain.size() && options.plain[range].begin <= at) return WholeTokens::kNoMarkers;
      return options.parse_special ? WholeTokens::kMarkers : WholeTokens::kUserDefined;
    };
    const auto flush = [&] {
      if (at == plain_begin) return;
      encode_plain(text.substr(plain_begin, at - plain_begin), std::exchange(space_prefix, false), merger, ids);
    };
    while (at < text.size()) {
      const Vocabulary::Match match = vocabulary_.whole_match(text.substr(at), which());
      if (match.id < 0) {
        ++at;
        continue;
      }
      flush();
      ids.push_back(match.id);
      if (!vocabulary_.is_control(match.id)) space_prefix = false;
      plain_begin = at += match.bytes;
    }
    flush();
    return ids;
  }

  /// The bytes of the tokens, one after another; not always valid UTF-8 when the ids do not come from encode().
  /// @throws std::invalid_argument naming the first id outside the vocabulary and its place
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids, const DecodeOptions& options = {}) const {
    std::string text;
    bool space_prefix = vocabulary_.add_space_prefix();
    for (std::size_t place = 0; place < ids.size(); ++place) {
      const std::int32_t id = ids[place];
      require(id >= 0 && id < vocabulary_.size(), "tokenizer: id ", id, " at place ", place, ", the vocabulary has ",
              vocabulary_.size(), " tokens");
      std::string piece = decode_piece(id, options);
      if (space_prefix && !vocabulary_.is_control(id)) {
        if (vocabulary_.type(id) != TokenType::kUserDefined && piece.starts_with(' ')) piece.erase(0, 1);
        space_prefix = false;
      }
      text += piece;
    }
    return text;
  }

  /// The bytes of one token, as they go into a stream: a byte token may be a part of a character.
  /// @throws std::invalid_argument when the id is outside the vocabulary
  [[nodiscard]] std::string decode_piece(std::int32_t id, const DecodeOptions& options = {}) const {
    require(id >= 0 && id < vocabulary_.size(), "tokenizer: id ", id, ", the vocabulary has ", vocabulary_.size(),
            " tokens");
    if (options.skip_control && vocabulary_.is_end(id)) return "";
    if (vocabulary_.type(id) == TokenType::kByte) return {static_cast<char>(vocabulary_.byte_of(id))};
    if (vocabulary_.is_control(id)) return std::string(options.skip_control ? "" : vocabulary_.text(id));
    return replaced(vocabulary_.text(id), kSpaceMark, " ");
  }

 private:
  [[nodiscard]] static std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
    std::string result;
    result.reserve(text.size());
    for (std::size_t at = text.find(from); at != std::string_view::npos; at = text.find(from)) {
      result.append(text.substr(0, at)).append(to);
      text.remove_prefix(at + from.size());
    }
    return result.append(text);
  }

  void encode_plain(std::string_view plain, bool space_prefix, detail::PieceMerger& merger,
                    std::vector<std::int32_t>& ids) const {
    const std::string marked = (space_prefix ? std::string(kSpaceMark) : "") + replaced(plain, " ", kSpaceMark);
    std::string_view rest = marked;
    while (!rest.empty()) {
      const bool newlines = rest.front() == '\n';
      const std::size_t end = newlines ? rest.find_first_not_of('\n') : rest.find('\n');
      const std::string_view piece = rest.substr(0, end);
      rest.remove_prefix(piece.size());
      const std::int32_t whole = newlines ? vocabulary_.mergeable(piece) : -1;
      if (whole >= 0) {
        ids.push_back(whole);
      } else {
        merger.encode(piece, ids);
      }
    }
  }

  Vocabulary vocabulary_;
};

}  // namespace gemma4
