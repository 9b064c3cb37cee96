// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/text/markers.hpp"

namespace gemma4 {

/// What a token is, numbered as in `tokenizer.ggml.token_type`.
enum class TokenType : std::int32_t {
  kNormal = 1,       ///< made by merging
  kUnknown = 2,      ///< stands for nothing here: every byte has a token
  kControl = 3,      ///< structure, such as the begin of a sequence; never made from plain text
  kUserDefined = 4,  ///< matched whole, before anything is merged
  kUnused = 5,
  kByte = 6,  ///< `<0xNN>`, one byte of text that has no other token
};

/// How a vocabulary spells a space: U+2581, lower one eighth block.
inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

/// Tokens that end an answer of the model, by their text: the end of the sequence, of a turn, and of a turn that waits
/// for the answer of a tool. Source: `eos_token_id` in the model's published generation_config.json. A file names one
/// or two of them, and types them as its converter pleases.
inline constexpr std::array<std::string_view, 3> kEndTexts = {"<eos>", "<turn|>", "<|tool_response>"};

/// What of a text is matched whole, before anything is merged.
enum class WholeTokens {
  kUserDefined,  ///< user-defined tokens
  kMarkers,      ///< these, control tokens, and markers.hpp's of whatever type
  kNoMarkers,  ///< user-defined tokens that are no markers: what somebody wrote, in which `<|turn>` is seven characters
};

/// The end of another family's sequences. In this one it is text, an HTML tag; a file that names it is mistaken.
inline constexpr std::string_view kNoEndText = "</s>";

/// A vocabulary as a file stores it. Nothing is checked before Vocabulary is built from it.
struct VocabularyData {
  struct NamedId {
    std::string key;  ///< of `tokenizer.ggml.`, such as eot_token_id
    std::int64_t id = -1;
  };
  std::string source = "vocabulary";  ///< what messages call it, such as a file name
  std::vector<std::string> tokens;    ///< the text of each id
  std::vector<std::int32_t> types;    ///< TokenType of each id
  std::vector<std::string> merges;    ///< "left right", the best first
  std::int64_t bos_id = -1;           ///< begin of sequence; -1: there is none
  std::int64_t eos_id = -1;           ///< end of sequence; -1: there is none
  std::vector<NamedId> ends;          ///< what else ends an answer, as the file has it
  bool add_bos = true;                ///< a text starts with bos_id unless the caller says otherwise
  bool add_space_prefix = false;      ///< a text starts with a space that was not in it
  std::vector<std::string> notes;     ///< where the file was not followed, a line each
};

namespace detail {

/// `model` gemma4; or llama with the pre-tokenizer gemma4, as a peer's converter writes the same lists.
inline void require_tokenizer_model(const GgufFile& file) {
  const auto model = file.get<std::string>("tokenizer.ggml.model");
  const auto pre = file.get_or<std::string>("tokenizer.ggml.pre", "");
  if (model == "gemma4") return;
  require_format(
      model == "llama" && pre == "gemma4", file.path().string(), ": tokenizer.ggml.model is '", printable(model),
      "' with tokenizer.ggml.pre '", printable(pre),
      "', expected 'gemma4', or 'llama' with pre 'gemma4'; convert the model again with a current converter");
  for (const char* list : {"tokens", "token_type", "merges"}) {
    const std::string key = concat("tokenizer.ggml.", list);
    require_format(file.has(key), file.path().string(), ": tokenizer.ggml.model is 'llama' with pre 'gemma4', but ",
                   "the list ", key, " is missing, without which text cannot be cut into tokens");
  }
}

/// The ids under a key that holds one or an array of them; none where there is no such key.
[[nodiscard]] inline std::vector<std::int64_t> ids_of_key(const GgufFile& file, const std::string& key) {
  if (!file.has(key)) return {};
  if (file.is_array(key)) return file.array<std::int64_t>(key);
  return {file.get<std::int64_t>(key)};
}

/// Whatever the file says, a text begins with `<bos>`: the model has never seen one that does not, and published files
/// of the 31B say add_bos_token = false.
inline void read_bos(const GgufFile& file, VocabularyData& data) {
  data.bos_id = file.get_or<std::int64_t>("tokenizer.ggml.bos_token_id", -1);
  const auto by_text = std::ranges::find(data.tokens, "<bos>");
  if (data.bos_id == -1 && by_text != data.tokens.end()) data.bos_id = by_text - data.tokens.begin();
  data.add_bos = true;
  if (!file.get_or<bool>("tokenizer.ggml.add_bos_token", true)) {
    data.notes.push_back(concat(data.source, ": tokenizer.ggml.add_bos_token is false; a text begins with the ",
                                "begin-of-sequence token all the same, which the model needs"));
  }
}

}  // namespace detail

/// The `tokenizer.ggml.*` keys of a file.
/// @throws FormatError naming the kind of a file that is no text model, the key when one is missing or of a wrong type,
///         or when the lists are not those of the `gemma4` tokenizer
[[nodiscard]] inline VocabularyData vocabulary_data(const GgufFile& file) {
  VocabularyData data;
  data.source = file.path().string();
  require_text_model(file);
  detail::require_tokenizer_model(file);
  data.tokens = file.array<std::string>("tokenizer.ggml.tokens");
  data.types = file.array<std::int32_t>("tokenizer.ggml.token_type");
  data.merges = file.array<std::string>("tokenizer.ggml.merges");
  detail::read_bos(file, data);
  data.eos_id = file.get_or<std::int64_t>("tokenizer.ggml.eos_token_id", -1);
  for (const char* key : {"eot_token_id", "eom_token_id", "eos_token_ids"}) {
    for (const std::int64_t id : detail::ids_of_key(file, concat("tokenizer.ggml.", key))) {
      data.ends.push_back({key, id});
    }
  }
  data.add_space_prefix = file.get_or<bool>("tokenizer.ggml.add_space_prefix", false);
  return data;
}

/// Tokens and merges, checked as a whole and indexed. Move-only: the index borrows the tokens' text.
class Vocabulary {
 public:
  struct Merge {
    std::int32_t rank = 0;    ///< lower is applied earlier
    std::int32_t result = 0;  ///< the joined token
  };
  struct Match {
    std::int32_t id = -1;  ///< -1: nothing matched
    std::size_t bytes = 0;
  };

