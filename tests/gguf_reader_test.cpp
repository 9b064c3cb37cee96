// SPDX-License-Identifier: Apache-2.0
#include "gemma4/gguf/gguf_reader.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>
#include <vector>

#include "tests/support/gguf_image.hpp"
#include "tests/support/temp_dir.hpp"

namespace gemma4 {
namespace {

using testkit::GgufImage;
using testkit::TempDir;
using testkit::valid_gguf_image;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

/// What the call's error says; "" when there is none.
template <class TCall>
std::string refusal(const TCall& call) {
  try {
    call();
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

/// A file with one key of the given value bytes, kept alive with its image.
struct OneKey {
  template <class T>
  OneKey(GgufType type, T value) {
    image.put<std::uint32_t>("magic", 0x46554747).put<std::uint32_t>("version", 3);
    image.put<std::uint64_t>("tensor_count", 0).put<std::uint64_t>("key_count", 1).put_string("key", "key");
    image.put("type", static_cast<std::uint32_t>(type)).put("value", value);
  }
  [[nodiscard]] GgufFile file() const { return GgufFile::parse(image.bytes(), "one.gguf"); }
  GgufImage image;
};

TEST(GgufReader, ReadsEveryKindOfValueAsWritten) {
  const GgufImage image = valid_gguf_image();
  const GgufFile file = GgufFile::parse(image.bytes(), "valid.gguf");
  EXPECT_EQ(file.get<std::string>("general.architecture"), "golden");
  EXPECT_EQ(file.get<std::string_view>("general.architecture"), "golden");
  EXPECT_EQ(file.get<int>("depth"), 60);
  EXPECT_EQ(file.get<std::uint8_t>("depth"), 60);
  EXPECT_TRUE(file.get<bool>("flag"));
  EXPECT_EQ(file.array<bool>("flags"), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(file.array<std::int64_t>("numbers"), (std::vector<std::int64_t>{7, -1, 0, 2147483647}));
  EXPECT_EQ(file.array<std::string>("words"), (std::vector<std::string>{"one", "", "three"}));
  EXPECT_EQ(file.path(), "valid.gguf");
  EXPECT_EQ(file.alignment(), 32u);
  EXPECT_TRUE(file.has("depth"));
  EXPECT_FALSE(file.has("width"));
  EXPECT_TRUE(file.is_array("flags"));
  EXPECT_FALSE(file.is_array("flag"));
}

TEST(GgufReader, ReadsTensorsWhereTheyLie) {
  const GgufImage image = valid_gguf_image();
  const GgufFile file = GgufFile::parse(image.bytes(), "valid.gguf");
  const GgufTensor& alpha = file.tensor("alpha");
  EXPECT_EQ(alpha.type, TensorType::kF32);
  EXPECT_EQ(alpha.dims, (std::vector<std::int64_t>{8, 2}));
  EXPECT_EQ(alpha.row_len(), 8);
  EXPECT_EQ(alpha.rows(), 2);
  EXPECT_EQ(alpha.size(), 16);
  EXPECT_EQ(alpha.file_offset, image.at("alpha.data"));
  EXPECT_EQ(alpha.data.data(), image.bytes().data() + image.at("alpha.data"));
  EXPECT_EQ(data_as<float>(alpha)[0], 1.5f);
  EXPECT_EQ(data_as<float>(alpha).size(), 16u);
  EXPECT_EQ(alpha.row(1).data(), alpha.data.data() + 32);
  EXPECT_THROW(static_cast<void>(alpha.row(2)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(alpha.row(-1)), std::invalid_argument);
  EXPECT_EQ(data_as<std::int8_t>(file.tensor("gamma"))[4], -1);
  EXPECT_EQ(data_as<std::uint8_t>(file.tensor("gamma"))[4], 255);
  EXPECT_EQ(file.find_tensor("delta"), nullptr);
}

TEST(GgufReader, RefusesAnotherTypeByNameExpectedAndFound) {
  const GgufImage image = valid_gguf_image();
  const GgufFile file = GgufFile::parse(image.bytes(), "v.gguf");
  const std::string at_depth = concat("v.gguf: key 'depth' at byte ", image.at("depth.type"), ": expected ");
  EXPECT_EQ(refusal([&] { (void)file.get<std::string>("depth"); }), at_depth + "string, found uint32");
  EXPECT_EQ(refusal([&] { (void)file.get<float>("depth"); }), at_depth + "float32, found uint32");
  EXPECT_EQ(refusal([&] { (void)file.get<bool>("depth"); }), at_depth + "bool, found uint32");
  EXPECT_EQ(refusal([&] { (void)file.get_or<bool>("depth", true); }), at_depth + "bool, found uint32");
  EXPECT_EQ(refusal([&] { (void)file.array<int>("depth"); }),
            at_depth + "an array of integers that fit int32, found uint32");
  const std::string at_flag = concat("v.gguf: key 'flag' at byte ", image.at("flag.type"), ": expected ");
  EXPECT_EQ(refusal([&] { (void)file.get<int>("flag"); }), at_flag + "an integer that fits int32, found bool");
  const std::string at_numbers = concat("v.gguf: key 'numbers' at byte ", image.at("numbers.type"), ": expected ");
  EXPECT_EQ(refusal([&] { (void)file.get<int>("numbers"); }),
            at_numbers + "an integer that fits int32, found an array of 4 int32");
  EXPECT_EQ(refusal([&] { (void)file.array<std::string>("numbers"); }),
            at_numbers + "an array of string, found an array of 4 int32");
  EXPECT_EQ(refusal([&] { (void)file.array<std::uint8_t>("numbers"); }),
            at_numbers + "an array of integers that fit uint8, found -1");
  EXPECT_EQ(refusal([&] { (void)data_as<float>(file.tensor("beta")); }),
            concat("tensor 'beta' at byte ", image.at("beta.data"), ": expected type F32, found Q8_0"));
}

TEST(GgufReader, AnEmptyArrayStillHasAType) {
  GgufImage empty;
  empty.put<std::uint32_t>("magic", 0x46554747).put<std::uint32_t>("version", 3);
  empty.put<std::uint64_t>("tensor_count", 0).put<std::uint64_t>("key_count", 1).put_string("none", "none");
  empty.put<std::uint32_t>("type", 9).put<std::uint32_t>("element", 8).put<std::uint64_t>("count", 0);
  const GgufFile file = GgufFile::parse(empty.bytes(), "e.gguf");
  EXPECT_TRUE(file.array<std::string>("none").empty());
  EXPECT_EQ(refusal([&] { (void)file.array<float>("none"); }),
            "e.gguf: key 'none' at byte 36: expected an array of float32, found an array of 0 string");
}

TEST(GgufReader, NamesWhatIsMissing) {
  const GgufImage image = valid_gguf_image();
  const GgufFile file = GgufFile::parse(image.bytes(), "v.gguf");
  EXPECT_EQ(refusal([&] { (void)file.get<int>("width"); }), "v.gguf: key 'width' is missing among its 7 keys");
  EXPECT_EQ(refusal([&] { (void)file.array<int>("width"); }), "v.gguf: key 'width' is missing among its 7 keys");
  EXPECT_EQ(refusal([&] { (void)file.tensor("delta"); }), "v.gguf: tensor 'delta' is missing among its 3 tensors");
  EXPECT_EQ(file.get_or<int>("width", 17), 17);
  EXPECT_EQ(file.get_or<int>("depth", 17), 60) << "the default hid the value";
}

TEST(GgufReader, ConvertsIntegersWhenTheValueFits) {
  constexpr auto kMax = std::numeric_limits<std::uint64_t>::max();
  EXPECT_EQ(OneKey(GgufType::kInt8, std::int8_t{-5}).file().get<std::int64_t>("key"), -5);
  EXPECT_EQ(OneKey(GgufType::kUint64, kMax).file().get<std::uint64_t>("key"), kMax);
  EXPECT_EQ(OneKey(GgufType::kInt64, std::int64_t{255}).file().get<std::uint8_t>("key"), 255);
  EXPECT_EQ(OneKey(GgufType::kUint16, std::uint16_t{40000}).file().get<int>("key"), 40000);
  for (const std::string& message :
       {refusal([] { (void)OneKey(GgufType::kInt64, std::int64_t{256}).file().get<std::uint8_t>("key"); }),
        refusal([] { (void)OneKey(GgufType::kInt8, std::int8_t{-1}).file().get<std::uint64_t>("key"); }),
        refusal([] { (void)OneKey(GgufType::kUint64, kMax).file().get<std::int64_t>("key"); }),
        refusal([] { (void)OneKey(GgufType::kUint16, std::uint16_t{40000}).file().get<std::int16_t>("key"); })}) {
    EXPECT_NE(message.find("one.gguf: key 'key' at byte 35: expected an integer that fits"), std::string::npos)
        << message;
  }
}

TEST(GgufReader, ConvertsFloatsByRoundingAndRefusesOverflow) {
  EXPECT_EQ(OneKey(GgufType::kFloat32, 1e-6f).file().get<double>("key"), static_cast<double>(1e-6f));
  EXPECT_EQ(OneKey(GgufType::kFloat64, 0.1).file().get<float>("key"), 0.1f);
  EXPECT_TRUE(std::isinf(OneKey(GgufType::kFloat64, HUGE_VAL).file().get<float>("key")));
  EXPECT_TRUE(std::isnan(OneKey(GgufType::kFloat64, std::nan("")).file().get<float>("key")));
  EXPECT_NE(refusal([] { (void)OneKey(GgufType::kFloat64, 1e39).file().get<float>("key"); }), "");
}

TEST(GgufReader, RefusesMemoryThatIsNotAligned) {
  const GgufImage image = valid_gguf_image();
  std::vector<std::byte> shifted(image.size() + 1);
  std::copy(image.bytes().begin(), image.bytes().end(), shifted.begin() + 1);
  const GgufFile file = GgufFile::parse(std::span<const std::byte>(shifted).subspan(1), "shifted");
  EXPECT_THROW(static_cast<void>(data_as<float>(file.tensor("alpha"))), std::invalid_argument);
  EXPECT_EQ(data_as<std::uint8_t>(file.tensor("gamma")).size(), 5u);
}

TEST(GgufReader, AFileMayHoldNoTensorsAndNoKeys) {
  GgufImage image;
  image.put<std::uint32_t>("magic", 0x46554747).put<std::uint32_t>("version", 3);
  image.put<std::uint64_t>("tensor_count", 0).put<std::uint64_t>("key_count", 0);
  const GgufFile file = GgufFile::parse(image.bytes(), "empty.gguf");
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_TRUE(file.values().empty());
}

TEST(GgufReader, ALargerAlignmentMovesTheData) {
  GgufImage image;
  image.put<std::uint32_t>("magic", 0x46554747).put<std::uint32_t>("version", 3);
  image.put<std::uint64_t>("tensor_count", 1).put<std::uint64_t>("key_count", 1);
  image.put_string("key", "general.alignment").put<std::uint32_t>("type", 4).put<std::uint32_t>("value", 4096);
  image.put_string("t", "t").put<std::uint32_t>("n_dim", 1).put<std::uint64_t>("dim", 2);
  image.put<std::uint32_t>("t.type", 0).put<std::uint64_t>("offset", 0).align(4096).put("data", 2.5f).put("more", 3.5f);
  const GgufFile file = GgufFile::parse(image.bytes(), "aligned.gguf");
  EXPECT_EQ(file.tensor("t").file_offset, 4096u);
  EXPECT_EQ(data_as<float>(file.tensor("t"))[1], 3.5f);
}

TEST(GgufReader, OpensAPeersFilesAndKeepsThemWhenMoved) {
  GgufFile opened = GgufFile::open(kData / "tiny/tiny-a-Q4_K_M.gguf");
  const std::byte* const where = opened.tensor("token_embd.weight").data.data();
  const GgufFile file = std::move(opened);
  EXPECT_EQ(file.tensor("token_embd.weight").data.data(), where);
  EXPECT_EQ(file.get<std::string>("general.architecture"), "gemma4");
  EXPECT_EQ(file.get<std::int64_t>("gemma4.embedding_length"), 256);
  EXPECT_EQ(file.array<bool>("gemma4.attention.sliding_window_pattern"),
            (std::vector<bool>{true, true, true, true, true, false}));
  EXPECT_EQ(file.array<std::string_view>("tokenizer.ggml.tokens").size(), 1024u);
  EXPECT_EQ(file.tensor("token_embd.weight").type, TensorType::kQ6K);
  EXPECT_EQ(file.tensor("token_embd.weight").dims, (std::vector<std::int64_t>{256, 1024}));
  EXPECT_EQ(data_as<float>(file.tensor("output_norm.weight")).size(), 256u);

  const GgufFile golden = GgufFile::open(kData / "tq4/tq4-d64-h4x2-q1-kv40of64.gguf");
  EXPECT_EQ(golden.tensor("k_packed").dims, (std::vector<std::int64_t>{32, 64, 2}));
  EXPECT_EQ(data_as<std::uint8_t>(golden.tensor("k_packed")).size(), 32u * 64u * 2u);
}

TEST(GgufReader, NamesThePathThatCannotBeOpened) {
  const TempDir dir;
  try {
    static_cast<void>(GgufFile::open(dir.file("absent.gguf")));
    FAIL() << "opened";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
    EXPECT_NE(std::string(error.what()).find(dir.file("absent.gguf").string()), std::string::npos) << error.what();
  }
  const std::string folder = refusal([&] { (void)GgufFile::open(dir.file(".")); });
  EXPECT_NE(folder.find("expected a regular file, found a directory"), std::string::npos) << folder;
  std::ofstream(dir.file("empty.gguf"));
  const std::string empty = refusal([&] { (void)GgufFile::open(dir.file("empty.gguf")); });
  EXPECT_EQ(empty, dir.file("empty.gguf").string() +
                       ": magic at byte 0: expected 4 bytes, found 0 before the end of the file");
}

TEST(MappedFile, MovesItsMapping) {
  const TempDir dir;
  std::ofstream(dir.file("a")) << "bytes of a";
  std::ofstream(dir.file("b")) << "b";
  MappedFile a(dir.file("a"));
  MappedFile b(dir.file("b"));
  const std::byte* const where = a.bytes().data();
  b = std::move(a);
  EXPECT_EQ(b.bytes().data(), where);
  EXPECT_EQ(b.bytes().size(), 10u);
  EXPECT_EQ(b.path(), dir.file("a"));
  EXPECT_TRUE(a.bytes().empty());  // NOLINT(bugprone-use-after-move): the promise under test
}

TEST(Gguf, RowBytesCountWholeBlocks) {
  EXPECT_EQ(row_bytes(TensorType::kQ4K, 512), 288);
  EXPECT_EQ(row_bytes(TensorType::kQ5K, 512), 352);
  EXPECT_EQ(row_bytes(TensorType::kQ6K, 512), 420);
  EXPECT_EQ(row_bytes(TensorType::kQ8_0, 64), 68);
  EXPECT_EQ(row_bytes(TensorType::kQ4_0, 64), 36);
  EXPECT_EQ(row_bytes(TensorType::kIq4Xs, 512), 272);
  EXPECT_EQ(row_bytes(TensorType{18}, 512), 196) << "IQ3_XXS, which nothing decodes";
  EXPECT_EQ(row_bytes(TensorType::kBf16, 3), 6);
  EXPECT_EQ(row_bytes(TensorType::kF32, 0), 0);
  EXPECT_THROW(static_cast<void>(row_bytes(TensorType::kQ4K, 255)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(row_bytes(TensorType::kF32, -1)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(row_bytes(TensorType::kF32, std::int64_t{1} << 62)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(row_bytes(static_cast<TensorType>(43), 32)), std::invalid_argument);
}

}  // namespace
}  // namespace gemma4
