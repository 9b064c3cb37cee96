// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/lm_head.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/residual_norm.cuh"
#include "cuda/weights/repack.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/bf16_product.cuh"
#include "experiments/support/linear_launches.cuh"
#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"

/// The device's side of `linear`: weights, inputs, launches and their times, and whether their results are right.
namespace gemma4::experiment {

inline constexpr std::int64_t kPoolRows = 64;  ///< rows that are drawn; matrices repeat them

/// Rows of one type and width, on the host and packed on the device.
struct Pool {
  std::vector<std::byte> file;
  cuda::DeviceBuffer<std::byte> packed;
};

/// What `linear` may change of how products run.
struct LinearTuning {
  int variant = cuda::kLinearVariantSum;                      ///< see cuda::LinearVariant
  std::int64_t codes_from = cuda::kCodesFromValues;           ///< see cuda::LinearOptions
  std::int64_t norm_codes_from = cuda::kNormCodesFromTokens;  ///< tokens from which a norm in front makes the codes
};

class LinearBench {
 public:
  LinearBench(std::uint64_t seed, const LinearTuning& tuning)
      : rows_(seed), device_(cuda::current_device()), tuning_(tuning) {
    codes_ = cuda::DeviceBuffer<std::uint8_t>(cuda::linear_codes_bytes(cuda::kMaxInt8Tokens, kMaxCols));
    x_ = cuda::DeviceBuffer<Bf16>(cuda::kMaxInt8Tokens * kMaxCols);
    normed_ = cuda::DeviceBuffer<Bf16>(cuda::kMaxInt8Tokens * kHidden);
    fill_random(x_.data(), x_.size(), static_cast<std::uint32_t>(seed) + 7, stream_);
    host_x_ = x_.to_host(stream_);
    out_ = cuda::DeviceBuffer<float>(cuda::kMaxInt8Tokens * kMaxRows);
    norms_ = cuda::DeviceBuffer<float>(std::vector<float>(static_cast<std::size_t>(kHidden), 1.0f));
    const std::vector<float> rows(static_cast<std::size_t>(cuda::kMaxInt8Tokens * kHidden), 0.25f);
    pending_ = cuda::DeviceBuffer<float>(rows);
    residual_ = cuda::DeviceBuffer<float>(rows);
    tickets_ = cuda::DeviceBuffer<cuda::LinearTickets>(1);
    tickets_.fill_bytes(0, stream_);
    copy_gb_per_s_ = copy_gb_per_s(stream_);
  }

  [[nodiscard]] double copy_rate() const { return copy_gb_per_s_; }

  /// Memory with the matrices of `launches` one after another, and where each begins.
  struct Weights {
    cuda::DeviceBuffer<std::byte> bytes;
    std::vector<std::int64_t> begin;
  };
  [[nodiscard]] Weights make_weights(const std::vector<Launch>& launches) {
    Weights weights;
    std::int64_t total = 0;
    for (const Launch& launch : launches) {
      weights.begin.push_back(total);
      total += (launch.bytes() + 255) / 256 * 256;
    }
    weights.bytes = cuda::DeviceBuffer<std::byte>(total);
    for (std::size_t i = 0; i < launches.size(); ++i) {
      std::byte* to = weights.bytes.data() + weights.begin[i];
      for (std::size_t m = 0; m < launches[i].rows.size(); ++m) {
        to = repeat_pool(launches[i].types[m], launches[i].rows[m], launches[i].cols, to);
      }
    }
    stream_.synchronize();
    return weights;
  }

  void enqueue(const Launch& launch, const std::byte* data, std::int64_t n_token, Start start,
               cuda::LinearOptions options) {
    std::array<cuda::PackedMatrix, 4> matrices{};
    std::array<View<float, 2>, 4> outs{};
    float* out = out_.data();
    for (std::size_t m = 0; m < launch.rows.size(); ++m) {
      matrices[m] = {launch.types[m], launch.rows[m], launch.cols, data};
      data += matrices[m].bytes();
      outs[m] = make_view(out, n_token, launch.rows[m]);
      out += n_token * launch.rows[m];
    }
    const auto run = [&](const View<const Bf16, 2>& input) {
      const std::span weights = std::span(matrices).first(launch.rows.size());
      const std::span<const View<float, 2>> views = std::span(outs).first(launch.rows.size());
      if (launch.end == End::kSoftcap) {
        cuda::lm_head(input, matrices[0], 30.0f, outs[0], device_, stream_, options);
      } else if (launch.end == End::kGeluUp) {
        const auto gated = make_view(reinterpret_cast<Bf16*>(out_.data()), n_token, launch.rows[0] / 2);
        cuda::gate_up_decode(input, {.joined = matrices[0], .gate = {}, .up = {}}, {}, gated, device_, stream_,
                             options);
      } else {
        cuda::quantized_linear_decode<Bf16, float>(input, weights, views, device_, stream_, options);
      }
    };
    if (start == Start::kPlain || !launch.begins_with_norm) {
      return run(make_view(static_cast<const Bf16*>(x_.data()), n_token, launch.cols));
    }
    const cuda::LinearCodes room = n_token >= tuning_.norm_codes_from ? options.codes : cuda::LinearCodes{};
    const bool has_codes = cuda::residual_norm<float, Bf16>(
        make_view(residual_.data(), n_token, launch.cols),
        make_view(static_cast<const float*>(pending_.data()), n_token, launch.cols), norms_.data(), 1.0f, norms_.data(),
        1e-6f, make_view(normed_.data(), n_token, launch.cols), stream_,
        {.overlap = device_.compute_capability >= 90, .x_at_rest = true, .codes = room});
    if (has_codes) options.made = room;
    run(make_view(static_cast<const Bf16*>(normed_.data()), n_token, launch.cols));
  }

