// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "reference/decoder_layer.hpp"
#include "reference/embedding.hpp"
#include "reference/layer_cache.hpp"

/// What goes on inside a model, layer by layer, and what another cache format does to it: the figures that tell a
/// trained model from a random one, and by which `synthesize` makes its random ones.
namespace gemma4::reference {

/// Of one layer, over the last rows of a text. Errors are |test - base| / |base| over those rows.
struct LayerStatistics {
  double score_norm = 0;       ///< |q| |k| / sqrt(head_dim), RMS: deviation of the scores if q and k were unrelated
  double score_deviation = 0;  ///< of a query's scores over the keys that it sees, RMS over queries and heads
  double n_key = 0;            ///< keys attended to: exp of the mean entropy of the softmax
  double output_rms = 0;       ///< of the attention's output; values have RMS 1, so that it tells how far they agree
  double attention_ratio = 0;  ///< RMS of the attention's branch over that of the stream which it joins
  double mlp_ratio = 0;        ///< the same of the feed-forward branch
  double stream_rms = 0;       ///< behind the layer
  double common_share = 0;     ///< of the RMS of the stream behind the layer: what all positions have in common
  double code_error = 0;       ///< of the attention's output, by the test's cache in this layer alone; full layers only
  double attention_error = 0;  ///< of the attention's output, with what the layers below have brought
  double stream_error = 0;     ///< of the stream behind the layer
};

namespace detail {

[[nodiscard]] inline double matrix_rms(const Matrix<float>& m) {
  return std::sqrt(m.squaredNorm() / static_cast<double>(m.size()));
}

[[nodiscard]] inline double relative_error(const Matrix<float>& test, const Matrix<float>& base) {
  return (test - base).norm() / base.norm();
}

}  // namespace detail

/// How far the weights of a norm are spread, in magnitude. Where K is read from V (gemma4/kv_format.hpp), the codes of
/// V serve K the better the more alike the weights of k's norm are.
struct WeightSpread {
  double min = 0, max = 0;
  double ratio = 0;            ///< max over min; infinite where min is 0
  std::int64_t near_zero = 0;  ///< weights below a hundredth of their RMS
};

/// @throws std::invalid_argument for no weights
[[nodiscard]] inline WeightSpread weight_spread(std::span<const float> weights) {
  require(!weights.empty(), "weight_spread: no weights");
  const Eigen::ArrayXd sizes = as_row<double>(weights).array().abs().transpose();
  const double rms = std::sqrt(sizes.square().mean());
  return {.min = sizes.minCoeff(),
          .max = sizes.maxCoeff(),
          .ratio = sizes.maxCoeff() / sizes.minCoeff(),
          .near_zero = (sizes < 0.01 * rms).count()};
}

/// What rows have in common: sqrt of |mean of the rows|^2 over the mean of |row|^2, free of what the mean of n
/// unrelated rows has by chance.
[[nodiscard]] inline double common_share(const Matrix<float>& rows) {
  const auto n = static_cast<double>(rows.rows());
  const double square = rows.squaredNorm() / n;
  const double mean_square = rows.colwise().mean().squaredNorm();
  return std::sqrt(std::max(0.0, (mean_square - square / n) / (square - square / n)));
}

/// Runs a text through two models of the same weights and different caches, side by side and chunk by chunk.
class LayerProbe {
 public:
  /// @param base, test  caches; the test's is also fed with the base's own k and v, for code_error
  /// @param context     tokens that will be run at most
  LayerProbe(const ModelWeights& weights, const CacheSpec& base, const CacheSpec& test, std::int64_t context)
      : weights_(weights),
        base_{make_layer_caches<float>(weights, base, context), {}},
        test_{make_layer_caches<float>(weights, test, context), {}},
        codes_(make_layer_caches<float>(weights, test, context)),
        keys_(static_cast<std::size_t>(weights.config.n_layer())) {}