  /// @throws FormatError naming the entry, what was expected and what was found: no tokens, another number of types, an
  /// unknown type, an empty or repeated token, a byte without its token or a malformed byte token, no normal token for
  /// the space mark, a merge that is not two known tokens joined by one space and giving a known token, a repeated
  /// merge, an id outside the vocabulary (of an end too), add_bos without a bos_id
  explicit Vocabulary(VocabularyData data) : data_(std::move(data)) {
    index_tokens();
    check(mergeable(kSpaceMark) >= 0, "tokenizer.ggml.tokens", "a normal token for the space mark U+2581", "none");
    index_merges();
    check_id("tokenizer.ggml.bos_token_id", data_.bos_id);
    check_id("tokenizer.ggml.eos_token_id", data_.eos_id);
    check(!data_.add_bos || data_.bos_id >= 0, "tokenizer.ggml.add_bos_token", "a bos_token_id with it", "none");
    index_ends();
  }
  Vocabulary(const Vocabulary&) = delete;
  Vocabulary& operator=(const Vocabulary&) = delete;
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;
  ~Vocabulary() = default;

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(data_.tokens.size()); }
  [[nodiscard]] std::int64_t bos_id() const { return data_.bos_id; }
  [[nodiscard]] std::int64_t eos_id() const { return data_.eos_id; }
  /// Tokens that end an answer, ascending: those that a key names and those of kEndTexts, of whatever type; never
  /// kNoEndText.
  [[nodiscard]] const std::vector<std::int32_t>& end_ids() const { return end_ids_; }
  [[nodiscard]] bool is_end(std::int32_t id) const { return std::ranges::binary_search(end_ids_, id); }
  /// Where the file was not followed, a line each, for stderr.
  [[nodiscard]] const std::vector<std::string>& notes() const { return data_.notes; }
  [[nodiscard]] bool add_bos() const { return data_.add_bos; }
  [[nodiscard]] bool add_space_prefix() const { return data_.add_space_prefix; }

  /// The token as the vocabulary spells it. `id` must be in range.
  [[nodiscard]] std::string_view text(std::int32_t id) const { return data_.tokens[static_cast<std::size_t>(id)]; }
  [[nodiscard]] TokenType type(std::int32_t id) const {
    return static_cast<TokenType>(data_.types[static_cast<std::size_t>(id)]);
  }
  [[nodiscard]] bool is_control(std::int32_t id) const {
    return type(id) == TokenType::kControl || type(id) == TokenType::kUnknown;
  }

