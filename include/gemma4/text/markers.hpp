// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <string_view>

/// What is structure in a text of Gemma 4, by its spelling. A file types these tokens control, user-defined or normal,
/// as its converter pleases; what they are does not depend on it.
namespace gemma4 {

/// Of the chat template. Source: the published chat template of gemma-4-31B-it, 2026-07-09.
inline constexpr std::array<std::string_view, 15> kChatMarkers = {
    "<|turn>",          "<turn|>", "<|channel>",   "<channel|>",   "<|think|>",
    "<|tool>",          "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", "<|\"|>",  "<|image|>",    "<|audio|>",    "<|video|>"};

/// Of the beginning and the end of a text, and of what stands for no text.
inline constexpr std::array<std::string_view, 5> kTextMarkers = {"<bos>", "<eos>", "<pad>", "<unk>", "<mask>"};

[[nodiscard]] inline bool is_marker_text(std::string_view text) {
  return text.starts_with('<') && (std::ranges::find(kChatMarkers, text) != kChatMarkers.end() ||
                                   std::ranges::find(kTextMarkers, text) != kTextMarkers.end());
}

/// `<|NAME>`, `<NAME|>` or `<|NAME|>` with a name of letters, digits, `_`, `-` or `"`: how the family spells markers,
/// also those that are not listed here, such as `<image|>`.
[[nodiscard]] inline bool has_marker_form(std::string_view text) {
  if (text.size() < 4 || !text.starts_with('<') || !text.ends_with('>')) return false;
  text = text.substr(1, text.size() - 2);
  const bool opens = text.starts_with('|'), closes = text.ends_with('|');
  if (opens) text.remove_prefix(1);
  if (closes && !text.empty()) text.remove_suffix(1);
  const auto is_name = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '"';
  };
  return (opens || closes) && !text.empty() && std::ranges::all_of(text, is_name);
}

}  // namespace gemma4