  /// The next tokens of the text; statistics of the last `n_row` of them, a layer an entry. No rows: no statistics.
  std::vector<LayerStatistics> run(std::span<const std::int32_t> tokens, std::int64_t n_row) {
    const auto n_token = static_cast<std::int64_t>(tokens.size());
    require(n_token >= 1 && n_row >= 0 && n_row <= n_token, "layer statistics: ", n_row, " rows of ", n_token,
            " tokens");
    base_.x.resize(n_token, config().hidden);
    embedding<float>(tokens, weights_.token_embd, config().embedding_scale(), base_.x);
    test_.x = base_.x;
    std::vector<LayerStatistics> all;
    for (std::int64_t layer = 0; layer < config().n_layer(); ++layer) {
      const Pass base = run_layer(base_, layer), test = run_layer(test_, layer);
      append_keys(layer, base.qkv.k);
      const bool has_codes = !config().sliding_layer(layer);
      Matrix<float> coded;
      if (has_codes) coded = attend(codes_, layer, base.qkv);
      if (n_row == 0) continue;
      LayerStatistics statistics = compare(layer, base, test, n_row);
      if (has_codes) statistics.code_error = detail::relative_error(bottom(coded, n_row), bottom(base.attended, n_row));
      all.push_back(statistics);
    }
    position_ += n_token;
    return all;
  }

 private:
  struct Stream {
    std::vector<LayerCache<float>> caches;
    Matrix<float> x;
  };

  struct Pass {
    Qkv<float> qkv;
    Matrix<float> attended, before, between;  ///< the stream before the layer and between its branches
  };

  [[nodiscard]] const ModelConfig& config() const { return weights_.config; }
  [[nodiscard]] const LayerWeights& weights(std::int64_t layer) const {
    return weights_.layers[static_cast<std::size_t>(layer)];
  }
  [[nodiscard]] static Matrix<float> bottom(const Matrix<float>& m, std::int64_t n_row) { return m.bottomRows(n_row); }

  [[nodiscard]] Matrix<float> attend(std::vector<LayerCache<float>>& caches, std::int64_t layer,
                                     const Qkv<float>& qkv) const {
    return std::visit([&](auto& cache) { return cache.attend(qkv, position_); },
                      caches[static_cast<std::size_t>(layer)]);
  }

  [[nodiscard]] Pass run_layer(Stream& stream, std::int64_t layer) const {
    Pass pass{.qkv = {}, .attended = {}, .before = stream.x, .between = {}};
    Pending<float> pending;
    pass.qkv = project_qkv<float>(config(), config().attention(layer), weights(layer), position_, stream.x, pending);
    pass.attended = attend(stream.caches, layer, pass.qkv);
    pending = project_output<float>(weights(layer), pass.attended);
    finish_residual<float>(stream.x, pending, config().rms_epsilon);
    pass.between = stream.x;
    const Matrix<float> activation = gate_up<float>(config(), weights(layer), stream.x, pending);
    pending = down<float>(weights(layer), activation);
    finish_residual<float>(stream.x, pending, config().rms_epsilon);
    return pass;
  }

  void append_keys(std::int64_t layer, const Matrix<float>& k) {
    Matrix<float>& keys = keys_[static_cast<std::size_t>(layer)];
    keys.conservativeResize(position_ + k.rows(), k.cols());
    keys.bottomRows(k.rows()) = k;
  }

