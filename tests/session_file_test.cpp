// SPDX-License-Identifier: Apache-2.0
#include "gemma4/session/session_reader.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "gemma4/interrupt.hpp"
#include "gemma4/session/block_hash.hpp"
#include "gemma4/session/session_writer.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/temp_dir.hpp"
#include "tests/support/toy_session.hpp"

/// The container of sessions: what went in comes out, what was damaged is seen, and a file that is there is whole.
namespace {

using namespace gemma4;
using testkit::TempDir;
using testkit::toy_tokens;
using testkit::ToyOptions;
using testkit::ToySession;
using Bytes = std::vector<std::byte>;

Bytes read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

/// Success when `call` throws a FormatError whose message holds each of `parts`.
template <class TCall>
testing::AssertionResult is_refused(const TCall& call, const std::vector<std::string>& parts = {}) {
  try {
    call();
  } catch (const FormatError& error) {
    const std::string message = error.what();
    for (const std::string& part : parts) {
      if (message.find(part) == message.npos) return testing::AssertionFailure() << "no '" << part << "': " << message;
    }
    return testing::AssertionSuccess() << message;
  }
  return testing::AssertionFailure() << "it was taken";
}

// ---- the file

/// A short session with all that a file can hold, of a few KB.
ToyOptions small() {
  return {.context = 64, .window = 6, .spare = 2, .n_head = 2, .tail = 3};
}

struct SavedToy {
  explicit SavedToy(const ToyOptions& options = small(), std::int64_t n_token = 41) {
    ToySession session(options);
    session.prefill(toy_tokens(n_token), 7);
    session.save(path());
    next = session.go_on(toy_tokens(5, 3));
    bytes = read_bytes(path());
  }
  [[nodiscard]] std::filesystem::path path() const { return folder.file("a.session"); }
  TempDir folder;
  Bytes bytes;
  std::vector<float> next;  ///< logits of what followed
};

TEST(SessionFile, GivesBackWhatWentIn) {
  const SavedToy saved;
  const SessionFile file = SessionFile::open(saved.path());
  const SessionInfo& info = file.info();
  EXPECT_EQ(info.tokens, toy_tokens(41));
  EXPECT_EQ(info.passes, (std::vector<std::int64_t>{7, 7, 7, 7, 7, 6}));
  EXPECT_EQ(info.position, 41);
  EXPECT_EQ(info.context, 64);
  EXPECT_EQ(info.ring_first, 34);
  EXPECT_EQ(info.checkpoints, (std::vector<std::int64_t>{21, 35}));
  EXPECT_EQ(info.checkpoint_policy, CheckpointPolicy{.interval = 16});
  EXPECT_EQ(info.model_hash, testkit::kToyModel);
  EXPECT_EQ(info.cache, "bf16");
  EXPECT_EQ(info.ring, "bf16");
  EXPECT_EQ(info.note, "as it was");
  EXPECT_EQ(info.sampler.temperature, 0.5f);
  EXPECT_EQ(info.sampler.top_k, 7);
  EXPECT_EQ(info.sampler.top_p, 0.25f);
  EXPECT_EQ(info.sampler.seed, 9u);
  EXPECT_EQ(info.logits.size(), static_cast<std::size_t>(testkit::ToyCache::kVocab));
  // Rows, a few numbers and the header: nothing of the context's length, and no slot twice.
  const std::size_t rows = 2 * 8 * (41 + 2 * 8), kept = 2 * (2 * 2 * 8 * 6 + 2 * 8 * 3);
  const std::size_t numbers = 41 * 4 + 6 * 8 + 50 * 4 + 10 * 8;
  EXPECT_LT(saved.bytes.size(), rows + kept + numbers + 2500);
}

TEST(SessionFile, ASequenceWithoutTokensIsOneToo) {
  const TempDir folder;
  ToySession(small()).save(folder.file("empty"));
  const SessionFile file = SessionFile::open(folder.file("empty"));
  EXPECT_EQ(file.n_tensor(), 1u) << "the checksums alone";
  ToySession session(small()), fresh(small());
  session.prefill(toy_tokens(9, 5), 4);
  session.restore(file);
  EXPECT_EQ(session.model.position(), 0);
  EXPECT_EQ(session.go_on(toy_tokens(20)), fresh.go_on(toy_tokens(20)));
}

/// Blocks of 1 MiB: more than one a tensor.
TEST(SessionFile, BlocksAreCheckedOneByOne) {
  const ToyOptions options{.is_sliding = {0}, .context = 80000, .max_chunk = 100, .n_head = 2};
  const TempDir folder;
  ToySession session(options, {});
  // The rows' bytes alone matter: that many tokens would take the toy minutes.
  session.backend.set_position(70000, 70000);
  session.model.resume(std::vector<std::int64_t>(700, 100), 70000);
  session.tokens = toy_tokens(70000);
  session.store.save(folder.file("a"), {.model_hash = testkit::kToyModel, .tokens = session.tokens});
  Bytes bytes = read_bytes(folder.file("a"));
  const SessionFile file = SessionFile::parse(bytes, "a");
  const GgufTensor& rows = file.tensor("layer.0.rows", {8, 70000, 2});
  std::vector<std::size_t> offsets;
  const auto note = [&](std::size_t offset, std::span<const std::byte>) { offsets.push_back(offset); };
  file.read(std::vector<SessionTarget>{{.tensor = &rows, .visit = note}});
  EXPECT_EQ(offsets, (std::vector<std::size_t>{0, kSessionBlock}));
  bytes[rows.file_offset + kSessionBlock + 5] ^= std::byte{1};
  const SessionFile damaged = SessionFile::parse(bytes, "a");
  std::size_t n_seen = 0;
  EXPECT_TRUE(is_refused(
      [&] {
        const auto count = [&](std::size_t, std::span<const std::byte>) { ++n_seen; };
        const GgufTensor& tensor = damaged.tensor("layer.0.rows", {8, 70000, 2});
        damaged.read(std::vector<SessionTarget>{{.tensor = &tensor, .visit = count}});
      },
      {"'layer.0.rows'", "bytes 1048576 to 1120000", "checksum"}));
  EXPECT_EQ(n_seen, 1u);
  // Two blocks that change places have the same bytes, and not the same checksums.
  std::swap_ranges(bytes.begin() + static_cast<std::ptrdiff_t>(rows.file_offset),
                   bytes.begin() + static_cast<std::ptrdiff_t>(rows.file_offset) + 100,
                   bytes.begin() + static_cast<std::ptrdiff_t>(rows.file_offset) + 100);
  EXPECT_TRUE(is_refused([&] { ToySession(options, {}).restore(SessionFile::parse(bytes, "a")); }, {"'layer.0.rows'"}));
}

/// Whether a session takes the bytes; where it does not, it must be as it was or empty, and good for more.
testing::AssertionResult is_seen(const Bytes& bytes) {
  ToySession session(small()), fresh(small());
  session.prefill(toy_tokens(20, 2), 5);
  const std::vector<std::int32_t> before = session.tokens;
  const testing::AssertionResult refused = is_refused([&] { session.restore(SessionFile::parse(bytes, "damaged")); });
  if (!refused) return refused;
  const std::int64_t position = session.model.position();
  if (position != 0 && position != 20) return testing::AssertionFailure() << "left at " << position;
  fresh.prefill(std::span(before).first(static_cast<std::size_t>(position)), 5);
  if (session.go_on(toy_tokens(3, 8)) != fresh.go_on(toy_tokens(3, 8))) {
    return testing::AssertionFailure() << "the sequence is not what it was, nor empty";
  }
  return refused;
}

TEST(SessionFile, EveryTruncationIsRefused) {
  const SavedToy saved;
  for (std::size_t size = 0; size < saved.bytes.size(); ++size) {
    ASSERT_TRUE(is_seen(Bytes(saved.bytes.begin(), saved.bytes.begin() + static_cast<std::ptrdiff_t>(size))))
        << size << " of " << saved.bytes.size() << " bytes";
  }
  for (const std::size_t more : {1, 32, 1000}) {
    Bytes longer = saved.bytes;
    longer.resize(longer.size() + more);
    EXPECT_TRUE(is_seen(longer)) << more << " bytes more";
  }
  ToySession control(small());
  control.restore(SessionFile::parse(saved.bytes, "whole"));
  EXPECT_EQ(control.go_on(toy_tokens(5, 3)), saved.next) << "the control, which nothing happened to";
}

TEST(SessionFile, EveryFlippedByteIsRefused) {
  const SavedToy saved;
  std::mt19937_64 random(5);
  std::size_t n_checksum = 0;
  for (int i = 0; i < 10000; ++i) {
    Bytes bytes = saved.bytes;
    const std::size_t at = random() % bytes.size();
    const auto change = static_cast<std::byte>(1 + random() % 255);
    bytes[at] ^= change;
    const testing::AssertionResult seen = is_seen(bytes);
    ASSERT_TRUE(seen) << "byte " << at << " of " << bytes.size() << " changed by " << std::to_integer<int>(change);
    n_checksum += std::string(seen.message()).find("checksum") != std::string::npos;
  }
  EXPECT_GT(n_checksum, 5000u) << "most bytes are numbers that anything could be: only a checksum tells";
}

/// The bytes with every checksum set right: what only a forger could write.
void reseal(Bytes& bytes) {
  const GgufFile file = GgufFile::parse(bytes, "resealed");
  std::vector<std::uint64_t> hashes = {block_hash(std::span(bytes).first(file.tensors().front().file_offset), 0)};
  for (const GgufTensor& tensor : file.tensors()) {
    if (tensor.name == kChecksumsTensor) continue;
    for (std::size_t at = 0; at < tensor.data.size(); at += kSessionBlock) {
      hashes.push_back(
          block_hash(tensor.data.subspan(at, std::min(kSessionBlock, tensor.data.size() - at)), hashes.size()));
    }
  }
  const auto sealed = std::as_bytes(std::span(hashes));
  std::ranges::copy(sealed, bytes.begin() + static_cast<std::ptrdiff_t>(file.tensors().back().file_offset));
}

/// The control of both: with its checksum set right a changed byte is taken, and the logits show it.
TEST(SessionFile, ItIsTheChecksumThatSees) {
  const SavedToy saved;
  Bytes bytes = saved.bytes;
  bytes[SessionFile::parse(saved.bytes, "whole").tensor("layer.1.rows", {8, 41, 2}).file_offset + 9] ^= std::byte{4};
  EXPECT_TRUE(is_seen(bytes));
  reseal(bytes);
  ToySession session(small());
  session.restore(SessionFile::parse(bytes, "resealed"));
  EXPECT_NE(session.go_on(toy_tokens(5, 3)), saved.next);
  Bytes same = saved.bytes;
  reseal(same);
  EXPECT_EQ(same, saved.bytes);
}

// ---- what another program may have written

/// A session of the toy with something of its info changed, its checksums right.
testing::AssertionResult is_taken_with(const std::function<void(SessionInfo&)>& change) {
  const SavedToy saved;
  const SessionFile file = SessionFile::open(saved.path());
  SessionInfo info = file.info();
  change(info);
  const GgufFile gguf = GgufFile::parse(saved.bytes, "whole");
  std::vector<SessionTensor> tensors;
  for (const GgufTensor& tensor : gguf.tensors()) {
    if (!tensor.name.starts_with("layer.") && !tensor.name.starts_with("checkpoint.")) continue;
    tensors.push_back({.name = tensor.name, .type = tensor.type, .dims = tensor.dims, .host = tensor.data});
  }
  const TempDir folder;
  write_session(folder.file("b"), info, std::move(tensors));
  return is_seen(read_bytes(folder.file("b")));
}

TEST(SessionFile, WhatContradictsItselfIsRefused) {
  EXPECT_FALSE(is_taken_with([](SessionInfo&) {})) << "the control";
  const std::vector<std::pair<std::string, std::function<void(SessionInfo&)>>> changes = {
      {"session.position 42", [](auto& info) { ++info.position; }},
      {"a pass of 6", [](auto& info) { --info.position; }},
      {"session.ring_first 42", [](auto& info) { info.ring_first = 42; }},
      {"session.ring_first -1", [](auto& info) { info.ring_first = -1; }},
      {"too late", [](auto& info) { info.ring_first = 37; }},
      {"session.context 40", [](auto& info) { info.context = 40; }},
      {"session.context 0", [](auto& info) { info.context = 0; }},
      {"a pass of 0", [](auto& info) { info.passes[2] = 0, info.passes[1] = 14; }},
      {"a pass of -1", [](auto& info) { info.passes[2] = -1; }},
      {"a pass of 9223372036854775807", [](auto& info) { info.passes[1] = INT64_MAX; }},
      {"passes of 35", [](auto& info) { info.passes.pop_back(); }},
      {"session.checkpoints[1]", [](auto& info) { info.checkpoints[1] = 34; }},
      {"session.checkpoints[1]", [](auto& info) { info.checkpoints[1] = 21; }},
      {"session.checkpoints[0]", [](auto& info) { info.checkpoints[0] = 0; }},
      {"'checkpoint.41'", [](auto& info) { info.checkpoints.push_back(41); }},
      {"interval -1", [](auto& info) { info.checkpoint_policy.interval = -1; }},
      {"near interval -5", [](auto& info) { info.checkpoint_policy.near_interval = -5; }},
      {"5 near tokens", [](auto& info) { info.checkpoint_policy.near_tokens = 5; }},
      {"token 50", [](auto& info) { info.tokens[3] = 50; }},
      {"token -1", [](auto& info) { info.tokens[40] = -1; }},
      {"49 logits", [](auto& info) { info.logits.pop_back(); }},
      {"top_p 2", [](auto& info) { info.sampler.top_p = 2; }},
      {"temperature", [](auto& info) { info.sampler.temperature = -1; }},
  };
  for (const auto& [said, change] : changes) {
    const testing::AssertionResult seen = is_taken_with(change);
    EXPECT_TRUE(seen) << said;
    EXPECT_NE(std::string(seen.message()).find(said), std::string::npos) << said << ": " << seen.message();
  }
}

TEST(SessionFile, WhatIsNoSessionIsRefused) {
  const TempDir folder;
  GgufWriter other(folder.file("model"));
  other.set("general.architecture", std::string("gemma4"));
  other.finish();
  EXPECT_TRUE(is_refused([&] { (void)SessionFile::open(folder.file("model")); }, {"'gemma4'", "no session"}));
  EXPECT_THROW((void)SessionFile::open(folder.file("nothing")), std::system_error);
  SavedToy saved;
  // The version is looked at before all else: a later one may have everything elsewhere.
  const std::string key = "session.version";
  const auto text = std::as_bytes(std::span(key));
  const auto at = std::ranges::search(saved.bytes, text).end() - saved.bytes.begin() + 4;
  saved.bytes[static_cast<std::size_t>(at)] = std::byte{2};
  EXPECT_TRUE(is_refused([&] { (void)SessionFile::parse(saved.bytes, "a"); }, {"session.version 2", "reads 1"}));
}

TEST(SessionFile, WhatDoesNotSuitIsRefusedByNameAndValue) {
  const SavedToy saved;
  const SessionFile file = SessionFile::open(saved.path());
  const auto refuses = [&](const ToyOptions& options, std::uint64_t hash, const std::vector<std::string>& parts) {
    ToySession session(options), fresh(options);
    session.prefill(toy_tokens(10), 5);
    fresh.prefill(toy_tokens(10), 5);
    const auto restore = [&] {
      try {
        session.restore(file, hash);
      } catch (const FormatError& error) {
        throw std::invalid_argument(error.what());
      }
    };
    const testing::AssertionResult refused = testkit::refuses(restore, parts);
    EXPECT_EQ(session.go_on(toy_tokens(3)), fresh.go_on(toy_tokens(3))) << "it was not left as it was";
    return refused;
  };
  ToyOptions options = small();
  EXPECT_TRUE(refuses(options, 78, {"0x4d", "0x4e", "model"}));
  options.cache = parse_cache_spec("tq4");
  EXPECT_TRUE(refuses(options, testkit::kToyModel, {"'bf16'", "'tq4'"}));
  options = small();
  options.ring = parse_ring_spec("sim-int8");
  EXPECT_TRUE(refuses(options, testkit::kToyModel, {"ring is 'bf16'", "'sim-int8'"}));
  options = small();
  options.context = 40;
  EXPECT_TRUE(refuses(options, testkit::kToyModel, {"41 tokens", "context is 40"}));
  options = small();
  options.part = "records";
  EXPECT_TRUE(refuses(options, testkit::kToyModel, {"'layer.0.records'", "another layout"}));
  options = small();
  options.n_head = 1;
  EXPECT_TRUE(refuses(options, testkit::kToyModel, {"'layer.0.rows'", "[8, 7, 2]", "[8, 7, 1]"}));
}

TEST(SessionFile, SeedsAreOfWhatIsRandom) {
  for (const char* name : {"tq4", "kv5r4", "sim-int8-had", "sim-kvarn-k4v2"}) {
    EXPECT_EQ(seed_of(with_seed(parse_cache_spec(name), 7)), 7u) << name;
  }
  EXPECT_EQ(seed_of(with_seed(parse_cache_spec("bf16"), 7)), 0u);
  EXPECT_EQ(seed_of(with_seed(parse_ring_spec("sim-int8-had"), 7)), 7u);
  EXPECT_EQ(seed_of(RingSpec()), 0u);
  SessionInfo info{.cache = "tq4", .ring = "bf16", .cache_seed = 3, .context = 9};
  EXPECT_TRUE(testkit::refuses([&] { require_session_suits("a", info, 0, parse_cache_spec("tq4"), {}, 9); },
                               {"a: the seed of its cache 'tq4' is 3", "this run's 0"}));
  require_session_suits("a", info, 0, with_seed(parse_cache_spec("tq4"), 3), {}, 9);
}

// ---- writing

/// @return exit status of a child that saves a session with `limit` bytes of room for a file
int saves_with_room(const std::filesystem::path& path, rlim_t limit) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    catch_interrupts();
    rlimit room{limit, limit};
    ::setrlimit(RLIMIT_FSIZE, &room);
    try {
      ToySession session(small());
      session.prefill(toy_tokens(50), 7);
      session.save(path);
    } catch (const std::system_error& error) {
      ::_exit(error.code() == std::errc::file_too_large ? 42 : 43);
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(SessionFile, AFullDiskLeavesTheOldFile) {
  const SavedToy saved;
  for (const rlim_t limit : {0, 1, 1000, 3000}) {
    EXPECT_EQ(saves_with_room(saved.path(), limit), 42) << limit;
    EXPECT_EQ(read_bytes(saved.path()), saved.bytes) << limit;
    EXPECT_EQ(saved.folder.names(), std::vector<std::string>{"a.session"}) << limit;
  }
  EXPECT_EQ(saves_with_room(saved.path(), 1000000), 0) << "the control, which has room";
  EXPECT_NE(read_bytes(saved.path()), saved.bytes);
  EXPECT_EQ(saved.folder.names(), std::vector<std::string>{"a.session"});
}

/// A failure in the middle, where caches cannot be read.
TEST(SessionFile, AFailureHalfwayLeavesTheOldFile) {
  const SavedToy saved;
  std::vector<SessionTensor> tensors = {{"layer.0.rows", TensorType::kI8, {100}, [](std::size_t, std::span<std::byte>) {
                                           throw std::runtime_error("no device");
                                         }}};
  EXPECT_THROW(write_session(saved.path(), {}, std::move(tensors)), std::runtime_error);
  EXPECT_EQ(read_bytes(saved.path()), saved.bytes);
  EXPECT_EQ(saved.folder.names(), std::vector<std::string>{"a.session"});
}

}  // namespace
