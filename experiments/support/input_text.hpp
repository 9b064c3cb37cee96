// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "gemma4/error.hpp"

namespace gemma4::experiment {

/// A file's bytes; of standard input where the path is `-`.
/// @param flag what messages call it, such as --file
/// @throws std::invalid_argument naming the flag and the path
[[nodiscard]] inline std::string read_input(const char* flag, const std::filesystem::path& path) {
  std::ifstream file;
  if (path != "-") file.open(path, std::ios::binary);
  std::istream& stream = path == "-" ? std::cin : file;
  require((path == "-" || !std::filesystem::is_directory(path)) && stream.good(), flag, ' ', path.string(),
          ": cannot be opened");
  std::string text{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  require(!stream.bad(), flag, ' ', path.string(), ": cannot be read");
  return text;
}

}  // namespace gemma4::experiment