  /// Whether a token is structure: a control token, one of markers.hpp's, of whatever type, or a user-defined one that
  /// is spelled like those.
  [[nodiscard]] bool is_marker(std::int32_t id) const {
    return is_control(id) || is_marker_text(text(id)) ||
           (type(id) == TokenType::kUserDefined && has_marker_form(text(id)));
  }

  /// The token with exactly this text, of any type.
  [[nodiscard]] std::optional<std::int32_t> find(std::string_view text) const {
    const auto found = index_.find(text);
    if (found == index_.end()) return std::nullopt;
    return found->second;
  }

  /// The normal (or unused) token with exactly this text, or -1. Plain text becomes no other by merging.
  [[nodiscard]] std::int32_t mergeable(std::string_view text) const {
    const std::optional<std::int32_t> id = find(text);
    return id && is_mergeable(*id) ? *id : -1;
  }

  [[nodiscard]] std::int32_t byte_token(std::uint8_t byte) const { return byte_tokens_[byte]; }

  /// The byte that a byte token stands for. `id` must be one.
  [[nodiscard]] std::uint8_t byte_of(std::int32_t id) const { return *parse_byte(text(id)); }

  /// What two neighbours become, or nullptr.
  [[nodiscard]] const Merge* merge(std::int32_t left, std::int32_t right) const {
    const auto found = merges_.find(pair_key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
  }

  /// The longest token of the kind `which` that `text` starts with.
  [[nodiscard]] Match whole_match(std::string_view text, WholeTokens which) const {
    if (text.empty()) return {};
    for (const std::size_t bytes : whole_lengths_[static_cast<std::uint8_t>(text.front())]) {
      if (bytes > text.size()) continue;
      const std::optional<std::int32_t> id = find(text.substr(0, bytes));
      if (id && is_whole(*id, which)) return {*id, bytes};
    }
    return {};
  }

 private:
  static constexpr std::size_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

  [[nodiscard]] bool is_whole(std::int32_t id, WholeTokens which) const {
    const bool user_defined = type(id) == TokenType::kUserDefined;
    if (which == WholeTokens::kUserDefined) return user_defined;
    return which == WholeTokens::kMarkers ? user_defined || is_marker(id) : user_defined && !is_marker(id);
  }

  template <class TWhere, class TExpected, class TFound>
  void check(bool holds, const TWhere& where, const TExpected& expected, const TFound& found) const {
    if (!holds) refuse(where, expected, found);
  }

  // For what is checked once a token: a message built for each of half a million merges would take seconds.
  template <class TWhere, class TExpected, class TFound>
  [[noreturn]] void refuse(const TWhere& where, const TExpected& expected, const TFound& found) const {
    throw FormatError(concat(data_.source, ": ", where, ": expected ", expected, ", found ", found));
  }

  [[nodiscard]] static std::string entry(std::string_view key, std::size_t index) {
    return concat("tokenizer.ggml.", key, "[", index, "]");
  }
  [[nodiscard]] static std::string quoted(std::string_view text) { return concat("'", detail::printable(text), "'"); }

  [[nodiscard]] static std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }

  [[nodiscard]] bool is_mergeable(std::int32_t id) const {
    return (type(id) == TokenType::kNormal || type(id) == TokenType::kUnused) && !is_marker_text(text(id));
  }