  /// Results of the pool's rows, [n_token, kPoolRows], of the input's rows from `first` on.
  [[nodiscard]] std::vector<float> pool_results(TensorType type, std::int64_t cols, const Width& width,
                                                std::int64_t first = 0) {
    const cuda::PackedMatrix matrix{type, kPoolRows, cols, pool_of(type, cols).packed.data()};
    const auto out = make_view(out_.data(), width.n_token, kPoolRows);
    cuda::quantized_linear_decode<Bf16, float>(
        make_view(static_cast<const Bf16*>(x_.data()) + first * cols, width.n_token, cols), matrix, out, device_,
        stream_, {.int8_from = width.int8_from()});
    std::vector<float> results = out_.to_host(stream_);
    results.resize(static_cast<std::size_t>(width.n_token * kPoolRows));
    return results;
  }

  /// Whether every row of the pool has the bits that each token gives alone, by dot products.
  [[nodiscard]] bool has_bits_of_one(TensorType type, std::int64_t cols, const Width& width) {
    const std::vector<float> results = pool_results(type, cols, width);
    for (std::int64_t t = 0; t < width.n_token; ++t) {
      const std::vector<float> alone = pool_results(type, cols, {1, cuda::LinearPath::kDot}, t);
      if (std::memcmp(alone.data(), results.data() + t * kPoolRows, alone.size() * sizeof(float)) != 0) return false;
    }
    return true;
  }

  /// Largest error of the pool's rows, in units of the bound of 8-bit activations; above 1 is wrong.
  [[nodiscard]] double error_of_bound(TensorType type, std::int64_t cols, const Width& width) {
    const std::int64_t n_token = width.n_token;
    const Pool& pool = pool_of(type, cols);
    const std::vector<float> out = pool_results(type, cols, width);
    std::vector<float> weight(static_cast<std::size_t>(kPoolRows * cols));
    dequantise_row(type, pool.file, weight);
    double worst = 0;
    for (std::int64_t t = 0; t < n_token; ++t) {
      for (std::int64_t row = 0; row < kPoolRows; ++row) {
        worst = std::max(worst, row_error(std::span(host_x_).subspan(static_cast<std::size_t>(t * cols)),
                                          std::span(weight).subspan(static_cast<std::size_t>(row * cols),
                                                                    static_cast<std::size_t>(cols)),
                                          static_cast<double>(out[static_cast<std::size_t>(t * kPoolRows + row)])));
      }
    }
    return worst;
  }

  [[nodiscard]] Timing time_launch(const Launch& launch, const Width& width) {
    const std::int64_t n_copy = std::max<std::int64_t>(2, (kBeyondL2 + launch.bytes() - 1) / launch.bytes());
    const Weights weights = make_weights(std::vector<Launch>(static_cast<std::size_t>(n_copy), launch));
    const int n_launch = static_cast<int>(n_copy * ((15 + n_copy) / n_copy));
    return time_calls(stream_, {.n_launch = n_launch, .n_warmup = 4, .n_repeat = 30}, [&](int i) {
      enqueue(launch, weights.bytes.data() + weights.begin[static_cast<std::size_t>(i % n_copy)], width.n_token,
              Start::kPlain, options_of(width));
    });
  }

  /// All matrices of one token, each its own memory, one launch after another.
  [[nodiscard]] Timing time_token(const std::vector<Launch>& launches, const Weights& weights, const Width& width,
                                  Start start) {
    return time_calls(stream_, {.n_launch = 1, .n_warmup = 3, .n_repeat = 20}, [&](int) {
      for (std::size_t i = 0; i < launches.size(); ++i) {
        enqueue(launches[i], weights.bytes.data() + weights.begin[i], width.n_token, start, options_of(width));
      }
    });
  }

