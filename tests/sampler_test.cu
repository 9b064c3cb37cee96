// SPDX-License-Identifier: Apache-2.0
#include "cuda/sampler.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "reference/sampler.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using Logits = std::vector<float>;
constexpr float kInf = std::numeric_limits<float>::infinity();

/// Logits on the device, at `offset` floats from an aligned address, and all that a call writes.
class Device {
 public:
  explicit Device(const Logits& logits, std::int64_t offset = 0) : vocab_(static_cast<std::int64_t>(logits.size())) {
    logits_ = DeviceBuffer<float>(vocab_ + offset);
    logits_.from_host(logits, nullptr, offset);
    logits_view_ = make_view(static_cast<const float*>(logits_.data() + offset), std::int64_t{1}, vocab_);
    clear_sampler(workspace(), nullptr);
    check(cudaDeviceSynchronize(), "upload of logits");
  }

  [[nodiscard]] std::span<std::byte> workspace() {
    return {workspace_.data(), static_cast<std::size_t>(workspace_.bytes())};
  }
  [[nodiscard]] const View<const float, 2>& logits() const { return logits_view_; }
  [[nodiscard]] std::int32_t* number(int i) { return numbers_.data() + i; }
  [[nodiscard]] std::int32_t read(int i) const { return numbers_.to_host()[static_cast<std::size_t>(i)]; }
  void write(int i, std::int32_t value) { numbers_.from_host(std::span(&value, 1), nullptr, i); }

  [[nodiscard]] std::int32_t sample(const SamplerSettings& settings, std::int32_t position, bool overlap = false) {
    write(0, position), write(1, -7);
    cuda::sample(logits_view_, settings, number(0), {.token = number(1)}, workspace(), nullptr, overlap);
    return read(1);
  }

 private:
  std::int64_t vocab_;
  DeviceBuffer<float> logits_;
  View<const float, 2> logits_view_;
  DeviceBuffer<std::byte> workspace_{kSamplerWorkspaceBytes};
  DeviceBuffer<std::int32_t> numbers_{4};
};

/// Quarter steps, so that equal logits occur, or floats of any size; some forbidden.
Logits any_logits(std::int64_t vocab) {
  std::mt19937 random(*rc::gen::arbitrary<std::uint32_t>());
  const int kind = *rc::gen::inRange(0, 5);
  const bool forbids = *rc::gen::arbitrary<bool>();
  Logits logits(static_cast<std::size_t>(vocab));
  for (float& logit : logits) {
    const auto bits = static_cast<std::uint32_t>(random());
    switch (kind) {
      case 0:
        logit = static_cast<float>(static_cast<int>(bits % 81) - 40) / 4;
        break;
      case 1:
        logit = std::normal_distribution<float>(0.0f, 5.0f)(random);
        break;
      case 2:
        logit = bits % 2 == 0 ? 0.0f : -0.0f;
        break;
      case 3:
        logit = static_cast<float>(bits % 3) * -40.0f;
        break;
      default:
        logit = bit_cast<float>(bits);
        logit = std::isfinite(logit) ? logit : -FLT_MAX;
    }
    if (forbids && random() % 4 == 0) logit = -kInf;
  }
  if (std::all_of(logits.begin(), logits.end(), [](float logit) { return logit == -kInf; })) logits[0] = 1.0f;
  return logits;
}

SamplerSettings any_settings(std::int64_t vocab) {
  SamplerSettings settings;
  settings.temperature = *rc::gen::element(0.0f, 1e-40f, 0.01f, 0.3f, 0.7f, 1.0f, 1.0f, 2.5f, 1e6f, FLT_MAX);
  const auto n = static_cast<std::int32_t>(vocab);
  settings.top_k = *rc::gen::element<std::int32_t>(0, 0, 1, 2, 40, n / 2, n - 1, n, n + 1, INT32_MAX);
  settings.top_p = *rc::gen::element(1.0f, 1.0f, 1e-40f, 0.05f, 0.25f, 0.5f, 0.9f, 0.95f, 1.0f - FLT_EPSILON / 2);
  settings.seed = *rc::gen::arbitrary<std::uint64_t>();
  return settings;
}

