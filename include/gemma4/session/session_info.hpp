// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/error.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/checkpoint_policy.hpp"

/// What a session is beside the bytes of its caches, and the file that holds both.
///
/// A session file is a GGUF file (gemma4/gguf/gguf.hpp), architecture gemma4-session. Its keys, all there but where it
/// says so:
///   session.version                u32, kSessionVersion
///   session.model_hash             u64, model_fingerprint() of the model's file
///   session.cache, .cache_seed     string, u64: the format of the full layers and the seed of what is random in it
///   session.ring, .ring_seed       the same of the sliding layers' rings
///   session.context                i64, positions that the caches held
///   session.position               i64, tokens that the caches hold
///   session.ring_first             i64, the first position that the rings hold
///   session.checkpoint_interval    i64, CheckpointPolicy::interval
///   session.checkpoint_near_interval, .checkpoint_near_tokens    i64, the rest of it; not there where there is no near
///                                  zone
///   session.checkpoints            i64 array, positions whose rings are kept, ascending
///   session.sampler.temperature, .top_k, .top_p, .seed       f32, i32, f32, u64; the position is all its state
///   session.note                   string, what the program that saved it wants to know again, such as a dialogue
/// Its tensors, in this order; one that would be empty is not there:
///   tokens                         I32 [n], the whole sequence; may be longer than the position
///   passes                         I64 [n], lengths of the passes in which the caches came to hold the tokens
///   logits                         F32 [vocab], of the token at the position, where they were at hand
///   layer.<l>.<part>               I8 [row_bytes, n_row, n_head]: rows of the tokens before the position; of a ring,
///                                  those from ring_first on, in order of position
///   checkpoint.<position>          I8 [n], the rings' rows of a window before that position, and rows of full layers
///                                  that were not final then, in the order of the layers and their parts
///   checksums                      I64 [n]: block_hash() of all in front of the first tensor, then of each tensor in
///                                  that order, in blocks of kSessionBlock bytes; the seed of a block is its place in
///                                  this list. Of itself it has none: each entry is held against what it speaks of
/// Bytes between tensors are zero, and nothing follows the last one, so that no byte can change unseen.
///
/// Names and extents of the parts tell how a backend lays its caches out: only one that does the same can restore them.
namespace gemma4 {

inline constexpr std::uint32_t kSessionVersion = 1;
inline constexpr std::string_view kSessionArchitecture = "gemma4-session";
inline constexpr std::size_t kSessionBlock = std::size_t{1} << 20;
inline constexpr std::string_view kChecksumsTensor = "checksums";

/// A block of the tensor of that number.
struct SessionBlock {
  std::size_t tensor = 0, offset = 0, bytes = 0;
};

/// Those of tensors of so many bytes, in order.
[[nodiscard]] inline std::vector<SessionBlock> session_blocks(std::span<const std::size_t> bytes) {
  std::vector<SessionBlock> blocks;
  for (std::size_t tensor = 0; tensor < bytes.size(); ++tensor) {
    for (std::size_t offset = 0; offset < bytes[tensor]; offset += kSessionBlock) {
      blocks.push_back({tensor, offset, std::min(kSessionBlock, bytes[tensor] - offset)});
    }
  }
  return blocks;
}

struct SessionInfo {
  std::uint64_t model_hash = 0;
  std::string cache = {}, ring = {};
  std::uint64_t cache_seed = 0, ring_seed = 0;
  std::int64_t context = 0;
  std::int64_t position = 0;
  std::int64_t ring_first = 0;
  CheckpointPolicy checkpoint_policy = {};
  std::vector<std::int64_t> checkpoints = {};
  SamplerSettings sampler = {};
  std::string note = {};
  std::vector<std::int32_t> tokens = {};
  std::vector<std::int64_t> passes = {};
  std::vector<float> logits = {};  ///< empty: not at hand
};

/// The seed of what is random in a format; 0 where nothing is.
[[nodiscard]] inline std::uint64_t seed_of(const CacheSpec& cache) {
  return std::visit(
      []<class TFormat>(const TFormat& format) -> std::uint64_t {
        if constexpr (requires { format.options.seed; }) {
          return format.options.seed;
        } else if constexpr (requires { format.seed; }) {
          return format.seed;
        } else {
          return 0;
        }
      },
      cache);
}
[[nodiscard]] inline std::uint64_t seed_of(const RingSpec& ring) {
  return ring ? std::visit([](const auto& format) { return format.seed; }, *ring) : 0;
}

namespace detail {

[[nodiscard]] inline std::string hash_text(std::uint64_t hash) {
  std::ostringstream text;
  text << "0x" << std::hex << hash;
  return text.str();
}

}  // namespace detail

/// Refuses a session that another model, format or context cannot take over.
/// @param model_hash, cache, ring, context of the backend that is to take it
/// @throws std::invalid_argument naming what differs, and both values
inline void require_session_suits(std::string_view name, const SessionInfo& info, std::uint64_t model_hash,
                                  const CacheSpec& cache, const RingSpec& ring, std::int64_t context) {
  require(info.model_hash == model_hash, name, ": saved from the model ", detail::hash_text(info.model_hash),
          ", this one is ", detail::hash_text(model_hash), "; load the file that it was saved from");
  require(info.cache == to_string(cache), name, ": its cache is '", info.cache, "', this run's '", to_string(cache),
          "'");
  require(info.cache_seed == seed_of(cache), name, ": the seed of its cache '", info.cache, "' is ", info.cache_seed,
          ", this run's ", seed_of(cache));
  require(info.ring == to_string(ring), name, ": its ring is '", info.ring, "', this run's '", to_string(ring), "'");
  require(info.ring_seed == seed_of(ring), name, ": the seed of its ring '", info.ring, "' is ", info.ring_seed,
          ", this run's ", seed_of(ring));
  require(static_cast<std::int64_t>(info.tokens.size()) <= context, name, ": it holds ", info.tokens.size(),
          " tokens, the context is ", context);
}

/// Refuses what no session can be.
/// @throws FormatError naming the key or tensor
inline void require_consistent(std::string_view name, const SessionInfo& info) {
  const auto n_token = static_cast<std::int64_t>(info.tokens.size());
  require_format(info.context >= 1 && n_token <= info.context, name, ": ", n_token, " tokens for session.context ",
                 info.context);
  require_format(info.position >= 0 && info.position <= n_token, name, ": session.position ", info.position,
                 ", there are ", n_token, " tokens");
  require_format(info.ring_first >= 0 && info.ring_first <= info.position, name, ": session.ring_first ",
                 info.ring_first, ", session.position is ", info.position);
  std::size_t next = 0;
  std::int64_t at = 0;
  for (const std::int64_t pass : info.passes) {
    require_format(pass >= 1 && pass <= info.position - at, name, ": a pass of ", pass, " tokens at ", at,
                   ", session.position is ", info.position);
    at += pass;
    if (next < info.checkpoints.size() && info.checkpoints[next] == at) ++next;
  }
  require_format(at == info.position, name, ": passes of ", at, " tokens, session.position is ", info.position);
  require_format(next == info.checkpoints.size(), name, ": session.checkpoints[", next,
                 "] is not behind a pass, or not above the one before it");
  try {
    validate(info.checkpoint_policy);
    validate(info.sampler);
  } catch (const std::invalid_argument& error) {
    throw FormatError(concat(name, ": ", error.what()));
  }
}

}  // namespace gemma4
