// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "gemma4/error.hpp"

/// Files of token ids: a bare run of little-endian numbers, uint16 in `*.u16` and int32 in `*.i32`.
namespace gemma4 {

static_assert(std::endian::native == std::endian::little, "id files are little endian, and are used as read");

namespace detail {

template <class TStored>
[[nodiscard]] std::vector<std::int32_t> read_id_file(const std::filesystem::path& path, std::int64_t vocab,
                                                     std::int64_t max_count) {
  std::error_code error;
  const std::uintmax_t n_byte = std::filesystem::file_size(path, error);
  require_format(!error, path.string(), ": cannot read the id file: ", error.message());
  require_format(n_byte % sizeof(TStored) == 0, path.string(), ": ", n_byte, " bytes, expected a multiple of ",
                 sizeof(TStored));
  const auto n_stored = static_cast<std::int64_t>(n_byte / sizeof(TStored));
  require_format(n_stored > 0, path.string(), ": no ids");
  const std::int64_t count = max_count < 0 ? n_stored : max_count;
  require_format(count <= n_stored, path.string(), ": ", n_stored, " ids, need ", count);
  std::vector<TStored> stored(static_cast<std::size_t>(count));
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(stored.data()), static_cast<std::streamsize>(stored.size() * sizeof(TStored)));
  require_format(file.good(), path.string(), ": cannot read ", stored.size() * sizeof(TStored), " bytes");
  for (std::size_t i = 0; i < stored.size(); ++i) {
    require_format(stored[i] >= 0 && stored[i] < vocab, path.string(), ": id ", stored[i], " at index ", i,
                   " is outside the vocabulary [0, ", vocab, ")");
  }
  return {stored.begin(), stored.end()};
}

}  // namespace detail

/// The first `max_count` ids of the file, all of them when it is negative.
/// @throws FormatError for another suffix, a size that does not divide, too few ids, or an id outside [0, vocab)
[[nodiscard]] inline std::vector<std::int32_t> read_ids(const std::filesystem::path& path, std::int64_t vocab,
                                                        std::int64_t max_count = -1) {
  const std::string suffix = path.extension().string();
  if (suffix == ".u16") return detail::read_id_file<std::uint16_t>(path, vocab, max_count);
  require_format(suffix == ".i32", path.string(), ": id files end in .u16 (uint16) or .i32 (int32), found '", suffix,
                 "'");
  return detail::read_id_file<std::int32_t>(path, vocab, max_count);
}

}  // namespace gemma4
