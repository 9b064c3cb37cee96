// SPDX-License-Identifier: Apache-2.0
#include "cuda/draft_lookup.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/draft/lookup.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// The walk over the whole sequence finds what the host's index finds.
namespace gemma4::cuda {
namespace {

struct Found {
  std::vector<std::int32_t> tokens;
  std::int32_t n_proposed = 0;
  bool operator==(const Found&) const = default;
};

/// By the host, with what the device puts where nothing is proposed: the last token again.
Found on_host(const std::vector<std::int32_t>& tokens, std::int64_t n_draft) {
  draft::LookupDrafter drafter;
  draft::Proposal proposal;
  drafter.propose({.tokens = tokens, .n_draft = n_draft}, proposal);
  Found found{proposal.tokens, static_cast<std::int32_t>(proposal.size())};
  found.tokens.resize(static_cast<std::size_t>(n_draft), tokens.back());
  return found;
}

/// `n_beyond` tokens behind the sequence are garbage that looks like its end.
Found on_device(const std::vector<std::int32_t>& tokens, std::int64_t n_draft, std::int64_t n_beyond) {
  const Stream stream;
  std::vector<std::int32_t> all = tokens;
  all.insert(all.end(), static_cast<std::size_t>(n_beyond), tokens.back());
  const DeviceBuffer<std::int32_t> text(all);
  const DeviceBuffer<std::int32_t> position(std::vector<std::int32_t>{static_cast<std::int32_t>(tokens.size()) - 1});
  DeviceBuffer<std::int32_t> out(n_draft + 1);
  DeviceBuffer<std::byte> workspace(kLookupWorkspaceBytes);
  workspace.fill_bytes(0, stream);
  Found twice[2];
  for (Found& found : twice) {  // the second call finds the workspace as the first one left it
    out.fill_bytes(0xFF, stream);
    draft_lookup(text.data(), position.data(), text.size(),
                 {.tokens = out.data(), .n_proposed = out.data() + n_draft, .n_draft = n_draft},
                 {workspace.data(), static_cast<std::size_t>(workspace.size())}, stream);
    found.tokens = out.to_host(stream);
    found.n_proposed = found.tokens.back();
    found.tokens.pop_back();
  }
  EXPECT_EQ(twice[0], twice[1]);
  return twice[0];
}

RC_GTEST_PROP(DraftLookup, FindsWhatTheHostFinds, ()) {
  const auto length = *rc::gen::inRange<std::size_t>(1, 400);
  const std::int32_t n_kind = *rc::gen::element(1, 2, 3, 10, 1000);  // few kinds of tokens: long suffixes, and ties
  const auto tokens = *rc::gen::container<std::vector<std::int32_t>>(length, rc::gen::inRange<std::int32_t>(0, n_kind));
  const std::int64_t n_draft = *rc::gen::inRange<std::int64_t>(1, draft::kMaxDrafts + 1);
  RC_ASSERT(on_device(tokens, n_draft, *rc::gen::inRange<std::int64_t>(0, 5000)) == on_host(tokens, n_draft));
}

TEST(DraftLookup, FindsTheSameInALongText) {
  std::mt19937 random(7);
  for (const std::size_t length : {std::size_t{5000}, std::size_t{131071}, std::size_t{262144}}) {
    std::vector<std::int32_t> tokens(length);
    for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random() % 50000);
    const std::int64_t n_repeat = 12;  // the end stood once near the beginning
    std::copy_n(tokens.begin() + 100, n_repeat, tokens.end() - n_repeat);
    const Found found = on_device(tokens, 4, 0);
    EXPECT_EQ(found, on_host(tokens, 4)) << length;
    EXPECT_EQ(found.n_proposed, 4);
    EXPECT_TRUE(std::equal(found.tokens.begin(), found.tokens.end(), tokens.begin() + 100 + n_repeat)) << length;
  }
}

TEST(DraftLookup, AnotherTextProposesOthers) {  // the control: the answer depends on more than the last token
  const std::vector<std::int32_t> longer = {1, 2, 3, 9, 2, 3, 8, 1, 2, 3}, newer = {5, 2, 3, 9, 2, 3, 8, 1, 2, 3};
  EXPECT_EQ(on_device(longer, 1, 0).tokens, std::vector<std::int32_t>{9}) << "three tokens stood before";
  EXPECT_EQ(on_device(newer, 1, 0).tokens, std::vector<std::int32_t>{8}) << "two did, and the latest counts";
  EXPECT_EQ(on_device({4, 5, 6}, 2, 0), (Found{{6, 6}, 0})) << "the last token is new";
}

TEST(DraftLookup, RefusesWhatItCannotDo) {
  const DeviceBuffer<std::int32_t> text(std::vector<std::int32_t>{1, 2});
  DeviceBuffer<std::int32_t> out(8);
  DeviceBuffer<std::byte> workspace(kLookupWorkspaceBytes);
  const std::span<std::byte> all(workspace.data(), static_cast<std::size_t>(workspace.size()));
  const auto call = [&](const std::int32_t* tokens, std::int64_t n_draft, std::int64_t max_token,
                        std::span<std::byte> room) {
    draft_lookup(tokens, text.data(), max_token, {out.data(), out.data() + 7, n_draft}, room, nullptr);
  };
  EXPECT_TRUE(testkit::refuses([&] { call(nullptr, 1, 2, all); }, {"draft_lookup", "no address"}));
  EXPECT_TRUE(testkit::refuses([&] { call(text.data(), 0, 2, all); }, {"0 drafts", "1 to 7"}));
  EXPECT_TRUE(testkit::refuses([&] { call(text.data(), 8, 2, all); }, {"8 drafts", "1 to 7"}));
  EXPECT_TRUE(testkit::refuses([&] { call(text.data(), 1, 0, all); }, {"max_token 0"}));
  EXPECT_TRUE(testkit::refuses([&] { call(text.data(), 1, 2, all.first(100)); }, {"workspace of 100 B", "2048"}));
}

}  // namespace
}  // namespace gemma4::cuda
