// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/session/model_fingerprint.hpp"
#include "gemma4/session/sequence_store.hpp"
#include "reference/backend.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/property.hpp"
#include "tests/support/small_model.hpp"
#include "tests/support/temp_dir.hpp"

/// The reference's sequences, saved, restored, branched and taken back, for every cache format: the logits of what
/// follows are those of a sequence that nothing happened to, to the bit. tests/sequence_store_test.cpp holds the same
/// against a model of whole numbers, in many more ways.
namespace {

using namespace gemma4;
using testkit::rc_require;
using testkit::same_rows;
using testkit::SmallModel;
using testkit::TempDir;
using Backend = reference::Backend<float>;
using Ids = std::vector<std::int32_t>;

constexpr std::int64_t kVocab = 300, kWindow = 7, kRing = ring_slots(kWindow);
constexpr std::int64_t kContext = 2 * kRing + 60;

const SmallModel& small() {
  static const auto model = [] {
    ModelConfig config = gemma4_tiny();
    config.context = 4096;
    config.window = kWindow;
    config.vocab = kVocab;
    config.ffn_hidden = 256;
    config.is_sliding = {1, 0};
    return std::make_unique<SmallModel>(config, 10);
  }();
  return *model;
}

Ids ids(std::int64_t count, std::int64_t seed = 1) {
  Ids tokens;
  for (std::int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<std::int32_t>((i * i * 7 + i * seed + 3) % kVocab));
  return tokens;
}

struct Wish {
  const char* cache = "bf16";
  const char* ring = "bf16";
  std::int64_t context = kContext;
  std::int64_t max_chunk = 32;
  CheckpointPolicy checkpoints = {.interval = 40};
};

struct Reader {
  explicit Reader(const Wish& wish)
      : backend(small().weights, {.cache = parse_cache_spec(wish.cache),
                                  .context = wish.context,
                                  .max_chunk = wish.max_chunk,
                                  .ring = parse_ring_spec(wish.ring)}),
        model(backend),
        store(model, wish.checkpoints) {}
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  void pass(std::span<const std::int32_t> some) {
    const std::vector<std::int64_t> last = {static_cast<std::int64_t>(some.size()) - 1};
    model.forward(some, last);
    tokens.insert(tokens.end(), some.begin(), some.end());
    store.noted();
  }
  void prefill(std::span<const std::int32_t> some, std::int64_t chunk) {
    for (std::size_t at = 0; at < some.size(); at += static_cast<std::size_t>(chunk)) {
      pass(some.subspan(at, std::min(static_cast<std::size_t>(chunk), some.size() - at)));
    }
  }
  std::vector<float> go_on(std::span<const std::int32_t> next) {
    std::vector<float> all;
    std::vector<float> row(kVocab);
    for (const std::int32_t token : next) {
      pass(std::span(&token, 1));
      backend.copy_logits(0, row);
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }
  void rewind(std::int64_t to) {
    store.rewind(tokens, to);
    tokens.resize(static_cast<std::size_t>(to));
    poison();
  }
  void save(const std::filesystem::path& path) {
    std::vector<float> logits(kVocab);
    if (!tokens.empty()) backend.copy_logits(0, logits);
    if (tokens.empty()) logits.clear();
    store.save(path, {.model_hash = model_fingerprint(*small().file), .tokens = tokens, .logits = logits});
  }
  void restore(const std::filesystem::path& path) {
    tokens = store.restore(SessionFile::open(path), model_fingerprint(*small().file)).tokens;
    poison();
  }
  /// What no token to come may look at: rows beyond the tokens, and slots of tokens that never were.
  void poison() {
    const std::int64_t position = model.position();
    for (const StoredLayer& layer : backend.stored_layers()) {
      for (const StoredPart& part : layer.parts) {
        const std::int64_t end =
            layer.is_ring ? std::min(model.farthest(), position + part.n_row - kWindow) : part.n_row;
        if (end <= position) continue;
        PartRows(part, layer.is_ring, position, end - position)
            .pieces(0, PartRows(part, layer.is_ring, position, end - position).bytes(),
                    [](std::byte* at, std::size_t n) { std::memset(at, 0xFF, n); });
      }
    }
  }

  Backend backend;
  Model<Backend> model;
  SequenceStore<Backend> store;
  Ids tokens;
};

/// One of each type of the list at least, and what makes them differ in what they store and when.
const std::vector<const char*>& formats() {
  static const std::vector<const char*> names = {
      "f32",          "bf16",     "tq4",      "tq4-k3v2-cut-raw-haar",     "kv5r4",    "kv16r16",       "sim-k4v3-had",
      "sim-int8-had", "sim-q8_0", "sim-q4_0", "sim-int8-had-tail20-sink3", "sim-t3l8", "sim-kvarn-k4v2"};
  return names;
}

TEST(Resume, EveryFormatIsHere) {
  std::set<std::size_t> types;
  for (const char* name : formats()) types.insert(parse_cache_spec(name).index());
  EXPECT_EQ(types.size(), std::variant_size_v<CacheSpec>);
}

/// Into another backend, which held something else, with a larger context and another chunk; with all that is beyond
/// the tokens spoiled.
TEST(Resume, RestoredIsNeverInterrupted) {
  for (const char* name : formats()) {
    const TempDir folder;
    const Wish wish{.cache = name};
    Reader run(wish);
    run.prefill(ids(kRing + 23), 32);
    run.save(folder.file("s"));
    const std::vector<float> expected = run.go_on(ids(30, 5));
    Reader other({.cache = name, .context = kContext + 31, .max_chunk = 16});
    other.prefill(ids(50, 9), 16);
    other.restore(folder.file("s"));
    std::vector<float> logits(kVocab), at_hand(kVocab);
    other.backend.copy_logits(0, logits);
    EXPECT_TRUE(same_rows(other.go_on(ids(30, 5)), expected)) << name;
    // The control: one byte of what was restored.
    Reader spoiled(wish);
    spoiled.restore(folder.file("s"));
    const StoredLayer full = spoiled.backend.stored_layers()[1];
    full.parts[0].data[full.parts[0].row_bytes * 3 + 1] ^= std::byte{0x41};
    try {
      EXPECT_FALSE(same_rows(spoiled.go_on(ids(30, 5)), expected)) << name;
    } catch (const NotFiniteError&) {  // a byte of an exponent
    }
  }
}

/// At the beginning, at every kind of place in a ring, and at the context's end.
TEST(Resume, AnywhereInTheContext) {
  const TempDir folder;
  for (const std::int64_t at : {std::int64_t{0}, std::int64_t{1}, kWindow - 1, kWindow, kRing - 1, kRing, kRing + 1,
                                2 * kRing, kContext - 3, kContext - 1}) {
    Reader run({.cache = "tq4"}), restored({.cache = "tq4"});
    run.prefill(ids(at), 31);
    run.save(folder.file("s"));
    restored.restore(folder.file("s"));
    const Ids next = ids(std::min<std::int64_t>(kContext - at, 12), 5);
    EXPECT_TRUE(same_rows(restored.go_on(next), run.go_on(next))) << at;
  }
}

TEST(Resume, AThousandStepsLaterItIsStillTheSame) {
  const TempDir folder;
  Reader run({.context = 1200}), restored({.context = 1200});
  run.prefill(ids(100), 32);
  run.save(folder.file("s"));
  restored.restore(folder.file("s"));
  EXPECT_TRUE(same_rows(restored.go_on(ids(1000, 5)), run.go_on(ids(1000, 5))));
}

/// Against a fresh run of the same passes, the last one cut: its sums are cut as those of the first time were.
TEST(Resume, TakenBackItIsAFreshRunOfTheSamePasses) {
  for (const char* name : formats()) {
    for (const std::int64_t to : {std::int64_t{0}, std::int64_t{39}, std::int64_t{64}, kRing + 2}) {
      Reader run({.cache = name}), fresh({.cache = name});
      run.prefill(ids(kRing + 80), 32);
      fresh.prefill(ids(to), 32);
      const std::int64_t n_replay = run.store.n_replay(to);
      EXPECT_LT(n_replay, 40 + 32) << name << " to " << to;
      EXPECT_GT(n_replay + (to == 0) + (to == 64), 0) << name << " to " << to << ": far beyond the spare slots";
      run.rewind(to);
      EXPECT_TRUE(same_rows(run.go_on(ids(20, 5)), fresh.go_on(ids(20, 5)))) << name << " to " << to;
    }
  }
}

/// Short passes have the sums of single tokens: any position of a sequence that came in such, within a pass too.
RC_GTEST_PROP(Resume, TakenBackToAnyStep, ()) {
  const char* const name = *rc::gen::element("bf16", "tq4", "kv5r4", "sim-int8-had-tail20-sink3", "sim-kvarn-k4v2");
  const auto policy = *rc::gen::elementOf(
      std::vector<CheckpointPolicy>{{}, {.interval = 40}, {.interval = 40, .near_interval = 10, .near_tokens = 50}});
  const auto n_token = *rc::gen::inRange<std::int64_t>(1, kRing + 30);
  const auto to = *rc::gen::inRange<std::int64_t>(0, n_token + 1);
  Reader run({.cache = name, .checkpoints = policy}), fresh({.cache = name});
  run.prefill(ids(n_token), kDecodeChunk);
  fresh.prefill(ids(to), kDecodeChunk);
  run.rewind(to);
  rc_require(same_rows(run.go_on(ids(10, 5)), fresh.go_on(ids(10, 5))), name);
}

TEST(Resume, BranchesGoTheirOwnWays) {
  for (const char* name : {"bf16", "tq4", "sim-int8-had-tail20-sink3"}) {
    for (const std::int64_t at : {std::int64_t{64}, kRing + 40}) {
      Reader trunk({.cache = name}), branch({.cache = name, .context = kContext + 9}), fresh({.cache = name});
      trunk.prefill(ids(kRing + 40), 32);
      fresh.prefill(ids(at), 32);
      branch.prefill(ids(20, 3), 16);
      trunk.store.fork_to(branch.store, trunk.tokens, at);
      branch.tokens.assign(trunk.tokens.begin(), trunk.tokens.begin() + at);
      branch.poison();
      trunk.go_on(ids(20, 8));
      const std::vector<float> expected = fresh.go_on(ids(20, 5));
      EXPECT_TRUE(same_rows(branch.go_on(ids(20, 5)), expected)) << name << " at " << at;
      branch.rewind(at);
      EXPECT_TRUE(same_rows(branch.go_on(ids(20, 5)), expected)) << name << ", what was written is gone again";
      trunk.rewind(64);
      Reader other({.cache = name});
      other.prefill(ids(64), 32);
      EXPECT_TRUE(same_rows(trunk.go_on(ids(9, 5)), other.go_on(ids(9, 5)))) << name << ": the trunk";
    }
  }
}

/// What checkpoints take is what the plan says, and a file is the caches and what is said of it here.
TEST(Resume, CheckpointsAndFilesTakeWhatIsPlanned) {
  const TempDir folder;
  const CheckpointPolicy far{.interval = 64}, near{.interval = 64, .near_interval = 16, .near_tokens = 40};
  for (const char* name : {"f32", "bf16", "tq4"}) {
    const CacheSpec cache = parse_cache_spec(name);
    const ModelConfig& config = small().weights.config;
    for (const CheckpointPolicy& policy : {far, near}) {
      Reader run({.cache = name, .checkpoints = policy});
      const std::int64_t planned = ring_checkpoint_bytes(config, cache, kContext, policy);
      std::int64_t bytes = 0, most = 0;
      while (run.model.position() < kContext) {
        run.prefill(ids(std::min<std::int64_t>(16, kContext - run.model.position())), 16);
        bytes = 0;
        for (const RingCheckpoint& kept : run.store.checkpoints())
          bytes += static_cast<std::int64_t>(kept.bytes.size());
        most = std::max(most, bytes);
      }
      EXPECT_LE(most, planned) << name << ' ' << to_string(policy);
      EXPECT_GE(most, planned - ring_checkpoint_bytes(config, cache, kContext))
          << name << ": and no more than one less";
      run.save(folder.file("s"));
      const CacheBytes caches = stored_bytes(config, cache, kContext, kWindow + kMaxRewind - 1);
      const auto file = static_cast<std::int64_t>(std::filesystem::file_size(folder.file("s")));
      EXPECT_GE(file, caches.full + caches.sliding + bytes) << name;
      EXPECT_LT(file, caches.full + caches.sliding + bytes + 6000) << name << ": tokens, passes, logits and the header";
    }
  }
  const ModelConfig large = gemma4_31b();
  EXPECT_EQ(ring_checkpoint_bytes(large, Tq4Format{}, 131072), 50 * std::int64_t{16777216});
  EXPECT_EQ(ring_checkpoint_bytes(large, Tq4Format{}, 131072, {.interval = 8192}), 16 * 50 * std::int64_t{16777216});
  EXPECT_EQ(ring_checkpoint_bytes(large, Tq4Format{}, 131072, CheckpointPolicy{}), 0);
  EXPECT_EQ(ring_checkpoint_bytes(large, Tq4Format{}, 1000, {.interval = 500}), 2 * 50 * std::int64_t{16384} * 1000);
  const CheckpointPolicy usual{.interval = 8192, .near_interval = 1024, .near_tokens = 20480};
  EXPECT_EQ(
      ring_checkpoint_formula(large, Tq4Format{}, 131072, usual),
      "35 checkpoints (every 8192 tokens, every 1024 within the newest 20480) x a window of the rings, 838860800 B");
}

/// A simulated ring, whose rows are what it reads back.
TEST(Resume, RingsOfOtherFormats) {
  const TempDir folder;
  const Wish wish{.cache = "tq4", .ring = "sim-int8-had"};
  Reader run(wish), restored(wish);
  run.prefill(ids(kRing + 9), 32);
  run.save(folder.file("s"));
  restored.restore(folder.file("s"));
  EXPECT_TRUE(same_rows(restored.go_on(ids(20, 5)), run.go_on(ids(20, 5))));
  EXPECT_THROW(Reader({.cache = "tq4"}).restore(folder.file("s")), std::invalid_argument);
}

TEST(ModelFingerprint, TellsModelsApart) {
  const std::uint64_t hash = model_fingerprint(*small().file);
  EXPECT_EQ(model_fingerprint(GgufFile::open(small().directory.file("model.gguf"))), hash);
  ModelConfig config = small().weights.config;
  EXPECT_EQ(model_fingerprint(*SmallModel(config, 10).file), hash);
  EXPECT_NE(model_fingerprint(*SmallModel(config, 11).file), hash) << "other weights";
  config.window += 1;
  EXPECT_NE(model_fingerprint(*SmallModel(config, 10).file), hash) << "the same weights, another window";
}

}  // namespace
