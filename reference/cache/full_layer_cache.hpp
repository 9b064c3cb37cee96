// SPDX-License-Identifier: Apache-2.0
#pragma once

/// What a cache format needs to be in the reference: a cache type with
///
///   template <class Scalar> Matrix<Scalar> attend(const Qkv<Scalar>& qkv, std::int64_t position);
///
/// which puts the chunk's K and V where they belong, attends, and returns [n_token, n_head * head_dim];
///
///   template <class Scalar>
///   Matrix<Scalar> attend_queries(const Matrix<Scalar>& q, std::span<const float> k_norm, std::int64_t kv_len) const;
///
/// which attends to the first kv_len keys as they are stored and stores none: q [n_query, n_head * head_dim] are of the
/// last n_query of those positions, in order, so that a single query sees every one of the keys, and k_norm is that of
/// the layer whose keys they are (Qkv::k_norm);
///
///   StoredLayer stored();    // where its bytes are (gemma4/session/stored_part.hpp)
///
/// and a specialisation of FullLayerCaches that makes it.
namespace gemma4::reference {

/// The caches of the full layers in the format `TFormat`: constructed from the format and the layers' AttentionConfig,
/// it holds what they share; Cache is their type, make(context) one of them. Not defined for a format that has none.
template <class TFormat, class Scalar>
struct FullLayerCaches;

}  // namespace gemma4::reference
