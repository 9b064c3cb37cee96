// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iterator>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/session/block_hash.hpp"
#include "gemma4/session/block_pipe.hpp"
#include "gemma4/session/session_info.hpp"

/// Writes a session file (gemma4/session/session_info.hpp).
namespace gemma4 {

/// A tensor of a session, and how its bytes come: read(offset, room) fills `room`, or they lie in `host`.
struct SessionTensor {
  std::string name;
  TensorType type = TensorType::kI8;
  std::vector<std::int64_t> dims;
  std::function<void(std::size_t, std::span<std::byte>)> read = {};  ///< called on the thread of whoever saves
  std::span<const std::byte> host = {};

  [[nodiscard]] std::size_t bytes() const {
    auto count = static_cast<std::size_t>(block_bytes(type));
    for (const std::int64_t dim : dims) count *= static_cast<std::size_t>(dim);
    return count;
  }
};

/// Numbers of the host as a tensor; they outlive it.
template <class T>
[[nodiscard]] SessionTensor session_tensor(std::string name, const std::vector<T>& values) {
  return {.name = std::move(name),
          .type = *plain_tensor_type<T>(),
          .dims = {static_cast<std::int64_t>(values.size())},
          .host = std::as_bytes(std::span(values))};
}

namespace detail {

/// Fills, hashes and writes the tensors.
class BlockWriting final : public BlockSides {
 public:
  BlockWriting(GgufWriter& writer, std::span<const SessionTensor> tensors, std::span<const SessionBlock> blocks)
      : writer_(writer), tensors_(tensors), blocks_(blocks), hashes_(1 + blocks.size()) {
    hashes_[0] = block_hash(std::as_bytes(std::span(writer.header())), 0);
  }

  void turn(std::size_t index, std::span<std::byte> room) override {
    const SessionBlock& block = blocks_[index];
    const SessionTensor& tensor = tensors_[block.tensor];
    if (tensor.host.empty()) tensor.read(block.offset, room.first(block.bytes));
  }
  void work(std::size_t index, std::span<std::byte> room) override {
    const SessionBlock& block = blocks_[index];
    const std::span<const std::byte> host = tensors_[block.tensor].host;
    const std::span<const std::byte> bytes =
        host.empty() ? room.first(block.bytes) : host.subspan(block.offset, block.bytes);
    hashes_[1 + index] = block_hash(bytes, 1 + index);
    writer_.write_at(block.tensor, block.offset, bytes);
  }
  /// That of the header, and those of the blocks behind it.
  [[nodiscard]] const std::vector<std::uint64_t>& hashes() const { return hashes_; }

 private:
  GgufWriter& writer_;
  std::span<const SessionTensor> tensors_;
  std::span<const SessionBlock> blocks_;
  std::vector<std::uint64_t> hashes_;
};

/// @return the checksums, behind that of the header
[[nodiscard]] inline std::vector<std::uint64_t> write_blocks(GgufWriter& writer, std::span<const SessionTensor> tensors,
                                                             std::span<const SessionBlock> blocks, int n_thread) {
  BlockWriting writing(writer, tensors, blocks);
  pipe_blocks(blocks.size(), PipeFirst::kCaller, n_thread, writing);
  return writing.hashes();
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
  writer.set("session.checkpoint_interval", info.checkpoint_policy.interval);
  if (info.checkpoint_policy.near_interval != 0 || info.checkpoint_policy.near_tokens != 0) {
    writer.set("session.checkpoint_near_interval", info.checkpoint_policy.near_interval);
    writer.set("session.checkpoint_near_tokens", info.checkpoint_policy.near_tokens);
  }
  writer.set_array("session.checkpoints", info.checkpoints);
  writer.set("session.sampler.temperature", info.sampler.temperature);
  writer.set("session.sampler.top_k", info.sampler.top_k);
  writer.set("session.sampler.top_p", info.sampler.top_p);
  writer.set("session.sampler.seed", info.sampler.seed);
  writer.set("session.note", info.note);
}

}  // namespace detail

/// Writes the file beside `path` and moves it there in one step: an old one stays until then, and after an error for
/// good. Room for all of it is asked of the disk first. Holds a few blocks at a time.
/// @param tensors those of the caches and checkpoints, in order; empty ones are left out
/// @param n_thread that hash and write while the next blocks are filled; none given: as n_pipe_thread() has it
/// @throws std::system_error naming the path when the system refuses, as where the disk is full
inline void write_session(const std::filesystem::path& path, const SessionInfo& info,
                          std::vector<SessionTensor> tensors, std::optional<int> n_thread = {}) {
  std::vector<SessionTensor> all;
  all.push_back(session_tensor("tokens", info.tokens));
  all.push_back(session_tensor("passes", info.passes));
  all.push_back(session_tensor("logits", info.logits));
  std::ranges::move(tensors, std::back_inserter(all));
  std::erase_if(all, [](const SessionTensor& tensor) { return tensor.bytes() == 0; });

  GgufWriter writer(path);
  detail::set_session_keys(writer, info);
  std::vector<std::size_t> bytes;
  for (const SessionTensor& tensor : all) {
    writer.add_tensor(tensor.name, tensor.type, tensor.dims);
    bytes.push_back(tensor.bytes());
  }
  const std::vector<SessionBlock> blocks = session_blocks(bytes);
  writer.add_tensor(kChecksumsTensor, TensorType::kI64, {static_cast<std::int64_t>(1 + blocks.size())});
  writer.place();
  const int n = n_thread.value_or(n_pipe_thread(std::reduce(bytes.begin(), bytes.end())));
  const std::vector<std::uint64_t> hashes = detail::write_blocks(writer, all, blocks, n);
  writer.write_at(all.size(), 0, std::as_bytes(std::span(hashes)));
  writer.finish();
}

}  // namespace gemma4
