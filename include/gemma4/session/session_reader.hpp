// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/mapped_file.hpp"
#include "gemma4/session/block_hash.hpp"
#include "gemma4/session/block_pipe.hpp"
#include "gemma4/session/session_info.hpp"

namespace gemma4 {

/// A tensor of a session that is wanted, and where its bytes go: to visit(offset, bytes), block after block on the
/// thread of whoever reads, or straight into `host`, which is as long.
struct SessionTarget {
  const GgufTensor* tensor = nullptr;
  std::function<void(std::size_t, std::span<const std::byte>)> visit = {};
  std::span<std::byte> host = {};
};

/// A session file (gemma4/session/session_info.hpp), mapped. Once it is open its keys, its extents, its padding and
/// what is small in it are checked; blocks of the caches are checked one by one as they are read.
/// Errors: FormatError naming the key or tensor, what was expected and what was found; std::system_error naming the
/// path when it cannot be opened.
class SessionFile {
 public:
  [[nodiscard]] static SessionFile open(const std::filesystem::path& path) {
    MappedFile mapped(path);
    SessionFile file = parse(mapped.bytes(), path.string());
    file.mapped_ = std::move(mapped);
    return file;
  }

  /// A file image in memory, which must outlive the result. `name` is what messages call it.
  [[nodiscard]] static SessionFile parse(std::span<const std::byte> bytes, std::string name) {
    SessionFile file;
    file.name_ = name;
    file.gguf_ = GgufFile::parse(bytes, std::move(name));
    file.require_version();
    file.require_layout(bytes);
    file.read_info();
    return file;
  }

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] const SessionInfo& info() const { return info_; }

  /// A tensor of bytes. @throws FormatError when it is missing or has other extents than `dims`
  [[nodiscard]] const GgufTensor& tensor(std::string_view name, const std::vector<std::int64_t>& dims) const {
    const GgufTensor* const found = gguf_->find_tensor(name);
    require_format(found != nullptr, name_, ": no tensor '", name, "'; a backend with another layout wrote it");
    require_format(found->type == TensorType::kI8 && found->dims == dims, name_, ": tensor '", name, "' is ",
                   type_name(found->type), ' ', extents(found->dims), ", this backend has I8 ", extents(dims));
    return *found;
  }
  [[nodiscard]] bool has_tensor(std::string_view name) const { return gguf_->find_tensor(name) != nullptr; }
  [[nodiscard]] std::size_t n_tensor() const { return gguf_->tensors().size(); }

  /// Reads tensors in the order given; what is visited, or left in a host's memory, was checked. Holds a few blocks at
  /// a time.
  /// @param n_thread that read and check ahead; none given: as n_pipe_thread() has it
  /// @throws FormatError naming the first block that does not have its checksum
  void read(std::span<const SessionTarget> targets, std::optional<int> n_thread = {}) const {
    std::vector<std::size_t> bytes;
    for (const SessionTarget& target : targets) {
      bytes.push_back(target.tensor->data.size());
      require(target.host.empty() || target.host.size() == bytes.back(), name_, ": room of ", target.host.size(),
              " B for tensor '", target.tensor->name, "' of ", bytes.back());
    }
    const std::vector<SessionBlock> blocks = session_blocks(bytes);
    Reading reading(*this, targets, blocks);
    const int n = n_thread.value_or(n_pipe_thread(std::reduce(bytes.begin(), bytes.end())));
    pipe_blocks(blocks.size(), PipeFirst::kThreads, n, reading);
  }

 private:
  /// Blocks of a read(): fetched and checked, then visited.
  class Reading final : public BlockSides {
   public:
    Reading(const SessionFile& file, std::span<const SessionTarget> targets, std::span<const SessionBlock> blocks)
        : file_(file), targets_(targets), blocks_(blocks) {}

    void work(std::size_t index, std::span<std::byte> slot) override {
      const SessionBlock& block = blocks_[index];
      file_.fetch_block(*targets_[block.tensor].tensor, block.offset, room_of(block, slot));
    }
    void turn(std::size_t index, std::span<std::byte> slot) override {
      const SessionBlock& block = blocks_[index];
      if (targets_[block.tensor].visit) targets_[block.tensor].visit(block.offset, room_of(block, slot));
    }

   private:
    [[nodiscard]] std::span<std::byte> room_of(const SessionBlock& block, std::span<std::byte> slot) const {
      const std::span<std::byte> host = targets_[block.tensor].host;
      return host.empty() ? slot.first(block.bytes) : host.subspan(block.offset, block.bytes);
    }

    const SessionFile& file_;
    std::span<const SessionTarget> targets_;
    std::span<const SessionBlock> blocks_;
  };

  SessionFile() = default;

  [[nodiscard]] static std::string extents(const std::vector<std::int64_t>& dims) {
    std::string text;
    for (const std::int64_t dim : dims) text += concat(text.empty() ? "[" : ", ", dim);
    return text + "]";
  }
  [[nodiscard]] std::uint64_t hash(std::size_t index) const { return static_cast<std::uint64_t>(hashes_[index]); }

  /// A block of a tensor, from the file or the image, checked. Any thread may.
  void fetch_block(const GgufTensor& tensor, std::size_t offset, std::span<std::byte> room) const {
    if (mapped_.bytes().empty()) {
      std::ranges::copy(tensor.data.subspan(offset, room.size()), room.begin());
    } else {
      mapped_.read_at(tensor.file_offset + offset, room);
    }
    const std::size_t index = first_hash_.find(tensor.name)->second + offset / kSessionBlock;
    const std::uint64_t found = block_hash(room, index), expected = hash(index);
    require_format(found == expected, name_, ": tensor '", tensor.name, "', bytes ", offset, " to ",
                   offset + room.size(), ": checksum ", detail::hash_text(found), ", the file says ",
                   detail::hash_text(expected), "; it was damaged");
  }

