// SPDX-License-Identifier: Apache-2.0
// Broken GGUF files, one broken field each: the reader names the thing, where it is, what it expected and what it
// found.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "tests/support/gguf_image.hpp"
#include "tests/support/property.hpp"

namespace gemma4 {
namespace {

using testkit::GgufImage;
using testkit::valid_gguf_image;

constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();

struct Malformed {
  const char* name;
  std::function<void(GgufImage&)> mutate;
  const char* thing;
  const char* label;  ///< of the offset that the message must give, in the mutated image; nullptr: byte 0
  const char* expected;
  const char* found;
};

void PrintTo(const Malformed& malformed, std::ostream* stream) {
  *stream << malformed.name;
}

/// The image cut `count` bytes behind a label.
auto cut_at(const char* label, std::size_t count = 0) {
  return [=](GgufImage& image) { image.truncate(image.at(label) + count); };
}

/// The same in a file that promises no more than it could still hold, so that the cut itself is what is found.
auto cut_key_at(const char* label, std::size_t count) {
  return [=](GgufImage& image) {
    image.truncate(image.at(label) + count)
        .patch<std::uint64_t>("tensor_count", 0)
        .patch<std::uint64_t>("key_count", 3);
  };
}

template <class T>
auto set(const char* label, T value) {
  return [=](GgufImage& image) { image.patch(label, value); };
}

auto set_text(const char* label, const char* text) {
  return [=](GgufImage& image) { image.patch_text(label, text); };
}

/// A string made longer in front: `count` more bytes, and the length that says so.
auto lengthen(const std::string& label, std::uint64_t old_length, std::uint64_t count) {
  return [=](GgufImage& image) { image.patch(label, old_length + count).insert(label + ".text", count, 'x'); };
}

/// Of the 549 bytes 525 follow the counts: room for 15 tensors of at least 33 bytes, or 37 keys of at least 14.
std::vector<Malformed> header_cases() {
  return {
      {"EmptyFile", [](GgufImage& i) { i.truncate(0); }, "magic", nullptr, "4 bytes", "0 before the end"},
      {"WrongMagic", set_text("magic", "GGML"), "magic", "magic", "'GGUF'", "'GGML'"},
      {"UnprintableMagic", set_text("magic", "\x1b[2J"), "magic", "magic", "'GGUF'", "'?[2J'"},
      {"Version2", set<std::uint32_t>("version", 2), "version", "version", "3, little endian", "found 2"},
      {"Version4", set<std::uint32_t>("version", 4), "version", "version", "3, little endian", "found 4"},
      {"BigEndian", set<std::uint32_t>("version", 0x03000000), "version", "version", "3, little endian", "big-endian"},
      {"CutInVersion", cut_at("version", 3), "version", "version", "4 bytes", "3 before the end"},
      {"CutInCounts", cut_at("key_count", 7), "key count", "key_count", "8 bytes", "7 before the end"},
      {"TensorCountTooLarge", set<std::uint64_t>("tensor_count", 100000), "tensor count", "tensor_count",
       "at most 15, which the file's size allows", "found 100000"},
      {"TensorCountHuge", set("tensor_count", kHuge), "tensor count", "tensor_count", "at most 15",
       "18446744073709551615"},
      {"KeyCountTooLarge", set<std::uint64_t>("key_count", 1000), "key count", "key_count", "at most 37", "found 1000"},
      {"KeyCountHuge", set("key_count", kHuge), "key count", "key_count", "at most 37", "18446744073709551615"},
      {"KeyCountOneTooMany", set<std::uint64_t>("key_count", 8), "tensor number 0", nullptr, "at most 64 bytes",
       "a length of"},
      {"KeyCountOneTooFew", set<std::uint64_t>("key_count", 6), "tensor 'words'", "words.type", "1 to 4 dimensions",
       "found 9"},
      {"TensorCountOneTooMany", set<std::uint64_t>("tensor_count", 4), "tensor number 3", nullptr, "a name",
       "an empty one"},
  };
}

std::vector<Malformed> key_cases() {
  return {
      {"KeyEmpty", set<std::uint64_t>("depth", 0), "key number 2", "depth", "a name", "an empty one"},
      {"KeyLongerThanTheFile", set<std::uint64_t>("depth", 5000), "key number 2", "depth.text", "5000 bytes",
       "before the end"},
      {"KeyLengthHuge", set("depth", kHuge), "key number 2", "depth", "at most 65535 bytes", "18446744073709551615"},
      {"KeyTooLong", lengthen("depth", 5, 65531), "key number 2", "depth", "at most 65535 bytes", "length of 65536"},
      {"KeyTwice", set_text("flags.text", "depth"), "key 'depth'", "flags", "unique keys", "a second one"},
      {"ValueTypeUnknown", set<std::uint32_t>("depth.type", 13), "key 'depth'", "depth.type", "a value type below 13",
       "found 13"},
      {"ElementTypeUnknown", set<std::uint32_t>("numbers.element", 200), "key 'numbers'", "numbers.element",
       "a value type below 13", "found 200"},
      {"ArrayOfArrays", set<std::uint32_t>("numbers.element", 9), "key 'numbers'", "numbers.element",
       "an array of single values", "an array of arrays"},
      {"ArrayLongerThanTheFile", set<std::uint64_t>("numbers.count", 1000), "key 'numbers'", "numbers.value",
       "1000 values of 4 bytes", "before the end of the file"},
      {"ArrayBytesOverflow", set("numbers.count", std::uint64_t{1} << 62), "key 'numbers'", "numbers.value",
       "4611686018427387904 values of 4 bytes", "before the end of the file"},
      {"StringArrayCountHuge", set("words.count", kHuge), "key 'words'", nullptr, "expected", "before the end"},
      {"StringLongerThanTheFile", set<std::uint64_t>("words.2", 100000), "key 'words'", "words.2.text", "100000 bytes",
       "before the end"},
      {"StringLengthHuge", set("general.architecture.value", kHuge), "key 'general.architecture'",
       "general.architecture.value.text", "18446744073709551615 bytes", "before the end"},
      {"BoolOfTwo", set<std::uint8_t>("flag.value", 2), "key 'flag'", "flag.value", "a bool of 0 or 1", "found 2"},
      {"BoolInArrayOf255", set<std::uint8_t>("flags.2", 255), "key 'flags'", "flags.2", "a bool of 0 or 1",
       "found 255"},
      {"CutInKeyName", cut_key_at("depth.text", 2), "key number 2", "depth.text", "5 bytes", "2 before the end"},
      {"CutInKeyType", cut_key_at("depth.type", 1), "key 'depth'", "depth.type", "4 bytes", "1 before the end"},
      {"CutInValue", cut_key_at("depth.value", 1), "key 'depth'", "depth.value", "1 values of 4 bytes",
       "1 bytes before"},
      {"AlignmentZero", set<std::uint32_t>("general.alignment.value", 0), "key 'general.alignment'",
       "general.alignment.type", "a power of two from 8 to 65536", "found 0"},
      {"AlignmentNoPowerOfTwo", set<std::uint32_t>("general.alignment.value", 24), "key 'general.alignment'",
       "general.alignment.type", "a power of two from 8 to 65536", "found 24"},
      {"AlignmentTooSmall", set<std::uint32_t>("general.alignment.value", 4), "key 'general.alignment'",
       "general.alignment.type", "a power of two from 8 to 65536", "found 4"},
      {"AlignmentTooLarge", set<std::uint32_t>("general.alignment.value", 1u << 31), "key 'general.alignment'",
       "general.alignment.type", "a power of two from 8 to 65536", "found 2147483648"},
      {"AlignmentNegative",
       [](GgufImage& i) { i.patch<std::uint32_t>("general.alignment.type", 5).patch("general.alignment.value", -32); },
       "key 'general.alignment'", "general.alignment.type", "an integer that fits uint64", "found -32"},
      {"AlignmentFloat", set<std::uint32_t>("general.alignment.type", 6), "key 'general.alignment'",
       "general.alignment.type", "an integer that fits uint64", "found float32"},
  };
}

std::vector<Malformed> tensor_cases() {
  return {
      {"TensorNameEmpty", set<std::uint64_t>("beta", 0), "tensor number 1", "beta", "a name", "an empty one"},
      {"TensorNameTooLong", lengthen("beta", 4, 61), "tensor number 1", "beta", "at most 64 bytes", "length of 65"},
      {"TensorTwice", set_text("gamma.text", "alpha"), "tensor 'alpha'", "gamma", "unique tensors", "a second one"},
      {"NoDimensions", set<std::uint32_t>("beta.n_dim", 0), "tensor 'beta'", "beta.n_dim", "1 to 4 dimensions",
       "found 0"},
      {"FiveDimensions", set<std::uint32_t>("beta.n_dim", 5), "tensor 'beta'", "beta.n_dim", "1 to 4 dimensions",
       "found 5"},
      {"DimensionZero", set<std::uint64_t>("alpha.dim1", 0), "tensor 'alpha'", "alpha.dim1",
       "dimension 1 from 1 to 2^63 - 1", "found 0"},
      {"DimensionNegative", set("alpha.dim0", kHuge), "tensor 'alpha'", "alpha.dim0", "dimension 0 from 1 to 2^63 - 1",
       "18446744073709551615"},
      {"DimensionProductOverflow", set("alpha.dim1", std::uint64_t{1} << 62), "tensor 'alpha'", "alpha.dim1",
       "a product of dimensions below 2^63", "dimension 1 = 4611686018427387904"},
      {"ByteCountOverflow", set("alpha.dim0", std::uint64_t{1} << 61), "tensor 'alpha'", "alpha.type",
       "fewer than 2^63 bytes", "4611686018427387904 values of F32"},
      {"TensorTypeBeyondTheLast", set<std::uint32_t>("beta.type", 43), "tensor 'beta'", "beta.type",
       "a type of ggml (supported are Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, ", "the unknown type 43"},
      {"TensorTypeUnknown", set<std::uint32_t>("beta.type", 0xFFFFFFFF), "tensor 'beta'", "beta.type",
       "BF16, F16 and F32)", "the unknown type 4294967295"},
      {"RowNotWholeBlocks", set<std::uint64_t>("beta.dim0", 33), "tensor 'beta'", "beta.type",
       "rows of a multiple of 32 values for Q8_0", "found 33"},
      {"RowNotWholeBlocksThoughTheTensorIs", set<std::uint32_t>("alpha.type", 8), "tensor 'alpha'", "alpha.type",
       "rows of a multiple of 32 values for Q8_0", "found 8"},
      {"OffsetMisaligned", set<std::uint64_t>("gamma.offset", 144), "tensor 'gamma'", "gamma.offset",
       "an offset that 32 divides", "found 144"},
      {"OffsetMisalignedForALargerAlignment", set<std::uint32_t>("general.alignment.value", 128), "tensor 'beta'",
       "beta.offset", "an offset that 128 divides", "found 64"},
      {"OffsetBeyondTheFile", set<std::uint64_t>("gamma.offset", 1 << 20), "tensor 'gamma'", "alpha.data",
       "5 bytes of data at offset 1048576", "133 bytes of data"},
      {"OffsetWrapsAround", set<std::uint64_t>("gamma.offset", kHuge - 31), "tensor 'gamma'", "alpha.data",
       "5 bytes of data at offset 18446744073709551584", "133 bytes of data"},
      {"DataLongerThanTheFile", set<std::uint64_t>("gamma.dim0", 6), "tensor 'gamma'", "alpha.data",
       "6 bytes of data at offset 128", "133 bytes of data"},
      {"Overlap", set<std::uint64_t>("beta.offset", 32), "tensor 'beta'", nullptr, "the end of tensor 'alpha'",
       "an overlap"},
      {"SameBytesTwice", set<std::uint64_t>("gamma.offset", 64), "tensor '", "beta.data", "the end of tensor",
       "an overlap"},
      {"CutInTensorName", cut_at("gamma.text", 3), "tensor number 2", "gamma.text", "5 bytes", "3 before the end"},
      {"CutInDimensions", cut_at("alpha.dim1", 4), "tensor 'alpha'", "alpha.dim1", "8 bytes", "4 before the end"},
      {"CutInOffset", cut_at("gamma.offset", 7), "tensor 'gamma'", "gamma.offset", "8 bytes", "7 before the end"},
      {"CutBeforeTheData", cut_at("end_of_tensors"), "tensor 'alpha'", "alpha.data", "64 bytes of data at offset 0",
       "0 bytes of data"},
      {"CutInTheData", cut_at("beta.quants", 31), "tensor 'beta'", "alpha.data", "34 bytes of data at offset 64",
       "97 bytes of data"},
  };
}

std::vector<Malformed> all_cases() {
  std::vector<Malformed> all = header_cases();
  for (const auto& more : {key_cases(), tensor_cases()}) all.insert(all.end(), more.begin(), more.end());
  return all;
}

class GgufMalformed : public testing::TestWithParam<Malformed> {};

TEST_P(GgufMalformed, IsRefusedByNameOffsetExpectedAndFound) {
  GgufImage image = valid_gguf_image();
  GetParam().mutate(image);
  // For the cases that end before `label`, the label still tells where the reader must have been.
  const std::string where =
      GetParam().label != nullptr ? concat("at byte ", image.at(GetParam().label), ":") : "at byte ";
  try {
    static_cast<void>(GgufFile::parse(image.bytes(), "broken.gguf"));
    FAIL() << "accepted";
  } catch (const FormatError& error) {
    const std::string message = error.what();
    for (const std::string& part :
         {std::string("broken.gguf: "), std::string(GetParam().thing), where, std::string(": expected "),
          std::string(GetParam().expected), std::string(", found "), std::string(GetParam().found)}) {
      EXPECT_NE(message.find(part), std::string::npos) << "no '" << part << "' in: " << message;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, GgufMalformed, testing::ValuesIn(all_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

// Negative control of the whole table: what it breaks is accepted as it was.
TEST(GgufMalformedTable, TheUnbrokenImageIsAccepted) {
  const GgufImage image = valid_gguf_image();
  const GgufFile file = GgufFile::parse(image.bytes(), "valid.gguf");
  EXPECT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.values().size(), 7u);
  EXPECT_GE(all_cases().size(), 35u);
}

TEST(GgufMalformedTable, EveryTruncationIsRefused) {
  for (std::size_t size = 0; size < valid_gguf_image().size(); ++size) {
    GgufImage image = valid_gguf_image();
    image.truncate(size);
    EXPECT_THROW(static_cast<void>(GgufFile::parse(image.bytes(), "cut")), FormatError) << size << " bytes";
  }
}

/// What a caller may do with a file that was accepted: read all of it.
void touch_everything(const GgufFile& file) {
  int sum = 0;
  for (const GgufTensor& tensor : file.tensors()) {
    for (const std::byte byte : tensor.data) sum += std::to_integer<int>(byte);
    RC_ASSERT(file.find_tensor(tensor.name) == &tensor);
  }
  for (const auto& [key, value] : file.values()) {
    for (const std::byte byte : value.bytes) sum += std::to_integer<int>(byte);
    if (value.element == GgufType::kString && value.is_array())
      RC_ASSERT(file.array<std::string>(key).size() == value.count);
  }
  RC_ASSERT(sum >= 0);
}

RC_GTEST_PROP(GgufMalformedTable, AnyDamagedBytesAreReadOrRefused, ()) {
  GgufImage image = valid_gguf_image();
  std::vector<std::byte> bytes(image.bytes().begin(), image.bytes().end());
  const auto n_damage = *rc::gen::inRange<std::size_t>(1, 6);
  for (std::size_t damage = 0; damage < n_damage; ++damage) {
    const auto index = *rc::gen::inRange<std::size_t>(0, bytes.size());
    bytes[index] = static_cast<std::byte>(*rc::gen::element(0, 1, 2, 8, 9, 127, 128, 255));
  }
  try {
    touch_everything(GgufFile::parse(bytes, "damaged"));
  } catch (const FormatError&) {
    RC_TAG("refused");
    return;
  }
  RC_TAG("accepted");
}

}  // namespace
}  // namespace gemma4
