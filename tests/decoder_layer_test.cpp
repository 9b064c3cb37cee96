// SPDX-License-Identifier: Apache-2.0
#include "reference/decoder_layer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/support/close.hpp"
#include "tests/support/random_matrix.hpp"
#include "tests/support/random_weights.hpp"

/// The steps of a layer against the formula written out: what is finished, added, scaled, normalised, and in what
/// order.
namespace {

using namespace gemma4;
using reference::Matrix;
using reference::Pending;

constexpr std::int64_t kHidden = 256, kToken = 3, kPosition = 11;

std::vector<double> flat(const Matrix<double>& m) {
  return {m.data(), m.data() + m.size()};
}

/// x / rms(x) * weight, a row at a time.
Matrix<double> normalised(const Matrix<double>& x, const std::vector<float>& weight, double epsilon = 1e-6f) {
  Matrix<double> out = x;
  for (Eigen::Index row = 0; row < x.rows(); ++row) {
    const double rms = std::sqrt(x.row(row).squaredNorm() / static_cast<double>(x.cols()) + epsilon);
    for (Eigen::Index i = 0; i < x.cols(); ++i) {
      out(row, i) = x(row, i) / rms * (weight.empty() ? 1.0 : static_cast<double>(weight[static_cast<std::size_t>(i)]));
    }
  }
  return out;
}

Matrix<double> product(const Matrix<double>& x, const testkit::OwnedMatrix& weight) {
  Matrix<double> out(x.rows(), weight.rows);
  reference::quantized_linear<double>(x, weight.view(), out);
  return out;
}

class DecoderLayer : public testing::Test {
 protected:
  DecoderLayer() {
    config_.hidden = kHidden;
    config_.ffn_hidden = 512;
    config_.n_head = 4;
    const auto norm = [](std::int64_t size, float phase) {
      std::vector<float> values(static_cast<std::size_t>(size));
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = 1.0f + 0.5f * std::sin(phase + static_cast<float>(i));
      return values;
    };
    attn_norm_ = norm(kHidden, 1);
    post_attention_norm_ = norm(kHidden, 2);
    ffn_norm_ = norm(kHidden, 3);
    post_ffw_norm_ = norm(kHidden, 4);
    q_norm_ = norm(attention_.head_dim, 5);
    k_norm_ = norm(attention_.head_dim, 6);
    const std::int64_t q_dim = config_.n_head * attention_.head_dim,
                       kv_dim = attention_.n_head_kv * attention_.head_dim;
    q_ = testkit::random_weights(TensorType::kQ4K, q_dim, kHidden, 1, 0.1f);
    k_ = testkit::random_weights(TensorType::kQ4K, kv_dim, kHidden, 2, 0.1f);
    v_ = testkit::random_weights(TensorType::kQ6K, kv_dim, kHidden, 3, 0.1f);
    output_ = testkit::random_weights(TensorType::kQ4K, kHidden, q_dim, 4, 0.1f);
    gate_ = testkit::random_weights(TensorType::kQ4K, 512, kHidden, 5, 0.1f);
    up_ = testkit::random_weights(TensorType::kQ4K, 512, kHidden, 6, 0.1f);
    down_ = testkit::random_weights(TensorType::kQ6K, kHidden, 512, 7, 0.1f);
    x_ = testkit::random_matrix<double>(3, kToken, kHidden);
    pending_value_ = testkit::random_matrix<double>(4, kToken, kHidden) * 5.0;
  }

  [[nodiscard]] LayerWeights weights(bool sliding) const {
    LayerWeights weights;
    weights.attn_norm = attn_norm_;
    weights.attn_q = q_.view();
    weights.attn_k = k_.view();
    if (sliding) weights.attn_v = v_.view();
    weights.attn_q_norm = q_norm_;
    weights.attn_k_norm = k_norm_;
    weights.attn_output = output_.view();
    weights.post_attention_norm = post_attention_norm_;
    weights.ffn_norm = ffn_norm_;
    weights.ffn_gate = gate_.view();
    weights.ffn_up = up_.view();
    weights.ffn_down = down_.view();
    weights.post_ffw_norm = post_ffw_norm_;
    weights.output_scale = 0.75f;
    return weights;
  }

  [[nodiscard]] Pending<double> pending(float scale) const {
    return {.value = pending_value_, .post_norm = post_ffw_norm_, .scale = scale};
  }
  [[nodiscard]] Matrix<double> finished(double scale) const {
    return (x_ + normalised(pending_value_, post_ffw_norm_)) * scale;
  }