  void require_version() const {
    const auto architecture = gguf_->get<std::string>("general.architecture");
    require_format(architecture == kSessionArchitecture, name_, ": general.architecture is '", architecture,
                   "', expected '", kSessionArchitecture, "': no session");
    const auto version = gguf_->get<std::uint32_t>("session.version");
    require_format(version == kSessionVersion, name_, ": session.version ", version, ", this program reads ",
                   kSessionVersion);
  }

  /// Every byte is a header's, a tensor's or zero, and the header has its checksum.
  void require_layout(std::span<const std::byte> bytes) {
    const std::span<const GgufTensor> tensors = gguf_->tensors();
    require_format(!tensors.empty() && tensors.back().name == kChecksumsTensor, name_, ": the last tensor is not '",
                   kChecksumsTensor, "'");
    const auto hashes = data_as<std::int64_t>(tensors.back());
    hashes_.assign(hashes.begin(), hashes.end());
    std::size_t n_hash = 1;
    std::size_t end = tensors.front().file_offset;
    const std::size_t header = end;
    for (const GgufTensor& tensor : tensors) {
      require_format(tensor.file_offset >= end && tensor.file_offset - end < kGgufDefaultAlignment, name_, ": tensor '",
                     tensor.name, "' begins at byte ", tensor.file_offset, ", expected right after byte ", end);
      require_zero(bytes.subspan(end, tensor.file_offset - end), end);
      end = tensor.file_offset + tensor.data.size();
      if (&tensor == &tensors.back()) break;
      first_hash_.emplace(tensor.name, n_hash);
      n_hash += (tensor.data.size() + kSessionBlock - 1) / kSessionBlock;
    }
    require_zero(bytes.subspan(end), end);
    const std::size_t padded = (end + kGgufDefaultAlignment - 1) / kGgufDefaultAlignment * kGgufDefaultAlignment;
    require_format(bytes.size() == padded, name_, ": ", bytes.size(), " bytes, expected ", padded);
    require_format(hashes_.size() == n_hash, name_, ": ", hashes_.size(), " checksums, expected ", n_hash);
    const std::uint64_t found = block_hash(bytes.first(header), 0);
    require_format(found == hash(0), name_, ": the keys and extents have the checksum ", detail::hash_text(found),
                   ", the file says ", detail::hash_text(hash(0)), "; it was damaged");
  }
  void require_zero(std::span<const std::byte> bytes, std::size_t at) const {
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      require_format(bytes[i] == std::byte{0}, name_, ": byte ", at + i, " between tensors is ",
                     std::to_integer<int>(bytes[i]), ", expected 0");
    }
  }

  void read_info() {
    info_.model_hash = gguf_->get<std::uint64_t>("session.model_hash");
    info_.cache = gguf_->get<std::string>("session.cache");
    info_.cache_seed = gguf_->get<std::uint64_t>("session.cache_seed");
    info_.ring = gguf_->get<std::string>("session.ring");
    info_.ring_seed = gguf_->get<std::uint64_t>("session.ring_seed");
    info_.context = gguf_->get<std::int64_t>("session.context");
    info_.position = gguf_->get<std::int64_t>("session.position");
    info_.ring_first = gguf_->get<std::int64_t>("session.ring_first");
    info_.checkpoint_policy = {.interval = gguf_->get<std::int64_t>("session.checkpoint_interval"),
                               .near_interval = gguf_->get_or<std::int64_t>("session.checkpoint_near_interval", 0),
                               .near_tokens = gguf_->get_or<std::int64_t>("session.checkpoint_near_tokens", 0)};
    info_.checkpoints = gguf_->array<std::int64_t>("session.checkpoints");
    info_.sampler = {.temperature = gguf_->get<float>("session.sampler.temperature"),
                     .top_k = gguf_->get<std::int32_t>("session.sampler.top_k"),
                     .top_p = gguf_->get<float>("session.sampler.top_p"),
                     .seed = gguf_->get<std::uint64_t>("session.sampler.seed")};
    info_.note = gguf_->get<std::string>("session.note");
    info_.tokens = numbers<std::int32_t>("tokens");
    info_.passes = numbers<std::int64_t>("passes");
    info_.logits = numbers<float>("logits");
    require_consistent(name_, info_);
  }

  /// A tensor of numbers, checked; none where it is not there.
  template <class T>
  [[nodiscard]] std::vector<T> numbers(std::string_view name) const {
    const GgufTensor* const found = gguf_->find_tensor(name);
    if (found == nullptr) return {};
    require_format(found->dims.size() == 1, name_, ": tensor '", name, "' has ", found->dims.size(),
                   " dimensions, expected 1");
    std::vector<T> values(data_as<T>(*found).size());
    const SessionTarget target{.tensor = found, .host = std::as_writable_bytes(std::span(values))};
    read(std::span(&target, 1));
    return values;
  }

  std::string name_;
  MappedFile mapped_;
  std::optional<GgufFile> gguf_;
  SessionInfo info_;
  std::vector<std::int64_t> hashes_;                            ///< a copy: the file's may end before, once it is open
  std::map<std::string, std::size_t, std::less<>> first_hash_;  ///< of a tensor's first block among the checksums
};

}  // namespace gemma4
