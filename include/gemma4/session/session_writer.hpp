// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/session/block_hash.hpp"
#include "gemma4/session/session_info.hpp"

/// Writes a session file (gemma4/session/session_info.hpp).
namespace gemma4 {

/// A tensor of a session, and how its bytes come: read(offset, room) fills `room`.
struct SessionTensor {
  std::string name;
  TensorType type = TensorType::kI8;
  std::vector<std::int64_t> dims;
  std::function<void(std::size_t, std::span<std::byte>)> read;

  [[nodiscard]] std::size_t bytes() const {
    auto count = static_cast<std::size_t>(block_bytes(type));
    for (const std::int64_t dim : dims) count *= static_cast<std::size_t>(dim);
    return count;
  }
};

/// Numbers of the host as a tensor; they outlive it.
template <class T>
[[nodiscard]] SessionTensor session_tensor(std::string name, const std::vector<T>& values) {
  return {std::move(name),
          *plain_tensor_type<T>(),
          {static_cast<std::int64_t>(values.size())},
          [bytes = std::as_bytes(std::span(values))](std::size_t offset, std::span<std::byte> room) {
            std::ranges::copy(bytes.subspan(offset, room.size()), room.begin());
          }};
}

namespace detail {

[[nodiscard]] constexpr std::size_t n_session_block(std::size_t bytes) {
  return (bytes + kSessionBlock - 1) / kSessionBlock;
}

inline void set_session_keys(GgufWriter& writer, const SessionInfo& info) {
  writer.set("general.architecture", kSessionArchitecture);
  writer.set("session.version", kSessionVersion);
  writer.set("session.model_hash", info.model_hash);
  writer.set("session.cache", info.cache);
  writer.set("session.cache_seed", info.cache_seed);
  writer.set("session.ring", info.ring);
  writer.set("session.ring_seed", info.ring_seed);
  writer.set("session.context", info.context);
  writer.set("session.position", info.position);
  writer.set("session.ring_first", info.ring_first);
  writer.set("session.checkpoint_interval", info.checkpoint_interval);
  writer.set_array("session.checkpoints", info.checkpoints);
  writer.set("session.sampler.temperature", info.sampler.temperature);
  writer.set("session.sampler.top_k", info.sampler.top_k);
  writer.set("session.sampler.top_p", info.sampler.top_p);
  writer.set("session.sampler.seed", info.sampler.seed);
  writer.set("session.note", info.note);
}

}  // namespace detail

/// Writes the file beside `path` and moves it there in one step: an old one stays until then, and after an error for
/// good. Holds a block at a time.
/// @param tensors those of the caches and checkpoints, in order; empty ones are left out
/// @throws std::system_error naming the path when the system refuses, as where the disk is full
inline void write_session(const std::filesystem::path& path, const SessionInfo& info,
                          std::vector<SessionTensor> tensors) {
  std::vector<SessionTensor> all;
  all.push_back(session_tensor("tokens", info.tokens));
  all.push_back(session_tensor("passes", info.passes));
  all.push_back(session_tensor("logits", info.logits));
  std::ranges::move(tensors, std::back_inserter(all));
  std::erase_if(all, [](const SessionTensor& tensor) { return tensor.bytes() == 0; });

  GgufWriter writer(path);
  detail::set_session_keys(writer, info);
  std::size_t n_hash = 1;
  for (const SessionTensor& tensor : all) {
    writer.add_tensor(tensor.name, tensor.type, tensor.dims);
    n_hash += detail::n_session_block(tensor.bytes());
  }
  writer.add_tensor(kChecksumsTensor, TensorType::kI64, {static_cast<std::int64_t>(n_hash)});
  writer.place();

  std::vector<std::uint64_t> hashes = {block_hash(std::as_bytes(std::span(writer.header())), 0)};
  std::vector<std::byte> block(kSessionBlock);
  for (std::size_t index = 0; index < all.size(); ++index) {
    const std::size_t bytes = all[index].bytes();
    for (std::size_t offset = 0; offset < bytes; offset += kSessionBlock) {
      const auto room = std::span(block).first(std::min(kSessionBlock, bytes - offset));
      all[index].read(offset, room);
      hashes.push_back(block_hash(room, hashes.size()));
      writer.write_at(index, offset, room);
    }
  }
  writer.write_at(all.size(), 0, std::as_bytes(std::span(hashes)));
  writer.finish();
}

}  // namespace gemma4