  /// The same product of bf16 weights through cuBLAS.
  [[nodiscard]] Timing time_blas(const Launch& launch, std::int64_t n_token) {
    const std::int64_t count = launch.total_rows() * launch.cols,
                       n_copy = std::max(kBeyondL2 / (2 * count), std::int64_t{2});
    cuda::DeviceBuffer<Bf16> weights(n_copy * count);
    fill_random(weights.data(), weights.size(), 3, stream_);
    Bf16Product product(launch.total_rows(), launch.cols, n_token);
    return time_calls(stream_, {.n_launch = static_cast<int>(n_copy), .n_warmup = 3, .n_repeat = 15}, [&](int i) {
      product.enqueue(weights.data() + i % n_copy * count, x_.data(), reinterpret_cast<Bf16*>(out_.data()), stream_);
    });
  }

 private:
  static constexpr std::int64_t kMaxCols = 21504, kMaxRows = 262144, kHidden = 5376, kBeyondL2 = 256 << 20;

  [[nodiscard]] static double row_error(std::span<const Bf16> x, std::span<const float> weight, double out) {
    double exact = 0, bound = 0;
    for (std::size_t first = 0; first < weight.size(); first += 32) {
      double largest = 0, sum = 0;
      for (std::size_t k = first; k < first + 32; ++k) {
        const auto value = static_cast<double>(to_float(x[k])), w = static_cast<double>(weight[k]);
        exact += value * w;
        largest = std::max(largest, std::abs(value));
        sum += std::abs(w);
      }
      bound += (0.50003 / 127 + 64 * 0x1p-24) * largest * sum;
    }
    return std::abs(out - exact) / bound;
  }

  [[nodiscard]] cuda::LinearOptions options_of(const Width& width) {
    return {.tickets = tickets_.data(),
            .variant = cuda::LinearVariant::of(tuning_.variant),
            .codes = {codes_.data(), codes_.size()},
            .codes_from = tuning_.codes_from,
            .int8_from = width.int8_from()};
  }

  [[nodiscard]] const Pool& pool_of(TensorType type, std::int64_t cols) {
    const auto key = std::pair(type, cols);
    const auto found = pools_.find(key);
    if (found != pools_.end()) return found->second;
    const std::int64_t bytes = row_bytes(type, cols);
    Pool pool{std::vector<std::byte>(static_cast<std::size_t>(kPoolRows * bytes)),
              cuda::DeviceBuffer<std::byte>(kPoolRows * cuda::packed_row_bytes(type, cols))};
    for (std::int64_t row = 0; row < kPoolRows; ++row) {
      rows_.fill("pool", row, type, cols, 1.0 / std::sqrt(static_cast<double>(cols)),
                 std::span(pool.file).subspan(static_cast<std::size_t>(row * bytes), static_cast<std::size_t>(bytes)));
    }
    cuda::DeviceBuffer<std::byte> staging(kPoolRows * bytes);
    cuda::upload_packed({type, kPoolRows, cols, pool.file}, pool.packed.data(), 1, staging, stream_);
    stream_.synchronize();
    return pools_.emplace(key, std::move(pool)).first->second;
  }

  std::byte* repeat_pool(TensorType type, std::int64_t rows, std::int64_t cols, std::byte* to) {
    const Pool& pool = pool_of(type, cols);
    std::byte* const end = to + rows * cuda::packed_row_bytes(type, cols);
    for (; to < end; to += std::min<std::int64_t>(pool.packed.size(), end - to)) {
      cuda::check(cudaMemcpyAsync(to, pool.packed.data(),
                                  static_cast<std::size_t>(std::min<std::int64_t>(pool.packed.size(), end - to)),
                                  cudaMemcpyDeviceToDevice, stream_),
                  "repetition of a pool of rows");
    }
    return end;
  }

  SyntheticRows rows_;
  cuda::DeviceInfo device_;
  LinearTuning tuning_;
  cuda::DeviceBuffer<std::uint8_t> codes_;
  cuda::Stream stream_;
  std::map<std::pair<TensorType, std::int64_t>, Pool> pools_;
  cuda::DeviceBuffer<Bf16> x_, normed_;
  std::vector<Bf16> host_x_;
  cuda::DeviceBuffer<float> out_, norms_;
  cuda::DeviceBuffer<float> pending_, residual_;
  cuda::DeviceBuffer<cuda::LinearTickets> tickets_;
  double copy_gb_per_s_ = 0;
};

}  // namespace gemma4::experiment