RC_GTEST_PROP(SamplerGpu, TheTokenOfTheReference, ()) {
  const auto vocab = *rc::gen::element<std::int64_t>(1, 2, 5, 33, 257, 1000, 2049, 4099, 20000);
  const Logits logits = any_logits(vocab);
  Device device(logits, *rc::gen::inRange<std::int64_t>(0, 4));
  for (int i = 0; i < 3; ++i) {
    const SamplerSettings settings = any_settings(vocab);
    const auto position = *rc::gen::element<std::int32_t>(0, 1, 77, 131071, INT32_MAX - 2);
    RC_ASSERT(device.sample(settings, position, i == 1) == reference::sample(logits, settings, position));
  }
}

/// The vocabulary of Gemma, every path, many positions.
TEST(SamplerGpu, TheTokenOfTheReferenceFromTheWholeVocabulary) {
  std::mt19937 random(5);
  Logits logits(262144);
  for (float& logit : logits) {
    logit = 30.0f * std::tanh(std::normal_distribution<float>(0.0f, 8.0f)(random) / 30.0f);
    logit = std::round(logit * 64) / 64;  // many equals
  }
  Device device(logits);
  for (const SamplerSettings& settings :
       {SamplerSettings{}, SamplerSettings{.temperature = 1, .seed = 1}, SamplerSettings{.temperature = 20, .seed = 2},
        SamplerSettings{.temperature = 1, .top_k = 64, .seed = 3}, SamplerSettings{.temperature = 1, .top_p = 0.95f},
        SamplerSettings{.temperature = 5, .top_k = 100000, .top_p = 0.9f, .seed = 4},
        SamplerSettings{.temperature = 30, .top_p = 0.5f, .seed = 5}, SamplerSettings{.temperature = 1, .top_k = 1}}) {
    for (std::int32_t position = 0; position < 8; ++position) {
      EXPECT_EQ(device.sample(settings, position), reference::sample(logits, settings, position))
          << settings.temperature << ' ' << settings.top_k << ' ' << settings.top_p << " at " << position;
    }
  }
}

/// What the host found to stay, and nothing else, is ever drawn: hot enough for all of it to come up.
TEST(SamplerGpu, ExactlyWhatStaysIsDrawn) {
  const Logits logits = {0, 1, 1, -kInf, 1, 0, 1, -2};
  Device device(logits);
  for (const SamplerSettings& settings :
       {SamplerSettings{.temperature = 1, .top_k = 3}, SamplerSettings{.temperature = 1, .top_p = 0.6f},
        SamplerSettings{.temperature = 1, .top_k = 6, .top_p = 0.9f}, SamplerSettings{.temperature = 1}}) {
    std::vector<std::int32_t> kept = reference::survivors(logits, settings), drawn;
    for (std::int32_t position = 0; position < 400; ++position) drawn.push_back(device.sample(settings, position));
    std::sort(kept.begin(), kept.end());
    std::sort(drawn.begin(), drawn.end());
    drawn.erase(std::unique(drawn.begin(), drawn.end()), drawn.end());
    EXPECT_EQ(drawn, kept) << settings.top_k << ' ' << settings.top_p;
  }
}

/// Control of the parity: of 1000 equally likely tokens another seed or position gives others (see sampler_test.cpp).
TEST(SamplerGpu, SeedAndPositionAreSeen) {
  const Logits logits(1000, 0.0f);
  Device device(logits);
  int n_seed = 0, n_position = 0, n_both = 0;
  for (std::int32_t position = 0; position < 50; ++position) {
    const std::int32_t token = device.sample({.temperature = 1, .seed = 42}, position);
    n_both += token == reference::sample(logits, {.temperature = 1, .seed = 42}, position);
    n_seed += token == reference::sample(logits, {.temperature = 1, .seed = 42ull + (1ull << 32)}, position);
    n_position += token == reference::sample(logits, {.temperature = 1, .seed = 42}, position + 1);
  }
  EXPECT_EQ(n_both, 50);
  EXPECT_LE(n_seed, 5);
  EXPECT_LE(n_position, 5);
}

