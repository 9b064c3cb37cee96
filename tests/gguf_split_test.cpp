// SPDX-License-Identifier: Apache-2.0
#include "gemma4/gguf/gguf_split.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/gguf_split_writer.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/model/weights.hpp"
#include "tests/support/gguf_edit.hpp"
#include "tests/support/temp_dir.hpp"

/// Models in several files: opened by the first, held to their numbers, and the same as in one.
namespace {

using namespace gemma4;
using testkit::GgufEdit;
using testkit::micro_model;
using testkit::TempDir;

/// The micro model as gguf-split writes it: all metadata in the first part, no more than its place in the others.
struct Split {
  explicit Split(std::size_t n_part) {
    const GgufEdit whole = micro_model();
    whole.write(folder.file("whole.gguf"));
    GgufEdit tensors = whole;
    const std::size_t n = tensors.tensors().size();
    for (std::size_t no = 0; no < n_part; ++no) {
      GgufEdit part = whole;
      if (no > 0) part.drop_keys();
      part.tensors().assign(tensors.tensors().begin() + static_cast<std::ptrdiff_t>(no * n / n_part),
                            tensors.tensors().begin() + static_cast<std::ptrdiff_t>((no + 1) * n / n_part));
      part.set("split.no", static_cast<std::uint16_t>(no)).set("split.count", static_cast<std::uint16_t>(n_part));
      part.set("split.tensors.count", static_cast<std::int32_t>(n));
      parts.push_back(std::move(part));
    }
  }

  [[nodiscard]] std::filesystem::path path(std::size_t no) const {
    return split_name(folder.file("m").string(),
                      {static_cast<std::int64_t>(no), static_cast<std::int64_t>(parts.size())});
  }
  void write() const {
    for (std::size_t no = 0; no < parts.size(); ++no) parts[no].write(path(no));
  }
  /// What opening `name` says; empty when it opens.
  [[nodiscard]] std::string refusal(const std::filesystem::path& name) const {
    write();
    try {
      static_cast<void>(GgufFile::open(name));
    } catch (const FormatError& error) {
      return error.what();
    }
    return "";
  }
  [[nodiscard]] std::string refusal() const { return refusal(path(0)); }

