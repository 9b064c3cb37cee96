// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/id_file.hpp"

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

class IdFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "id_file_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  [[nodiscard]] std::filesystem::path write(const std::string& name, const std::vector<unsigned char>& bytes) const {
    std::ofstream(folder_ / name, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return folder_ / name;
  }
  static std::string refusal(const std::filesystem::path& path, std::int64_t vocab, std::int64_t max_count = -1) {
    try {
      (void)gemma4::read_ids(path, vocab, max_count);
    } catch (const gemma4::FormatError& error) {
      return error.what();
    }
    return "";
  }

  std::filesystem::path folder_;
};

TEST_F(IdFile, ReadsBothWidthsLittleEndian) {
  using Ids = std::vector<std::int32_t>;
  const auto narrow = write("a.u16", {2, 0, 0x30, 0x01, 0xFF, 0x0F});
  EXPECT_EQ(gemma4::read_ids(narrow, 4096), (Ids{2, 0x130, 4095}));
  EXPECT_EQ(gemma4::read_ids(narrow, 4096, 2), (Ids{2, 0x130}));
  const auto wide = write("a.i32", {2, 0, 0, 0, 0xFF, 0xFF, 3, 0});
  EXPECT_EQ(gemma4::read_ids(wide, 262144), (Ids{2, 262143}));
}

TEST_F(IdFile, RefusesWithWhatWasFoundAndExpected) {
  const auto contains = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
  };
  contains(refusal(write("odd.u16", {1, 2, 3}), 4096), "3 bytes, expected a multiple of 2");
  contains(refusal(write("odd.i32", {1, 2, 3, 4, 5, 6}), 4096), "6 bytes, expected a multiple of 4");
  contains(refusal(write("empty.u16", {}), 4096), "no ids");
  contains(refusal(write("a.txt", {1, 0}), 4096), "'.txt'");
  contains(refusal(folder_ / "missing.u16", 4096), "missing.u16");
  contains(refusal(write("a.u16", {1, 0, 0, 16}), 4096), "id 4096 at index 1 is outside the vocabulary [0, 4096)");
  contains(refusal(write("a.i32", {0xFF, 0xFF, 0xFF, 0xFF}), 4096), "id -1 at index 0");
  contains(refusal(write("short.u16", {1, 0}), 4096, 2), "1 ids, need 2");
}

}  // namespace