/// What the reference refuses is -1 here, in every path; the workspace is ready for the next call.
TEST(SamplerGpu, LogitsThatAreNoNumbersGiveNoToken) {
  for (const float bad : {NAN, -NAN, kInf}) {
    for (const std::int64_t at : {std::int64_t{0}, std::int64_t{4999}, std::int64_t{9998}}) {
      Logits logits(9999, 0.25f);
      const Device good(logits);
      logits[static_cast<std::size_t>(at)] = bad;
      Device device(logits);
      for (const SamplerSettings& settings :
           {SamplerSettings{}, SamplerSettings{.temperature = 1}, SamplerSettings{.temperature = 1, .top_k = 5},
            SamplerSettings{.temperature = 1, .top_p = 0.5f},
            SamplerSettings{.temperature = 1, .top_k = 9, .top_p = 0.5f}}) {
        EXPECT_EQ(device.sample(settings, 3), -1);
        device.write(1, -7);
        sample(good.logits(), settings, device.number(0), {.token = device.number(1)}, device.workspace(), nullptr);
        EXPECT_EQ(device.read(1), reference::sample(Logits(9999, 0.25f), settings, 3));
      }
    }
  }
  const Logits none(300, -kInf);
  Device device(none);
  EXPECT_EQ(device.sample({}, 0), -1);
  EXPECT_EQ(device.sample({.temperature = 1}, 0), -1);
  EXPECT_EQ(device.sample({.temperature = 1, .top_k = 5, .top_p = 0.5f}, 0), -1);
}

/// A recorded call, replayed, walks through the positions by itself and leaves the tokens in their places.
TEST(SamplerGpu, AReplayCountsByItself) {
  std::mt19937 random(7);
  Logits logits(5000);
  for (float& logit : logits) logit = std::normal_distribution<float>(0.0f, 2.0f)(random);
  constexpr std::int32_t kFirst = 10, kReplay = 20, kHistory = 25;  // the last tokens have no place
  for (const bool overlap : {false, true}) {
    for (const SamplerSettings& settings :
         {SamplerSettings{}, SamplerSettings{.temperature = 1, .seed = 9},
          SamplerSettings{.temperature = 1, .top_k = 100, .top_p = 0.9f, .seed = 10}}) {
      Device device(logits);
      DeviceBuffer<std::int32_t> history(kHistory + 1);
      history.fill_bytes(0xFF);
      const Stream stream;
      const SampledToken to{.token = device.number(1),
                            .history = history.data(),
                            .history_len = kHistory,
                            .next_position = device.number(0),
                            .kv_len = device.number(2)};
      const Graph graph = Graph::capture(stream, [&] {
        sample(device.logits(), settings, device.number(0), to, device.workspace(), stream, overlap);
      });
      device.write(0, kFirst);
      check(cudaDeviceSynchronize(), "upload of the position");
      for (int i = 0; i < kReplay; ++i) graph.launch(stream);
      stream.synchronize();
      const std::vector<std::int32_t> tokens = history.to_host();
      EXPECT_EQ(device.read(0), kFirst + kReplay);
      EXPECT_EQ(device.read(2), kFirst + kReplay + 1);
      EXPECT_EQ(device.read(1), reference::sample(logits, settings, kFirst + kReplay - 1));
      for (std::int32_t place = 0; place <= kHistory; ++place) {
        const bool was_drawn = place > kFirst && place < kHistory;
        EXPECT_EQ(tokens[static_cast<std::size_t>(place)],
                  was_drawn ? reference::sample(logits, settings, place - 1) : -1);
      }
    }
  }
}

TEST(SamplerPlan, Refusals) {
  float logits[4] = {};
  std::int32_t number = 0;
  alignas(16) static std::byte memory[kSamplerWorkspaceBytes];
  const auto call = [&](std::int64_t vocab, SamplerSettings settings, const std::int32_t* position, SampledToken to,
                        std::size_t n_byte = kSamplerWorkspaceBytes) {
    return [=, &logits] {
      sample(make_view(static_cast<const float*>(logits), std::int64_t{1}, vocab), settings, position, to,
             std::span(memory).first(n_byte), nullptr);
    };
  };
  using testkit::refuses;
  EXPECT_TRUE(refuses(call(0, {}, &number, {.token = &number}), {"sampler: 0 logits"}));
  EXPECT_TRUE(refuses(call(std::int64_t{1} << 31, {}, &number, {.token = &number}), {"2147483648 logits"}));
  EXPECT_TRUE(refuses(call(4, {.temperature = -1}, &number, {.token = &number}), {"temperature -1"}));
  EXPECT_TRUE(refuses(call(4, {.temperature = 1}, nullptr, {.token = &number}), {"no address"}));
  EXPECT_TRUE(refuses(call(4, {}, nullptr, {.token = &number, .kv_len = &number}), {"no address"}));
  EXPECT_TRUE(refuses(call(4, {}, &number, {}), {"no address"}));
  EXPECT_TRUE(refuses(call(4, {}, &number, {.token = &number}, 100), {"workspace of 100 B", "need 65536"}));
}

}  // namespace
}  // namespace gemma4::cuda
