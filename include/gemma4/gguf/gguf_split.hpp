// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/gguf/gguf_cursor.hpp"
#include "gemma4/gguf/gguf_value.hpp"

/// A model split over files: NAME-00001-of-0000N.gguf and so on, as llama.cpp's gguf-split writes them. The first part
/// holds the model's metadata, every part its tensors and its place:
///   split.no             from 0
///   split.count          of the parts
///   split.tensors.count  over all parts
namespace gemma4 {

inline constexpr std::string_view kSplitNoKey = "split.no";
inline constexpr std::string_view kSplitCountKey = "split.count";
inline constexpr std::string_view kSplitTensorsKey = "split.tensors.count";
inline constexpr std::int64_t kMaxSplitCount = 99999;  ///< what five digits can number

/// Which part of how many; in names and messages parts are counted from 1, here from 0 as in the key.
struct SplitPlace {
  std::int64_t no = 0;
  std::int64_t count = 1;
  bool operator==(const SplitPlace&) const = default;

  /// Such as "part 2 of 5".
  [[nodiscard]] std::string text() const { return concat("part ", no + 1, " of ", count); }
};

/// The name of a part that begins with `prefix`, which may hold folders.
/// @throws std::invalid_argument when there is no such part, or more parts than five digits number
[[nodiscard]] inline std::string split_name(const std::string& prefix, const SplitPlace& place) {
  require(place.count >= 1 && place.count <= kMaxSplitCount && place.no >= 0 && place.no < place.count,
          "split file: ", place.text(), ", expected a part of at most ", kMaxSplitCount);
  const auto digits = [](std::int64_t number) {
    const std::string text = std::to_string(number);
    return std::string(5 - text.size(), '0') + text;
  };
  return concat(prefix, "-", digits(place.no + 1), "-of-", digits(place.count), ".gguf");
}

/// What a name says: its prefix, and the place behind it; nothing when it is not the name of a part.
[[nodiscard]] inline std::optional<std::pair<std::string, SplitPlace>> parse_split_name(const std::string& name) {
  constexpr std::string_view kPattern = "-00000-of-00000.gguf";
  if (name.size() <= kPattern.size()) return std::nullopt;
  const std::string_view tail = std::string_view(name).substr(name.size() - kPattern.size());
  std::int64_t numbers[2] = {0, 0};
  int which = -1;
  for (std::size_t i = 0; i < kPattern.size(); ++i) {
    if (kPattern[i] != '0') {
      if (tail[i] != kPattern[i]) return std::nullopt;
      continue;
    }
    if (tail[i] < '0' || tail[i] > '9') return std::nullopt;
    if (kPattern[i - 1] != '0') ++which;
    numbers[which] = 10 * numbers[which] + (tail[i] - '0');
  }
  if (numbers[0] < 1 || numbers[0] > numbers[1]) return std::nullopt;
  return std::pair(name.substr(0, name.size() - kPattern.size()), SplitPlace{numbers[0] - 1, numbers[1]});
}

namespace detail {

/// The place that a file's keys give it; nothing when it is not split.
/// @throws FormatError when one of the two keys is missing or there is no such part
template <class TFile>
[[nodiscard]] std::optional<SplitPlace> split_place(const TFile& file) {
  if (!file.has(kSplitCountKey) && !file.has(kSplitNoKey)) return std::nullopt;
  const SplitPlace place{file.template get<std::int64_t>(kSplitNoKey), file.template get<std::int64_t>(kSplitCountKey)};
  const std::string name = file.path().string();
  require_format(place.count >= 1 && place.count <= kMaxSplitCount, name, ": ", kSplitCountKey, " is ", place.count,
                 ", expected 1 to ", kMaxSplitCount);
  require_format(place.no >= 0 && place.no < place.count, name, ": ", kSplitNoKey, " is ", place.no, ", expected 0 to ",
                 kSplitCountKey, " - 1 = ", place.count - 1);
  return place;
}

/// Refuses a part that is opened by itself, or by a name that says another place than its keys.
/// @return what the names of all parts begin with
[[nodiscard]] inline std::string require_first_part(const std::string& name, const SplitPlace& place) {
  const auto parsed = parse_split_name(name);
  require_format(!parsed || parsed->second == place, name, ": is named ", parsed ? parsed->second.text() : "",
                 ", but its keys say that it is ", place.text(), "; were parts swapped or renamed?");
  require_format(place.no == 0, name, ": is ", place.text(), ": name the first",
                 parsed ? concat(", '", split_name(parsed->first, {0, place.count}), "'") : "");
  require_format(parsed.has_value(), name, ": is ", place.text(), ", but is not named '", split_name("NAME", place),
                 "', by which the others are found");
  return parsed->first;
}

/// The name of another part than the first, which must be there.
[[nodiscard]] inline std::filesystem::path find_part(const std::string& prefix, const SplitPlace& place) {
  const std::filesystem::path name = split_name(prefix, place);
  require_format(std::filesystem::exists(name), split_name(prefix, {0, place.count}), ": ", place.text(),
                 " is missing, there is no '", name.string(), "'");
  return name;
}

/// Refuses parts that are not, one after another, the parts of one model.
template <class TFile>
void require_parts(const std::vector<TFile>& parts) {
  const std::string first = parts.front().path().string();
  const auto count = static_cast<std::int64_t>(parts.size());
  std::map<std::string_view, std::size_t> seen;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const TFile& part = parts[i];
    const SplitPlace expected{static_cast<std::int64_t>(i), count};
    const std::optional<SplitPlace> found = split_place(part);
    const std::string name = part.path().string();
    require_format(found.has_value(), name, ": expected ", expected.text(), ", found a file without the key ",
                   kSplitNoKey);
    require_format(*found == expected, name, ": expected ", expected.text(), ", its keys say ", found->text(),
                   "; were parts swapped or renamed?");
    for (const auto& [key, value] : part.values()) {
      if (i == 0 || key == kSplitNoKey || key == kGgufAlignmentKey || !parts.front().has(key)) continue;
      const GgufValue& other = parts.front().value(key);
      require_format(value.type == other.type && std::ranges::equal(value.bytes, other.bytes), name, ": key '",
                     printable(key), "' differs from that of '", first, "'; are the parts of one model?");
    }
    for (const GgufTensor& tensor : part.tensors()) {
      const auto [place, is_new] = seen.emplace(tensor.name, i);
      require_format(is_new, name, ": tensor '", printable(tensor.name), "' is in part ", place->second + 1,
                     " and in part ", i + 1);
    }
  }
  if (!parts.front().has(kSplitTensorsKey)) return;
  const auto promised = parts.front().template get<std::int64_t>(kSplitTensorsKey);
  require_format(promised == static_cast<std::int64_t>(seen.size()), first, ": ", kSplitTensorsKey, " is ", promised,
                 ", the ", count, count == 1 ? " part holds " : " parts hold ", seen.size());
}

}  // namespace detail

}  // namespace gemma4