  [[nodiscard]] LayerStatistics compare(std::int64_t layer, const Pass& base, const Pass& test,
                                        std::int64_t n_row) const {
    LayerStatistics statistics;
    add_score_statistics(layer, base.qkv.q, n_row, statistics);
    const auto ratio = [&](const Matrix<float>& sum, const Matrix<float>& stream) {
      return detail::matrix_rms(bottom(sum - stream, n_row)) / detail::matrix_rms(bottom(stream, n_row));
    };
    statistics.output_rms = detail::matrix_rms(bottom(base.attended, n_row));
    statistics.attention_ratio = ratio(base.between, base.before);
    statistics.mlp_ratio = ratio(base_.x / weights(layer).output_scale, base.between);
    statistics.stream_rms = detail::matrix_rms(bottom(base_.x, n_row));
    statistics.common_share = reference::common_share(base_.x);
    statistics.attention_error = detail::relative_error(bottom(test.attended, n_row), bottom(base.attended, n_row));
    statistics.stream_error = detail::relative_error(bottom(test_.x, n_row), bottom(base_.x, n_row));
    return statistics;
  }

  /// score_norm, score_deviation and n_key, in double.
  void add_score_statistics(std::int64_t layer, const Matrix<float>& q, std::int64_t n_row,
                            LayerStatistics& statistics) const {
    const AttentionConfig& attention = config().attention(layer);
    const std::int64_t dim = attention.head_dim, group = config().n_head / attention.n_head_kv;
    const Matrix<float>& keys = keys_[static_cast<std::size_t>(layer)];
    double norms = 0, variances = 0, entropies = 0;
    for (std::int64_t head = 0; head < config().n_head; ++head) {
      for (std::int64_t row = q.rows() - n_row; row < q.rows(); ++row) {
        const std::int64_t end = position_ + row + 1;
        const std::int64_t begin = config().sliding_layer(layer) ? std::max<std::int64_t>(0, end - config().window) : 0;
        const auto visible = keys.block(begin, head / group * dim, end - begin, dim);
        const auto query = q.row(row).segment(head * dim, dim);
        const Eigen::ArrayXd scores = (visible * query.transpose()).cast<double>().array();
        const Eigen::ArrayXd weight = (scores - scores.maxCoeff()).exp();
        const double sum = weight.sum();
        norms += query.squaredNorm() * visible.squaredNorm() / static_cast<double>((end - begin) * dim);
        variances += (scores - scores.mean()).square().mean();
        entropies += std::log(sum) - (weight * (scores - scores.maxCoeff())).sum() / sum;
      }
    }
    const auto count = static_cast<double>(config().n_head * n_row);
    statistics.score_norm = std::sqrt(norms / count);
    statistics.score_deviation = std::sqrt(variances / count);
    statistics.n_key = std::exp(entropies / count);
  }

  const ModelWeights& weights_;
  Stream base_, test_;
  std::vector<LayerCache<float>> codes_;  // the test's format, filled with the base's k and v; used on full layers
  std::vector<Matrix<float>> keys_;       // [n_layer] of [position, n_head_kv * head_dim]
  std::int64_t position_ = 0;
};

/// Statistics at the end of `ids`, in chunks of `chunk` tokens, over the last `n_row` positions (all of them in one
/// chunk: n_row at most `chunk`, and the first chunk is the ragged one). `on_chunk(n_done)` after each chunk.
template <class TOnChunk>
[[nodiscard]] std::vector<LayerStatistics> layer_statistics(const ModelWeights& weights,
                                                            std::span<const std::int32_t> ids, std::int64_t chunk,
                                                            std::int64_t n_row, const CacheSpec& base,
                                                            const CacheSpec& test, TOnChunk&& on_chunk) {
  const auto n_token = static_cast<std::int64_t>(ids.size());
  require(chunk >= 1 && n_row >= 1 && n_row <= std::min(chunk, n_token), "layer statistics: ", n_row,
          " positions at the end of ", n_token, " tokens in chunks of ", chunk);
  LayerProbe probe(weights, base, test, n_token);
  std::vector<LayerStatistics> statistics;
  for (std::int64_t begin = 0, end = (n_token - 1) % chunk + 1; begin < n_token; begin = end, end += chunk) {
    statistics = probe.run(ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)),
                           end == n_token ? n_row : 0);
    on_chunk(end);
  }
  return statistics;
}

}  // namespace gemma4::reference