  TempDir folder;
  std::vector<GgufEdit> parts;
};

testing::AssertionResult says(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    if (message.find(part) == std::string::npos) {
      return testing::AssertionFailure() << "the message lacks '" << part << "': " << message;
    }
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult same_tensors(const GgufFile& a, const GgufFile& b) {
  if (a.tensors().size() != b.tensors().size()) return testing::AssertionFailure() << "another number of tensors";
  for (std::size_t i = 0; i < a.tensors().size(); ++i) {
    const GgufTensor &x = a.tensors()[i], &y = b.tensors()[i];
    if (x.name != y.name || x.type != y.type || x.dims != y.dims || !std::ranges::equal(x.data, y.data)) {
      return testing::AssertionFailure() << x.name << " differs from " << y.name;
    }
    if (a.find_tensor(x.name) != &x) return testing::AssertionFailure() << x.name << " is not found by its name";
  }
  return testing::AssertionSuccess();
}

TEST(GgufSplit, AnyNumberOfPartsIsTheWholeFile) {
  for (const std::size_t n_part : {1, 2, 5, 30}) {
    const Split split(n_part);
    split.write();
    GgufFile opened = GgufFile::open(split.path(0));
    const GgufFile joined = std::move(opened);  // the mappings move with it
    const GgufFile whole = GgufFile::open(split.folder.file("whole.gguf"));
    EXPECT_TRUE(same_tensors(joined, whole)) << n_part << " parts";
    EXPECT_EQ(joined.n_part(), static_cast<std::int64_t>(n_part));
    EXPECT_EQ(model_tensors(joined), model_tensors(whole));
    EXPECT_EQ(weights_from_gguf(joined).config, weights_from_gguf(whole).config);
    EXPECT_EQ(joined.get<std::string>("general.name"), whole.get<std::string>("general.name"));
  }
}

TEST(GgufSplit, TheFirstPartMayHoldNothingButMetadata) {
  Split split(2);
  auto& first = split.parts[0].tensors();
  split.parts[1].tensors().insert(split.parts[1].tensors().begin(), first.begin(), first.end());
  first.clear();
  EXPECT_EQ(split.refusal(), "");
  EXPECT_TRUE(same_tensors(GgufFile::open(split.path(0)), GgufFile::open(split.folder.file("whole.gguf"))));
}

TEST(GgufSplit, AnotherPartThanTheFirstIsRefusedByItsNumber) {
  const Split split(3);
  EXPECT_TRUE(says(split.refusal(split.path(1)), {"is part 2 of 3: name the first", split.path(0).string()}));
  EXPECT_TRUE(says(split.refusal(split.path(2)), {"is part 3 of 3: name the first"}));
  std::filesystem::rename(split.path(1), split.folder.file("second.gguf"));
  try {
    static_cast<void>(GgufFile::open(split.folder.file("second.gguf")));
    FAIL() << "a part under another name";
  } catch (const FormatError& error) {
    EXPECT_TRUE(says(error.what(), {"is part 2 of 3: name the first"}));
  }
}

TEST(GgufSplit, AMissingPartIsNamedByItsNumber) {
  const Split split(4);
  split.write();
  std::filesystem::remove(split.path(2));
  try {
    static_cast<void>(GgufFile::open(split.path(0)));
    FAIL() << "a part is missing";
  } catch (const FormatError& error) {
    EXPECT_TRUE(says(error.what(), {"part 3 of 4 is missing", split.path(2).string()}));
  }
}

TEST(GgufSplit, SwappedPartsAreNamedByTheirNumbers) {
  Split split(3);
  std::swap(split.parts[1], split.parts[2]);
  EXPECT_TRUE(says(split.refusal(), {split.path(1).string(), "expected part 2 of 3, its keys say part 3 of 3"}));
  Split first(2);
  std::swap(first.parts[0], first.parts[1]);
  EXPECT_TRUE(says(first.refusal(), {"is named part 1 of 2", "it is part 2 of 2", "swapped"}));
}

TEST(GgufSplit, PartsAreLookedForBesideTheFirst) {
  const Split split(2);
  split.write();
  const std::filesystem::path elsewhere = split.folder.file("elsewhere");
  std::filesystem::create_directory(elsewhere);
  const auto moved = elsewhere / split.path(1).filename();
  std::filesystem::rename(split.path(1), moved);
  EXPECT_THROW(static_cast<void>(GgufFile::open(split.path(0))), FormatError);
  std::filesystem::create_symlink(moved, split.path(1));  // as a download cache keeps its files
  EXPECT_EQ(GgufFile::open(split.path(0)).n_part(), 2);
}

TEST(GgufSplit, TheFirstMustBearItsName) {
  Split split(2);
  split.write();
  std::filesystem::rename(split.path(0), split.folder.file("model.gguf"));
  try {
    static_cast<void>(GgufFile::open(split.folder.file("model.gguf")));
    FAIL() << "the others cannot be found";
  } catch (const FormatError& error) {
    EXPECT_TRUE(says(error.what(), {"is part 1 of 2", "-00001-of-00002.gguf"}));
  }
}

TEST(GgufSplit, KeysThatNameNoPlaceAreRefused) {
  const auto with = [](const std::function<void(GgufEdit&)>& change, std::size_t part = 0) {
    Split split(2);
    change(split.parts[part]);
    return split.refusal();
  };
  const auto count = [](auto value) { return [value](GgufEdit& edit) { edit.set("split.count", value); }; };
  const auto no = [](auto value) { return [value](GgufEdit& edit) { edit.set("split.no", value); }; };
  EXPECT_TRUE(says(with(count(std::uint16_t{0})), {"split.count is 0, expected 1 to 99999"}));
  EXPECT_TRUE(says(with(count(std::int32_t{-2})), {"split.count is -2"}));
  EXPECT_TRUE(says(with(count(std::uint32_t{4'000'000'000u})), {"split.count is 4000000000"}));
  EXPECT_TRUE(says(with(count(~std::uint64_t{0})), {"split.count"}));
  EXPECT_TRUE(says(with(count(2.0f)), {"split.count"}));
  EXPECT_TRUE(says(with(count(std::uint16_t{3})), {"is named part 1 of 2", "part 1 of 3"}));
  EXPECT_TRUE(says(with(no(std::uint16_t{2})), {"split.no is 2, expected 0 to split.count - 1 = 1"}));
  EXPECT_TRUE(says(with(no(std::int16_t{-1})), {"split.no is -1"}));
  EXPECT_TRUE(says(with([](GgufEdit& edit) { edit.drop_key("split.no"); }), {"split.no", "missing"}));
  EXPECT_TRUE(says(with([](GgufEdit& edit) { edit.drop_key("split.count"); }), {"split.count", "missing"}));
  EXPECT_TRUE(says(with([](GgufEdit& edit) { edit.drop_key("split.no").drop_key("split.count"); }, 1),
                   {"expected part 2 of 2, found a file without the key split.no"}));
  EXPECT_TRUE(says(with(count(std::uint16_t{3}), 1), {"expected part 2 of 2, its keys say part 2 of 3"}));
}

TEST(GgufSplit, TensorsAreThoseOfOneModelOnceEach) {
  Split fewer(2);
  fewer.parts[1].tensors().pop_back();
  EXPECT_TRUE(says(fewer.refusal(), {"split.tensors.count is 30, the 2 parts hold 29"}));
  Split twice(2);
  twice.parts[1].tensors().push_back(twice.parts[0].tensors().front());
  EXPECT_TRUE(says(twice.refusal(), {"tensor 'output_norm.weight' is in part 1 and in part 2"}));
  Split negative(2);
  negative.parts[0].set("split.tensors.count", std::int32_t{-1});
  negative.parts[1].set("split.tensors.count", std::int32_t{-1});
  EXPECT_TRUE(says(negative.refusal(), {"split.tensors.count is -1"}));
  Split silent(2);
  for (GgufEdit& part : silent.parts) part.drop_key("split.tensors.count");
  EXPECT_EQ(silent.refusal(), "") << "the control: no one has to count";
}

TEST(GgufSplit, PartsOfDifferentModelsAreRefused) {
  Split other(2);
  other.parts[1].set("split.tensors.count", std::int32_t{31});
  EXPECT_TRUE(says(other.refusal(), {"key 'split.tensors.count' differs from that of"}));
  Split named(2);
  named.parts[1].set("general.architecture", std::string("llama"));
  EXPECT_TRUE(says(named.refusal(), {"key 'general.architecture' differs from that of"}));
  Split same(2);  // the control: some writers repeat what the first part says
  same.parts[1].set("general.architecture", std::string("gemma4")).set("general.alignment", std::uint32_t{32});
  EXPECT_EQ(same.refusal(), "");
}

TEST(GgufSplit, APartThatIsNoGgufIsNamed) {
  const Split split(2);
  split.write();
  std::filesystem::resize_file(split.path(1), 100);
  try {
    static_cast<void>(GgufFile::open(split.path(0)));
    FAIL() << "half a part";
  } catch (const FormatError& error) {
    EXPECT_TRUE(says(error.what(), {split.path(1).string()}));
  }
  std::filesystem::remove(split.path(1));
  std::filesystem::create_directory(split.path(1));
  EXPECT_THROW(static_cast<void>(GgufFile::open(split.path(0))), FormatError);
}

TEST(GgufSplit, NamesAreReadAsTheyAreWritten) {
  const std::string name = split_name("dir/a-b", {1, 12});
  EXPECT_EQ(name, "dir/a-b-00002-of-00012.gguf");
  const auto parsed = parse_split_name(name);
  ASSERT_TRUE(parsed.has_value());
  EXPECT_EQ(parsed->first, "dir/a-b");
  EXPECT_EQ(parsed->second, (SplitPlace{1, 12}));
  for (const char* other : {"", ".gguf", "-00001-of-00002.gguf", "a-00001-of-00002", "a-00000-of-00002.gguf",
                            "a-00003-of-00002.gguf", "a-0001-of-00002.gguf", "a-0000x-of-00002.gguf",
                            "a_00001-of-00002.gguf", "a-00001-of-00002.GGUF", "a-00001-oF-00002.gguf"}) {
    EXPECT_FALSE(parse_split_name(other).has_value()) << other;
  }
  EXPECT_THROW(static_cast<void>(split_name("a", {2, 2})), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(split_name("a", {0, 100000})), std::invalid_argument);
}

TEST(GgufSplit, ASyntheticModelInPartsIsTheSameModel) {
  const TempDir folder;
  const ModelConfig config = testkit::micro_config();
  write_synthetic_model(folder.file("one.gguf"), config, {.seed = 3});
  const GgufFile one = GgufFile::open(folder.file("one.gguf"));
  for (const std::int64_t limit : {std::int64_t{1}, std::int64_t{100'000}, std::int64_t{1} << 40}) {
    const auto files = write_synthetic_model(folder.file("m.gguf"), config, {.seed = 3, .split_max_bytes = limit});
    const GgufFile parts = GgufFile::open(files.front());
    EXPECT_TRUE(same_tensors(parts, one)) << limit;
    EXPECT_EQ(parts.n_part(), static_cast<std::int64_t>(files.size()));
    std::int64_t before = limit;  // so that the first part has nothing to take from
    for (const auto& file : files) {
      const auto parsed = parse_split_name(file.string());
      ASSERT_TRUE(parsed.has_value());
      EXPECT_EQ(parsed->first, folder.file("m").string());
      std::vector<std::byte> image(std::filesystem::file_size(file));
      std::ifstream(file, std::ios::binary).read(reinterpret_cast<char*>(image.data()), std::ssize(image));
      const auto part = model_tensors(GgufFile::parse(image, file.string()));
      EXPECT_TRUE(part.size() == 1 || total_bytes(part) <= limit);
      EXPECT_GT(before + part.front().bytes(), limit) << "would have fitted into the part before";
      before = total_bytes(part);
    }
  }
}

TEST(GgufSplit, AWriterThatFailsLeavesNoPart) {
  const TempDir folder;
  const std::vector<ModelTensor> tensors = {{"a", TensorType::kF32, {4}}, {"b", TensorType::kF32, {4}}};
  const std::vector<std::byte> data(16);
  GgufSplitWriter writer(folder.file("m.gguf"), tensors, 16, [](GgufWriter& first) { first.set("key", true); });
  ASSERT_EQ(writer.paths().size(), 2u);
  writer.write_at(1, 0, data);  // and never the first
  EXPECT_THROW(writer.finish(), std::invalid_argument);
  EXPECT_TRUE(std::ranges::none_of(writer.paths(), [](const auto& path) { return std::filesystem::exists(path); }));
  writer.write_at(0, 0, data);
}

}  // namespace
