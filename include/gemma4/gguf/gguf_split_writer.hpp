// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_split.hpp"
#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/interrupt.hpp"

namespace gemma4 {

namespace detail {

/// How many of the tensors, in order, go into each part of a split file: as many as `max_bytes` hold, at least one.
[[nodiscard]] inline std::vector<std::size_t> split_tensors(const std::vector<ModelTensor>& tensors,
                                                            std::int64_t max_bytes) {
  std::vector<std::size_t> counts(1, 0);
  std::int64_t bytes = 0;
  for (const ModelTensor& tensor : tensors) {
    if (max_bytes > 0 && counts.back() > 0 && bytes + tensor.bytes() > max_bytes) {
      counts.push_back(0);
      bytes = 0;
    }
    bytes += tensor.bytes();
    ++counts.back();
  }
  return counts;
}

}  // namespace detail

/// The files of a model, one or the parts of a split one, as a single writer of its tensors. Nothing is under its name
/// before finish().
class GgufSplitWriter {
 public:
  /// @param max_bytes of tensors in a part, beside `path` and named after it; 0: one file, `path` itself
  /// @param set_keys of the model, on the writer of the first part
  GgufSplitWriter(const std::filesystem::path& path, const std::vector<ModelTensor>& tensors, std::int64_t max_bytes,
                  const std::function<void(GgufWriter&)>& set_keys) {
    const std::vector<std::size_t> counts = detail::split_tensors(tensors, max_bytes);
    const auto n_part = static_cast<std::int64_t>(counts.size());
    require(n_part <= std::numeric_limits<std::uint16_t>::max(), path.string(), ": ", n_part,
            " parts, expected at most 65535; let them be larger");
    std::size_t next = 0;
    for (std::int64_t no = 0; no < n_part; ++no) {
      const SplitPlace place{no, n_part};
      paths_.push_back(max_bytes > 0 ? split_path(path, place) : path);
      GgufWriter& writer = *writers_.emplace_back(std::make_unique<GgufWriter>(paths_.back()));
      if (no == 0) set_keys(writer);
      if (max_bytes > 0) set_split_keys(writer, place, tensors.size());
      for (std::size_t i = 0; i < counts[static_cast<std::size_t>(no)]; ++i, ++next) {
        writer.add_tensor(tensors[next].name, tensors[next].type, tensors[next].dims);
        places_.push_back({static_cast<std::size_t>(no), i});
      }
      writer.place();
    }
  }

  /// As GgufWriter::write_at(), tensors counted over all files.
  void write_at(std::size_t tensor, std::uint64_t offset, std::span<const std::byte> bytes) {
    writers_[places_[tensor].file]->write_at(places_[tensor].index, offset, bytes);
  }

  /// Gives every file its name, the first part last: until then nobody can open the model. When one cannot have it,
  /// none keeps it.
  void finish() {
    const InterruptShield shield;  // all parts get their names, or none
    std::size_t next = writers_.size();
    try {
      for (; next > 0; --next) writers_[next - 1]->finish();
    } catch (...) {
      for (; next < paths_.size(); ++next) {
        std::error_code ignored;
        std::filesystem::remove(paths_[next], ignored);
      }
      throw;
    }
  }
  [[nodiscard]] const std::vector<std::filesystem::path>& paths() const { return paths_; }

 private:
  struct Place {
    std::size_t file, index;
  };

  /// dir/NAME.gguf gives dir/NAME-00001-of-0000N.gguf.
  [[nodiscard]] static std::filesystem::path split_path(const std::filesystem::path& path, const SplitPlace& place) {
    const std::string name = path.string();
    return split_name(name.ends_with(".gguf") ? name.substr(0, name.size() - 5) : name, place);
  }

  static void set_split_keys(GgufWriter& writer, const SplitPlace& place, std::size_t n_tensor) {
    writer.set(kSplitNoKey, static_cast<std::uint16_t>(place.no));
    writer.set(kSplitCountKey, static_cast<std::uint16_t>(place.count));
    writer.set(kSplitTensorsKey, static_cast<std::int32_t>(n_tensor));
  }

  std::vector<std::filesystem::path> paths_;
  std::vector<std::unique_ptr<GgufWriter>> writers_;
  std::vector<Place> places_;  ///< by tensor
};

}  // namespace gemma4
