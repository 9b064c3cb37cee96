// SPDX-License-Identifier: Apache-2.0
#include "gemma4/gguf/gguf_writer.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "tests/support/gguf_image.hpp"
#include "tests/support/property.hpp"
#include "tests/support/temp_dir.hpp"

namespace gemma4 {
namespace {

using testkit::GgufImage;
using testkit::TempDir;

std::string contents(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::vector<std::byte> filled(std::size_t count, int value) {
  return std::vector<std::byte>(count, static_cast<std::byte>(value));
}

/// The message of the std::invalid_argument that the call throws; "" when it throws none.
template <class TCall>
std::string refusal(const TCall& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

// The image is spelled from the specification, so that writer and reader cannot be wrong together.
TEST(GgufWriter, WritesTheBytesOfTheSpecification) {
  const TempDir dir;
  GgufWriter writer(dir.file("w.gguf"));
  writer.set("general.architecture", "golden");
  writer.set("depth", std::uint32_t{60});
  writer.set("eps", 1e-6f);
  writer.set("wide", 0.1);
  writer.set("flag", true);
  writer.set("small", std::int8_t{-3});
  writer.set_array("flags", std::vector<bool>{true, false});
  writer.set_array("numbers", std::vector<std::int64_t>{-1, 1});
  writer.set_array("words", std::vector<std::string>{"one", ""});
  writer.add_tensor("beta", TensorType::kQ8_0, {32, 1, 2});
  writer.add_tensor("gamma", TensorType::kI8, {5});
  EXPECT_EQ(writer.data_bytes(), 96u + 32u);
  writer.append("beta", filled(68, 3));
  writer.append("gamma", filled(5, 255));
  writer.finish();

  GgufImage image;
  image.put<std::uint32_t>("magic", 0x46554747).put<std::uint32_t>("version", 3);
  image.put<std::uint64_t>("tensors", 2).put<std::uint64_t>("keys", 9);
  image.put_string("k", "general.architecture").put<std::uint32_t>("t", 8).put_string("v", "golden");
  image.put_string("k", "depth").put<std::uint32_t>("t", 4).put<std::uint32_t>("v", 60);
  image.put_string("k", "eps").put<std::uint32_t>("t", 6).put("v", 1e-6f);
  image.put_string("k", "wide").put<std::uint32_t>("t", 12).put("v", 0.1);
  image.put_string("k", "flag").put<std::uint32_t>("t", 7).put<std::uint8_t>("v", 1);
  image.put_string("k", "small").put<std::uint32_t>("t", 1).put<std::int8_t>("v", -3);
  image.put_string("k", "flags").put<std::uint32_t>("t", 9).put<std::uint32_t>("e", 7).put<std::uint64_t>("n", 2);
  image.put<std::uint8_t>("v", 1).put<std::uint8_t>("v", 0);
  image.put_string("k", "numbers").put<std::uint32_t>("t", 9).put<std::uint32_t>("e", 11).put<std::uint64_t>("n", 2);
  image.put<std::int64_t>("v", -1).put<std::int64_t>("v", 1);
  image.put_string("k", "words").put<std::uint32_t>("t", 9).put<std::uint32_t>("e", 8).put<std::uint64_t>("n", 2);
  image.put_string("v", "one").put_string("v", "");
  image.put_string("n", "beta").put<std::uint32_t>("d", 3).put<std::uint64_t>("d", 32).put<std::uint64_t>("d", 1);
  image.put<std::uint64_t>("d", 2).put<std::uint32_t>("t", 8).put<std::uint64_t>("o", 0);
  image.put_string("n", "gamma").put<std::uint32_t>("d", 1).put<std::uint64_t>("d", 5);
  image.put<std::uint32_t>("t", 24).put<std::uint64_t>("o", 96).align(32);
  image.put_fill("beta", 68, 3).align(32).put_fill("gamma", 5, 255).align(32);

  const std::string written = contents(dir.file("w.gguf"));
  const std::string expected(reinterpret_cast<const char*>(image.bytes().data()), image.size());
  ASSERT_EQ(written.size(), expected.size());
  EXPECT_TRUE(written == expected) << "first difference at byte "
                                   << std::ranges::mismatch(written, expected).in1 - written.begin();
}

/// A tensor of random shape, type and bytes.
struct RandomTensor {
  std::string name;
  TensorType type;
  std::vector<std::int64_t> dims;
  std::vector<std::byte> data;
};

std::vector<RandomTensor> random_tensors() {
  std::vector<RandomTensor> tensors;
  const int count = *rc::gen::inRange(0, 5);
  for (int index = 0; index < count; ++index) {
    const auto info = *rc::gen::oneOf(rc::gen::elementOf(kTensorTypes), rc::gen::elementOf(kForeignTensorTypes));
    RandomTensor tensor{concat("t.", index), info.type, {}, {}};
    tensor.dims = *rc::gen::container<std::vector<std::int64_t>>(static_cast<std::size_t>(*rc::gen::inRange(1, 5)),
                                                                 rc::gen::inRange<std::int64_t>(1, 4));
    tensor.dims[0] *= block_size(tensor.type);
    std::int64_t bytes = row_bytes(tensor.type, tensor.dims[0]);
    for (std::size_t axis = 1; axis < tensor.dims.size(); ++axis) bytes *= tensor.dims[axis];
    const auto seed = *rc::gen::arbitrary<std::uint8_t>();
    for (std::int64_t i = 0; i < bytes; ++i) tensor.data.push_back(static_cast<std::byte>(seed + 31 * i));
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

RC_GTEST_PROP(GgufWriter, WhatIsWrittenInAnyPiecesIsRead, ()) {
  const TempDir dir;
  const auto text = *rc::gen::arbitrary<std::string>();
  const auto words = *rc::gen::arbitrary<std::vector<std::string>>();
  const auto numbers = *rc::gen::arbitrary<std::vector<std::int16_t>>();
  const auto flags = *rc::gen::arbitrary<std::vector<bool>>();
  const auto number = *rc::gen::arbitrary<std::uint64_t>();
  const std::vector<RandomTensor> tensors = random_tensors();
  const auto piece = *rc::gen::inRange<std::size_t>(1, 700);
  {
    GgufWriter writer(dir.file("f.gguf"));
    writer.set("text", text);
    writer.set("number", number);
    writer.set_array("words", words);
    writer.set_array("numbers", numbers);
    writer.set_array("flags", flags);
    for (const RandomTensor& tensor : tensors) writer.add_tensor(tensor.name, tensor.type, tensor.dims);
    for (const RandomTensor& tensor : tensors) {
      for (std::span<const std::byte> rest(tensor.data); !rest.empty();) {
        const std::size_t count = std::min(piece, rest.size());
        writer.append(tensor.name, rest.first(count));
        rest = rest.subspan(count);
      }
    }
    writer.finish();
  }
  const GgufFile file = GgufFile::open(dir.file("f.gguf"));
  RC_ASSERT(file.get<std::string>("text") == text);
  RC_ASSERT(file.get<std::uint64_t>("number") == number);
  RC_ASSERT(file.array<std::string>("words") == words);
  RC_ASSERT(file.array<std::int16_t>("numbers") == numbers);
  RC_ASSERT(file.array<bool>("flags") == flags);
  RC_ASSERT(file.tensors().size() == tensors.size());
  for (const RandomTensor& tensor : tensors) {
    const GgufTensor& read = file.tensor(tensor.name);
    RC_ASSERT(read.type == tensor.type);
    RC_ASSERT(read.dims == tensor.dims);
    RC_ASSERT(std::ranges::equal(read.data, tensor.data));
  }
}

TEST(GgufWriter, WritesMoreThanItsBuffer) {
  const TempDir dir;
  std::vector<std::byte> data(std::size_t{5} << 20);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 2654435761u >> 13);
  GgufWriter writer(dir.file("f.gguf"));
  writer.add_tensor("t", TensorType::kI8, {static_cast<std::int64_t>(data.size())});
  writer.append("t", std::span(data).first(3));
  writer.append("t", std::span(data).subspan(3));
  writer.finish();
  EXPECT_TRUE(std::ranges::equal(GgufFile::open(dir.file("f.gguf")).tensor("t").data, data));
}

TEST(GgufWriter, AppearsUnderItsNameOnlyWhenFinished) {
  const TempDir dir;
  std::ofstream(dir.file("f.gguf")) << "the old file";
  GgufWriter writer(dir.file("f.gguf"));
  writer.add_tensor("t", TensorType::kI8, {1});
  writer.append("t", filled(1, 1));
  EXPECT_EQ(contents(dir.file("f.gguf")), "the old file");
  writer.finish();
  EXPECT_EQ(GgufFile::open(dir.file("f.gguf")).tensors().size(), 1u);
  EXPECT_EQ(dir.names(), std::vector<std::string>{"f.gguf"});
}

TEST(GgufWriter, LeavesNothingWhenNotFinished) {
  const TempDir dir;
  {
    GgufWriter writer(dir.file("f.gguf"));
    writer.add_tensor("t", TensorType::kI8, {std::int64_t{3} << 20});
    writer.append("t", filled(std::size_t{2} << 20, 1));
    EXPECT_EQ(dir.names().size(), 1u) << "control: there is something to remove";
  }
  EXPECT_TRUE(dir.names().empty());
}

TEST(GgufWriter, KeepsTheOldFileWhenNotFinished) {
  const TempDir dir;
  std::ofstream(dir.file("f.gguf")) << "the old file";
  { GgufWriter writer(dir.file("f.gguf")); }
  EXPECT_EQ(contents(dir.file("f.gguf")), "the old file");
  EXPECT_EQ(dir.names(), std::vector<std::string>{"f.gguf"});
}

TEST(GgufWriter, AFailedWriteNamesTheFileAndLeavesNothing) {
  const TempDir dir;
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = old_limit;
  small.rlim_cur = 100000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string message, after;
  {
    GgufWriter writer(dir.file("f.gguf"));
    writer.add_tensor("t", TensorType::kI8, {std::int64_t{2} << 20});
    try {
      writer.append("t", filled(std::size_t{2} << 20, 1));
    } catch (const std::system_error& error) {
      message = error.what();
    }
    after = refusal([&] { writer.finish(); });
  }
  setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_NE(message.find("cannot write '" + dir.file("f.gguf").string()), std::string::npos) << message;
  EXPECT_NE(message.find("File too large"), std::string::npos) << message;
  EXPECT_NE(after.find("an earlier write failed"), std::string::npos) << after;
  EXPECT_TRUE(dir.names().empty());
}

TEST(GgufWriter, RefusesWrongDeclarations) {
  const TempDir dir;
  GgufWriter writer(dir.file("f.gguf"));
  writer.set("key", 1);
  writer.add_tensor("t", TensorType::kI8, {4});
  EXPECT_EQ(refusal([&] { writer.set("key", 2); }), "key 'key': set twice");
  EXPECT_EQ(refusal([&] { writer.set("", 2); }), "key of 0 bytes, expected 1 to 65535");
  EXPECT_EQ(refusal([&] { writer.set("general.alignment", 64); }),
            "key 'general.alignment': not settable, this writer aligns to 32");
  EXPECT_EQ(refusal([&] { writer.add_tensor("t", TensorType::kF32, {1}); }), "tensor 't': declared twice");
  EXPECT_NE(refusal([&] { writer.add_tensor("", TensorType::kF32, {1}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor(std::string(64, 'n'), TensorType::kF32, {1}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor("a", TensorType::kF32, {}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor("b", TensorType::kF32, {1, 1, 1, 1, 1}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor("c", TensorType::kF32, {4, 0}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor("d", TensorType::kQ4K, {255}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor("e", static_cast<TensorType>(43), {32}); }), "");
  EXPECT_NE(refusal([&] { writer.add_tensor("f", TensorType::kF32, {1 << 30, 1 << 30, 1 << 30}); }), "");
  // Refused declarations leave no trace: the name is free, and the file below is whole.
  writer.add_tensor("c", TensorType::kI8, {1});
  writer.append("t", filled(4, 1));
  EXPECT_EQ(refusal([&] { writer.set("late", 1); }), "key 'late': set after the first data; set all keys first");
  EXPECT_NE(refusal([&] { writer.add_tensor("late", TensorType::kF32, {1}); }), "");
  writer.append("c", filled(1, 1));
  writer.finish();
  const GgufFile file = GgufFile::open(dir.file("f.gguf"));
  EXPECT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.values().size(), 1u);
}

TEST(GgufWriter, RefusesDataOutOfOrderOrOfAnotherSize) {
  const TempDir dir;
  GgufWriter writer(dir.file("f.gguf"));
  writer.add_tensor("a", TensorType::kI8, {4});
  writer.add_tensor("b", TensorType::kI8, {4});
  EXPECT_EQ(refusal([&] { writer.append("b", filled(4, 1)); }),
            "tensor 'b': appended out of order, expected 'a' (4 bytes to go)");
  EXPECT_EQ(refusal([&] { writer.append("a", filled(5, 1)); }), "tensor 'a': 5 bytes appended, expected 4");
  EXPECT_EQ(refusal([&] { writer.finish(); }), "tensor 'a': 0 bytes appended, expected 4");
  writer.append("a", filled(3, 1));
  EXPECT_EQ(refusal([&] { writer.append("b", filled(4, 1)); }),
            "tensor 'b': appended out of order, expected 'a' (1 bytes to go)");
  writer.append("a", filled(1, 1));
  EXPECT_EQ(refusal([&] { writer.append("a", filled(1, 1)); }),
            "tensor 'a': appended out of order, expected 'b' (4 bytes to go)");
  EXPECT_EQ(refusal([&] { writer.finish(); }), "tensor 'b': 0 bytes appended, expected 4");
  writer.append("b", filled(4, 2));
  EXPECT_EQ(refusal([&] { writer.append("c", filled(1, 1)); }), "tensor 'c': all 2 tensors are complete already");
  writer.finish();
  EXPECT_NE(refusal([&] { writer.finish(); }), "");
  EXPECT_EQ(GgufFile::open(dir.file("f.gguf")).tensor("b").data[0], std::byte{2});
}

RC_GTEST_PROP(GgufWriter, PiecesInAnyOrderGiveTheFileOfTheStream, ()) {
  const TempDir dir;
  const auto n_tensor = *rc::gen::inRange(1, 4);
  std::vector<std::vector<std::byte>> data;
  for (int t = 0; t < n_tensor; ++t) data.push_back(filled(static_cast<std::size_t>(*rc::gen::inRange(1, 100)), t + 1));
  GgufWriter stream(dir.file("stream.gguf")), placed(dir.file("placed.gguf"));
  for (GgufWriter* writer : {&stream, &placed}) {
    writer->set("general.architecture", "golden");
    for (std::size_t t = 0; t < data.size(); ++t) {
      writer->add_tensor(std::to_string(t), TensorType::kI8, {static_cast<std::int64_t>(data[t].size())});
    }
  }
  placed.place();
  for (std::size_t t = data.size(); t-- > 0;) {  // from the last byte to the first
    const auto cut = static_cast<std::size_t>(*rc::gen::inRange<int>(0, static_cast<int>(data[t].size()) + 1));
    placed.write_at(t, cut, std::span(data[t]).subspan(cut));
    placed.write_at(t, 0, std::span(data[t]).first(cut));
  }
  for (std::size_t t = 0; t < data.size(); ++t) stream.append(std::to_string(t), data[t]);
  stream.finish();
  placed.finish();
  RC_ASSERT(contents(dir.file("stream.gguf")) == contents(dir.file("placed.gguf")));
}

TEST(GgufWriter, RefusesAPlacedFileWithAHole) {
  const TempDir dir;
  GgufWriter writer(dir.file("f.gguf"));
  writer.add_tensor("a", TensorType::kI8, {4});
  EXPECT_NE(refusal([&] { writer.write_at(0, 0, filled(4, 1)); }), "");
  writer.place();
  EXPECT_NE(refusal([&] { writer.append("a", filled(4, 1)); }), "");
  EXPECT_EQ(refusal([&] { writer.write_at(0, 2, filled(3, 1)); }), "tensor 'a': bytes 2 to 5, it has 4");
  EXPECT_NE(refusal([&] { writer.write_at(1, 0, filled(1, 1)); }), "");
  writer.write_at(0, 1, filled(3, 1));
  EXPECT_NE(refusal([&] { writer.finish(); }).find("3 bytes of tensors written, expected 4"), std::string::npos);
  writer.write_at(0, 0, filled(1, 1));
  writer.finish();
  EXPECT_EQ(GgufFile::open(dir.file("f.gguf")).tensor("a").data[3], std::byte{1});
}

TEST(GgufWriter, RefusesATargetThatIsNoFile) {
  const TempDir dir;
  EXPECT_NE(refusal([&] { GgufWriter writer(dir.file(".")); }).find("expected a regular file or none"),
            std::string::npos);
  try {
    GgufWriter writer(dir.file("absent/f.gguf"));
    FAIL() << "created";
  } catch (const std::system_error& error) {
    EXPECT_NE(std::string(error.what()).find(dir.file("absent/f.gguf").string()), std::string::npos) << error.what();
  }
  EXPECT_TRUE(dir.names().empty());
}

}  // namespace
}  // namespace gemma4