  /// Heads of `m` normalised apart, then turned where `rope` is set.
  [[nodiscard]] Matrix<double> heads(Matrix<double> m, const std::vector<float>& weight, bool rope) const {
    for (Eigen::Index at = 0; at < m.cols(); at += attention_.head_dim) {
      m.middleCols(at, attention_.head_dim) = normalised(m.middleCols(at, attention_.head_dim), weight);
    }
    if (rope) reference::rope<double>(m, kPosition, attention_);
    return m;
  }

  ModelConfig config_ = gemma4_tiny();
  AttentionConfig attention_{.head_dim = 64, .n_head_kv = 2, .rope_theta = 1e4, .rope_pairs = 32};
  std::vector<float> attn_norm_, post_attention_norm_, ffn_norm_, post_ffw_norm_, q_norm_, k_norm_;
  testkit::OwnedMatrix q_, k_, v_, output_, gate_, up_, down_;
  Matrix<double> x_, pending_value_;
};

constexpr double kSameFormula = 1e-11;  // double arithmetic in another order

TEST_F(DecoderLayer, ProjectQkvFinishesTheResidualWithThePreviousLayersScale) {
  Pending<double> before = pending(0.5f);
  Matrix<double> x = x_;
  const auto qkv = reference::project_qkv<double>(config_, attention_, weights(true), kPosition, x, before);
  EXPECT_TRUE(testkit::close(flat(x), flat(finished(0.5)), kSameFormula));
  EXPECT_FALSE(testkit::close(flat(x), flat(x_ + normalised(pending_value_, post_ffw_norm_) * 0.5), 1e-2))
      << "the control: the scale is of the whole stream, not of what is added";
  EXPECT_EQ(before.value.size(), 0) << "nothing stays pending";
  const Matrix<double> h = normalised(finished(0.5), attn_norm_);
  EXPECT_TRUE(testkit::close(flat(qkv.q), flat(heads(product(h, q_), q_norm_, true)), kSameFormula));
  EXPECT_TRUE(testkit::close(flat(qkv.k), flat(heads(product(h, k_), k_norm_, true)), kSameFormula));
  EXPECT_TRUE(testkit::close(flat(qkv.v), flat(heads(product(h, v_), {}, false)), kSameFormula));
}

TEST_F(DecoderLayer, OnAFullLayerVIsTheRawProjectionOfK) {
  Pending<double> nothing;
  Matrix<double> x = x_;
  const auto qkv = reference::project_qkv<double>(config_, attention_, weights(false), kPosition, x, nothing);
  EXPECT_EQ(x, x_) << "nothing was pending";
  const Matrix<double> raw = product(normalised(x_, attn_norm_), k_);
  EXPECT_TRUE(testkit::close(flat(qkv.v), flat(heads(raw, {}, false)), kSameFormula));
  EXPECT_FALSE(testkit::close(flat(qkv.v), flat(qkv.k), 1e-2)) << "the control: without K's weight and rotation";
}

TEST_F(DecoderLayer, OutputsStayPendingWithTheirOwnNormAndScale) {
  const Matrix<double> attended = testkit::random_matrix<double>(5, kToken, config_.n_head * attention_.head_dim);
  const auto after_attention = reference::project_output<double>(weights(true), attended);
  EXPECT_TRUE(testkit::close(flat(after_attention.value), flat(product(attended, output_)), kSameFormula));
  EXPECT_EQ(after_attention.post_norm.data(), post_attention_norm_.data());
  EXPECT_EQ(after_attention.scale, 1.0f);
  const Matrix<double> activation = testkit::random_matrix<double>(6, kToken, 512);
  const auto after_mlp = reference::down<double>(weights(true), activation);
  EXPECT_TRUE(testkit::close(flat(after_mlp.value), flat(product(activation, down_)), kSameFormula));
  EXPECT_EQ(after_mlp.post_norm.data(), post_ffw_norm_.data());
  EXPECT_EQ(after_mlp.scale, 0.75f) << "the layer's scale comes with its last output";
}

TEST_F(DecoderLayer, GateUpWorksOnTheFinishedResidual) {
  Pending<double> before = pending(1.0f);
  Matrix<double> x = x_;
  const Matrix<double> activation = reference::gate_up<double>(config_, weights(true), x, before);
  const Matrix<double> h = normalised(finished(1.0), ffn_norm_);
  EXPECT_TRUE(testkit::close(flat(x), flat(finished(1.0)), kSameFormula));
  EXPECT_TRUE(testkit::close(flat(activation), flat(reference::gelu_times<double>(product(h, gate_), product(h, up_))),
                             kSameFormula));
}

}  // namespace
