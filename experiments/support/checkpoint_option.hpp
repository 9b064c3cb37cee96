// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <exception>
#include <string>
#include <string_view>

#include "experiments/support/numbers.hpp"
#include "gemma4/error.hpp"
#include "gemma4/session/checkpoint_policy.hpp"

/// --checkpoints: how far apart the copies of the rings are from which a sequence is taken back.
namespace gemma4::experiment {

/// Of drivers, where nothing is said.
inline constexpr CheckpointPolicy kUsualCheckpoints{.interval = 8192};

/// FAR, or FAR,NEAR:TOKENS, as to_string(CheckpointPolicy) writes them.
///   8192               one every 8192 tokens; 0: none
///   8192,1024:20480    and one every 1024 within the newest 20480
/// @throws std::invalid_argument naming the option, what was not understood, and what would be
[[nodiscard]] inline CheckpointPolicy parse_checkpoints(std::string_view text) {
  const auto refuse = [&](const auto&... why) {
    require(false, "--checkpoints '", text, "': ", why...,
            "expected tokens between copies, as in 8192, or with closer ones among the newest, as in 8192,1024:20480");
  };
  const auto number = [&](std::string_view digits) {
    std::int64_t value = 0;
    if (detail::read_number(digits, value) != detail::NumberKind::kGood || value < 0 || value > kMaxTokens) {
      refuse("'", digits, "' is no whole number from 0 to ", kMaxTokens, "; ");
    }
    return value;
  };
  const std::size_t comma = text.find(',');
  CheckpointPolicy policy{.interval = number(text.substr(0, comma))};
  if (comma != text.npos) {
    const std::string_view near = text.substr(comma + 1);
    const std::size_t colon = near.find(':');
    if (colon == near.npos) refuse("no ':' behind the comma; ");
    policy.near_interval = number(near.substr(0, colon));
    policy.near_tokens = number(near.substr(colon + 1));
    if (policy.near_interval == 0) refuse("copies among the newest every 0 tokens; ");
  }
  try {
    validate(policy);
  } catch (const std::exception& error) {
    refuse(error.what(), "; ");
  }
  return policy;
}

/// @param policy also what it is where the option is not given
inline CLI::Option* add_checkpoints(CLI::App& app, CheckpointPolicy& policy, const std::string& help) {
  return app
      .add_option_function<std::string>(
          "--checkpoints", [&policy](const std::string& text) { policy = parse_checkpoints(text); },
          help + "; FAR,NEAR:TOKENS: within the newest TOKENS one every NEAR, as in 8192,1024:20480")
      ->default_str(to_string(policy));
}

}  // namespace gemma4::experiment
