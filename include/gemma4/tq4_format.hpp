// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "gemma4/float16.hpp"
#include "gemma4/view.hpp"

/// TurboQuant TQ4: what a compressed cache row holds. Source: arXiv:2504.19874 (TurboQuant, the MSE variant);
/// prior work on rotate-then-quantise and on the optimal scale: HIGGS (arXiv:2411.17525), EDEN (arXiv:2108.08842),
/// DRIVE (arXiv:2105.08339).
///
/// A vector x of head_dim values is stored as a norm and head_dim 4-bit indices:
///   y = rotation(x / ||x||), whose coordinates are close to N(0, 1/head_dim);
///   index[i] = number of codebook boundaries strictly below y[i] (a tie goes to the lower index);
///   norm = ||x|| / ||centroid[index]|| when corrected (the decoded vector has the length of x exactly), ||x|| when
///   raw.
/// Decoded, still rotated: norm * centroid[index[i]]; the inverse rotation brings it back.
///
/// Row bytes, head_dim / 2 of them: byte j holds index[2j] in its high nibble and index[2j + 1] in its low nibble.
/// The zero vector is stored as norm 0 and the indices of y = 0. Codebooks of 2 or 3 bits use the same bytes
/// (their indices are below 4 or 8): they are accuracy experiments, not smaller caches.
namespace gemma4 {

/// On a device the rows of one KV head come in records of this many tokens (cuda/tq4_cache/layout.cuh), which one bulk
/// copy brings.
inline constexpr int kTq4RecordTokens = 16;

enum class RotationKind { kSignedHadamard, kDenseHaar };
enum class CodebookKind { kFull, kCutAtThreeSigma };
enum class NormKind { kCorrected, kRaw };

/// Everything that decides the bits of a compressed cache. The defaults are the project's own format; the peer's
/// is {kDenseHaar, kCutAtThreeSigma, kRaw}.
struct Tq4Options {
  RotationKind rotation = RotationKind::kSignedHadamard;
  CodebookKind codebook = CodebookKind::kFull;
  NormKind norm = NormKind::kCorrected;
  int k_bits = 4;
  int v_bits = 4;
  std::uint64_t seed = 0;  ///< of the rotation; K and V of every layer share one rotation
  bool operator==(const Tq4Options&) const = default;
};

/// A norm is stored in 16 bits, so that a row of head_dim values takes head_dim / 2 + 2 bytes.
using Tq4Norm = Bf16;

/// Bytes of one stored vector, its norm included.
[[nodiscard]] constexpr std::int64_t tq4_row_bytes(std::int64_t head_dim) {
  return head_dim / 2 + static_cast<std::int64_t>(sizeof(Tq4Norm));
}

/// The compressed K and V of a flat cache, in the shared row format.
template <bool kConst>
struct BasicTq4CacheView {
  template <class T>
  using Element = std::conditional_t<kConst, const T, T>;
  View<Element<std::uint8_t>, 4> k_codes;  ///< [batch, n_head_kv, buffer_len, head_dim/2] bytes
  View<Element<std::uint8_t>, 4> v_codes;  ///< the same
  View<Element<Tq4Norm>, 3> k_norm;        ///< [batch, n_head_kv, buffer_len]
  View<Element<Tq4Norm>, 3> v_norm;        ///< the same

  /// A view of a mutable cache converts to a view of a const one.
  template <bool kTo>
  requires(kTo && !kConst) [[nodiscard]] constexpr operator BasicTq4CacheView<kTo>() const {
    return {k_codes, v_codes, k_norm, v_norm};
  }
};
using Tq4CacheView = BasicTq4CacheView<false>;
using ConstTq4CacheView = BasicTq4CacheView<true>;

}  // namespace gemma4
