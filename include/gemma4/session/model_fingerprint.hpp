// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/session/block_hash.hpp"

namespace gemma4 {

/// 64 bits that tell models apart without reading them: the keys of the architecture, and of every tensor, by name, its
/// name, type, extents and a sample of its bytes: kSamples pieces of kSampleBytes, from the first bytes to the last. A
/// model of 20 GB is a few MB of that. A split file has the fingerprint of the whole one.
///
/// A change that no sample meets goes unseen: it is a guard against the wrong file, not against a spoiled one.
[[nodiscard]] inline std::uint64_t model_fingerprint(const GgufFile& file) {
  constexpr std::size_t kSamples = 16, kSampleBytes = 64;
  std::uint64_t hash = 0;
  const auto take = [&](std::span<const std::byte> bytes) { hash = block_hash(bytes, hash); };
  const auto take_text = [&](std::string_view text) { take(std::as_bytes(std::span(text))); };
  const auto take_number = [&](auto number) { take(std::as_bytes(std::span(&number, 1))); };
  const std::string prefix = file.get_or<std::string>("general.architecture", "") + ".";
  for (const auto& [key, value] : file.values()) {
    if (!key.starts_with(prefix)) continue;
    take_text(key);
    take_number(static_cast<std::uint32_t>(value.type));
    take(value.bytes);
  }
  std::vector<const GgufTensor*> tensors;
  for (const GgufTensor& tensor : file.tensors()) tensors.push_back(&tensor);
  std::ranges::sort(tensors, {}, [](const GgufTensor* tensor) -> const std::string& { return tensor->name; });
  for (const GgufTensor* tensor : tensors) {
    take_text(tensor->name);
    take_number(static_cast<std::uint32_t>(tensor->type));
    take(std::as_bytes(std::span(tensor->dims)));
    const std::size_t size = tensor->data.size(), last = size - std::min(size, kSampleBytes);
    for (std::size_t i = 0; i < kSamples; ++i) {
      take(tensor->data.subspan(last / (kSamples - 1) * i + last % (kSamples - 1) * i / (kSamples - 1),
                                std::min(size, kSampleBytes)));
    }
  }
  return hash;
}

}  // namespace gemma4