  /// The value of `<0xNN>` with two upper-case hexadecimal digits.
  [[nodiscard]] static std::optional<std::uint8_t> parse_byte(std::string_view text) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
    const std::size_t high = kDigits.find(text[3]), low = kDigits.find(text[4]);
    if (high == std::string_view::npos || low == std::string_view::npos) return std::nullopt;
    return static_cast<std::uint8_t>(high * 16 + low);
  }

  void index_tokens() {
    const std::size_t count = data_.tokens.size();
    check(count > 0 && count <= kMaxTokens, "tokenizer.ggml.tokens", concat("1 to ", kMaxTokens, " tokens"), count);
    check(data_.types.size() == count, "tokenizer.ggml.token_type", concat(count, " types, one a token"),
          data_.types.size());
    index_.reserve(count);
    byte_tokens_.fill(-1);
    for (std::size_t index = 0; index < count; ++index) index_token(index);
    for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
      check(byte_tokens_[byte] >= 0, "tokenizer.ggml.tokens", concat("a byte token for each byte"),
            concat("none for byte ", byte));
    }
    for (std::vector<std::size_t>& lengths : whole_lengths_) {
      std::sort(lengths.begin(), lengths.end(), std::greater<>());
      lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    }
  }

  void index_token(std::size_t index) {
    const std::string_view text = data_.tokens[index];
    const std::int32_t number = data_.types[index];
    const auto id = static_cast<std::int32_t>(index);
    if (number < 1 || number > 6) refuse(entry("token_type", index), "a type from 1 to 6", number);
    if (text.empty()) refuse(entry("tokens", index), "a text", "an empty one");
    const auto [place, inserted] = index_.emplace(text, id);
    if (!inserted) {
      refuse(entry("tokens", index), "unique tokens", concat(quoted(text), ", which is also id ", place->second));
    }
    if (type(id) == TokenType::kByte) {
      const std::optional<std::uint8_t> byte = parse_byte(text);
      if (!byte) refuse(entry("tokens", index), "a byte token <0x00> to <0xFF>", quoted(text));
      byte_tokens_[*byte] = id;
    }
    if (type(id) == TokenType::kUserDefined || is_marker(id)) {
      whole_lengths_[static_cast<std::uint8_t>(text.front())].push_back(text.size());
    }
  }

  void index_merges() {
    check(data_.merges.size() <= kMaxTokens, "tokenizer.ggml.merges", concat("at most ", kMaxTokens),
          data_.merges.size());
    merges_.reserve(data_.merges.size());
    std::string joined;
    for (std::size_t rank = 0; rank < data_.merges.size(); ++rank) {
      const std::string_view line = data_.merges[rank];
      const std::size_t space = line.find(' ');
      const bool one_space = space != std::string_view::npos && space > 0 && space + 1 < line.size() &&
                             line.find(' ', space + 1) == std::string_view::npos;
      if (!one_space) refuse(entry("merges", rank), "two tokens with one space between", quoted(line));
      const std::string_view left = line.substr(0, space), right = line.substr(space + 1);
      joined.assign(left).append(right);
      const std::int32_t left_id = known(rank, left), right_id = known(rank, right), result = known(rank, joined);
      const Merge merge{.rank = static_cast<std::int32_t>(rank), .result = result};
      const auto [place, inserted] = merges_.emplace(pair_key(left_id, right_id), merge);
      if (!inserted) {
        refuse(entry("merges", rank), "unique merges",
               concat(quoted(line), ", which is also merge ", place->second.rank));
      }
    }
    // A merge that spells a control or byte token would let plain text make one. User-defined text never gets here: it
    // is matched whole before.
    std::erase_if(merges_, [this](const auto& item) { return !is_mergeable(item.second.result); });
    data_.merges = {};
  }

  [[nodiscard]] std::int32_t known(std::size_t rank, std::string_view text) const {
    const std::optional<std::int32_t> id = find(text);
    if (!id) refuse(entry("merges", rank), "tokens of the vocabulary", concat(quoted(text), ", which is none"));
    return *id;
  }

  void check_id(std::string_view key, std::int64_t id) const {
    check(id >= -1 && id < size(), key, concat("an id below ", size()), id);
  }

  void index_ends() {
    const auto add = [&](std::string_view key, std::int64_t id) {
      const std::string name = concat("tokenizer.ggml.", key);
      check(id >= 0 && id < size(), name, concat("an id below ", size()), id);
      const auto token = static_cast<std::int32_t>(id);
      if (text(token) != kNoEndText) return end_ids_.push_back(token);
      data_.notes.push_back(
          concat(data_.source, ": ", name, " names ", kNoEndText, ", which is text to this model and ends nothing"));
    };
    if (data_.eos_id >= 0) add("eos_token_id", data_.eos_id);
    for (const VocabularyData::NamedId& end : data_.ends) add(end.key, end.id);
    for (const std::string_view text : kEndTexts) {
      if (const std::optional<std::int32_t> id = find(text)) end_ids_.push_back(*id);
    }
    std::ranges::sort(end_ids_);
    end_ids_.erase(std::unique(end_ids_.begin(), end_ids_.end()), end_ids_.end());
  }

  VocabularyData data_;
  std::vector<std::int32_t> end_ids_;
  std::unordered_map<std::string_view, std::int32_t> index_;
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::array<std::int32_t, 256> byte_tokens_{};
  std::array<std::vector<std::size_t>, 256> whole_lengths_;  ///< by first byte, descending
};

/// The tokens at which an answer of this model ends, ascending: the union of what the file's keys name and of what
/// kEndTexts spell, whatever type the file gave them. None of them is ever printed.
[[nodiscard]] inline const std::vector<std::int32_t>& end_tokens(const Vocabulary& vocabulary) {
  return vocabulary.end_ids();
}

}  // namespace gemma4
