// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/linear_prefill.cuh"
#include "cuda/weights/repack.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/block_formats.hpp"
#include "experiments/driver.hpp"
#include "experiments/gpu_run_info.cuh"
#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"

namespace gemma4::experiment {
namespace {

constexpr std::int64_t kPoolRows = 64;  ///< rows that are drawn; matrices repeat them

/// A matrix of a layer; gate and up are one, row by row in turn.
struct Matrix {
  std::string name;
  TensorType type = TensorType::kF32;
  std::int64_t rows = 0, cols = 0;
  bool is_gate_up = false;
  bool operator==(const Matrix&) const = default;

  [[nodiscard]] std::int64_t bytes() const { return rows * cuda::packed_row_bytes(type, cols); }
  [[nodiscard]] double flop(std::int64_t n_token) const { return 2.0 * static_cast<double>(rows * cols * n_token); }
};

/// The matrices of the layers, in the order in which a chunk passes them.
std::vector<Matrix> matrices_of(const std::string& mix) {
  const ModelConfig config = gemma4_31b();
  const std::vector<ModelTensor> tensors = tensors_of_31b(mix);
  std::map<std::string, const ModelTensor*> by_name;
  for (const ModelTensor& tensor : tensors) by_name[tensor.name] = &tensor;
  std::vector<Matrix> matrices;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down"}) {
      const auto found = by_name.find(concat("blk.", layer, ".", name, ".weight"));
      if (found == by_name.end()) continue;  // a full layer has no V of its own
      const ModelTensor& tensor = *found->second;
      const bool is_gate = std::string(name) == "ffn_gate";
      matrices.push_back({.name = is_gate ? "gate_up" : name,
                          .type = tensor.type,
                          .rows = (is_gate ? 2 : 1) * tensor.rows(),
                          .cols = tensor.row_len(),
                          .is_gate_up = is_gate});
    }
  }
  return matrices;
}

/// Rows of one type and width: as numbers on the host, packed on the device.
struct Pool {
  std::vector<float> values;
  cuda::DeviceBuffer<std::byte> packed;
};

class Bench {
 public:
  Bench(std::uint64_t seed, std::int64_t max_token)
      : rows_(seed),
        ahead_(cuda::LinearPrefill::kDefaultScratchBytes, true),
        in_turn_(cuda::LinearPrefill::kDefaultScratchBytes, false) {
    x_ = cuda::DeviceBuffer<Bf16>(max_token * kMaxCols);
    fill_random(x_.data(), x_.size(), static_cast<std::uint32_t>(seed) + 7, stream_);
    out_ = cuda::DeviceBuffer<Bf16>(max_token * kMaxRows);
    dequantised_ = cuda::DeviceBuffer<Bf16>(cuda::LinearPrefill::kDefaultScratchBytes / 2);
    copy_gb_per_s_ = copy_gb_per_s(stream_);
  }

  [[nodiscard]] double copy_rate() const { return copy_gb_per_s_; }

  /// Memory with `matrices` one after another, and where each begins.
  struct Weights {
    cuda::DeviceBuffer<std::byte> bytes;
    std::vector<std::int64_t> begin;
  };
  [[nodiscard]] Weights make_weights(const std::vector<Matrix>& matrices) {
    Weights weights;
    std::int64_t total = 0;
    for (const Matrix& matrix : matrices) {
      weights.begin.push_back(total);
      total += (matrix.bytes() + 255) / 256 * 256;
    }
    weights.bytes = cuda::DeviceBuffer<std::byte>(total);
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      repeat_pool(matrices[i], weights.bytes.data() + weights.begin[i]);
    }
    stream_.synchronize();
    return weights;
  }

  void enqueue(const Matrix& matrix, const std::byte* data, std::int64_t n_token, bool ahead) {
    cuda::LinearPrefill& prefill = ahead ? ahead_ : in_turn_;
    const cuda::PackedMatrix weight{matrix.type, matrix.rows, matrix.cols, data};
    const auto x = make_view(static_cast<const Bf16*>(x_.data()), n_token, matrix.cols);
    if (matrix.is_gate_up) {
      prefill.gate_up<Bf16>(x, {.joined = weight, .gate = {}, .up = {}},
                            std::span(out_.data(), static_cast<std::size_t>(n_token * matrix.rows)),
                            make_view(out_.data(), n_token, matrix.rows / 2), stream_);
    } else {
      prefill.linear<Bf16>(x, weight, make_view(out_.data(), n_token, matrix.rows), stream_);
    }
  }

  /// Milliseconds that the host needs to enqueue do not count as long as the device is behind, so this is not recorded:
  /// a recorded product would not be dequantised ahead.
  template <class TEnqueue>
  [[nodiscard]] Timing time_eager(int n_launch, int n_warmup, int n_repeat, TEnqueue&& enqueue_one) {
    std::vector<cuda::Event> events(static_cast<std::size_t>(n_repeat) + 1);
    int count = 0;
    for (; count < n_warmup; ++count) enqueue_one(count);
    events[0].record(stream_);
    for (std::size_t i = 1; i < events.size(); ++i) {
      for (int launch = 0; launch < n_launch; ++launch) enqueue_one(count++);
      events[i].record(stream_);
    }
    events.back().synchronize();
    std::vector<double> us;
    for (std::size_t i = 1; i < events.size(); ++i) us.push_back(events[i].us_since(events[i - 1]) / n_launch);
    std::ranges::sort(us);
    const auto at = [&](double q) {
      return us[static_cast<std::size_t>(q * static_cast<double>(us.size() - 1) + 0.5)];
    };
    return {.median_us = at(0.5), .p10_us = at(0.1), .p90_us = at(0.9), .n_repeat = n_repeat};
  }

  struct Times {
    Timing linear;
    double gemm_us = 0, dequantise_us = 0;
  };
  [[nodiscard]] Times time_matrix(const Matrix& matrix, std::int64_t n_token) {
    constexpr std::int64_t kBeyondL2 = 256 << 20;
    const std::int64_t n_copy = std::max<std::int64_t>(2, (kBeyondL2 + matrix.bytes() - 1) / matrix.bytes());
    const Weights weights = make_weights(std::vector<Matrix>(static_cast<std::size_t>(n_copy), matrix));
    const auto data = [&](int i) { return weights.bytes.data() + weights.begin[static_cast<std::size_t>(i % n_copy)]; };
    Times times;
    times.linear = time_eager(4, 3, 8, [&](int i) { enqueue(matrix, data(i), n_token, true); });
    const std::int64_t slice = std::min(matrix.rows, dequantised_.size() / matrix.cols);
    times.dequantise_us =
        time_eager(4, 3, 8, [&](int i) {
          const cuda::PackedMatrix weight{matrix.type, matrix.rows, matrix.cols, data(i)};
          for (std::int64_t row = 0; row < matrix.rows; row += slice) {
            cuda::dequantise_rows(weight, row, std::min(slice, matrix.rows - row), 1, dequantised_.data(), stream_);
          }
        }).median_us;
    const Matrix plain{.name = {},
                       .type = TensorType::kBf16,
                       .rows = matrix.rows / (matrix.is_gate_up ? 2 : 1),
                       .cols = matrix.cols,
                       .is_gate_up = false};
    const int n_gemm = matrix.is_gate_up ? 2 : 1;
    const auto* const bf16 = reinterpret_cast<const std::byte*>(dequantised_.data());
    times.gemm_us = n_gemm * time_eager(4, 3, 8, [&](int) { enqueue(plain, bf16, n_token, true); }).median_us;
    return times;
  }

  /// All matrices of a pass, each its own memory, one after another.
  [[nodiscard]] Timing time_pass(const std::vector<Matrix>& matrices, const Weights& weights, std::int64_t n_token,
                                 bool ahead) {
    return time_eager(1, 1, 3, [&](int) {
      for (std::size_t i = 0; i < matrices.size(); ++i) {
        enqueue(matrices[i], weights.bytes.data() + weights.begin[i], n_token, ahead);
      }
    });
  }

  /// Largest error of all outputs of three tokens, in units of the bound for weights rounded to bf16, float sums and
  /// outputs rounded to bf16; above 1 is wrong. Rows repeat those of a pool, so that few exact products serve all.
  [[nodiscard]] double error_of_bound(const Matrix& matrix, std::int64_t n_token) {
    const Weights weights = make_weights({matrix});
    out_.fill_bytes(0xFF, stream_);
    enqueue(matrix, weights.bytes.data(), n_token, true);
    const std::int64_t width = matrix.rows / (matrix.is_gate_up ? 2 : 1);
    const Pool& pool = pool_of(matrix.type, matrix.cols);
    double worst = 0;
    for (const std::int64_t token : {std::int64_t{0}, n_token / 2, n_token - 1}) {
      std::vector<Bf16> x(static_cast<std::size_t>(matrix.cols)), out(static_cast<std::size_t>(width));
      copy_row(x_.data() + token * matrix.cols, x);
      copy_row(out_.data() + token * width, out);
      std::vector<Exact> exact;
      for (std::int64_t row = 0; row < kPoolRows; ++row) exact.push_back(exact_product(x, pool, row));
      for (std::int64_t column = 0; column < width; ++column) {
        const auto value = static_cast<double>(to_float(out[static_cast<std::size_t>(column)]));
        const auto at = [&](std::int64_t row) { return exact[static_cast<std::size_t>(row % kPoolRows)]; };
        const Exact expected = matrix.is_gate_up ? gelu_times(at(2 * column), at(2 * column + 1)) : at(column);
        const double error = std::abs(value - expected.value) / expected.bound;
        if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
      }
    }
    return worst;
  }

 private:
  static constexpr std::int64_t kMaxCols = 21504, kMaxRows = 43008;

  struct Exact {
    double value = 0, bound = 0;
  };

  [[nodiscard]] static Exact exact_product(const std::vector<Bf16>& x, const Pool& pool, std::int64_t row) {
    double sum = 0, magnitude = 0;
    const std::size_t n = x.size();
    for (std::size_t k = 0; k < n; ++k) {
      const double term =
          static_cast<double>(to_float(x[k])) * static_cast<double>(pool.values[static_cast<std::size_t>(row) * n + k]);
      sum += term, magnitude += std::abs(term);
    }
    const double inner = (0x1p-9 + static_cast<double>(n + 1) * 0x1p-24) * magnitude;
    return {sum, inner + 0x1p-8 * (std::abs(sum) + inner) + 1e-30};
  }

  /// gelu grows by at most 1.13 times its argument; the product is rounded once more.
  [[nodiscard]] static Exact gelu_times(const Exact& gate, const Exact& up) {
    const double inner = std::sqrt(2 / 3.14159265358979323846) * (gate.value + 0.044715 * std::pow(gate.value, 3));
    const double gelu = 0.5 * gate.value * (1 + std::tanh(inner)), value = gelu * up.value;
    const double bound = 1.13 * gate.bound * (std::abs(up.value) + up.bound) + std::abs(gelu) * up.bound;
    return {value, bound + 0x1p-8 * (std::abs(value) + bound) + 1e-30};
  }

  void copy_row(const Bf16* from, std::vector<Bf16>& to) {
    cuda::check(cudaMemcpyAsync(to.data(), from, to.size() * sizeof(Bf16), cudaMemcpyDeviceToHost, stream_),
                "copy of a row");
    stream_.synchronize();
  }

  [[nodiscard]] const Pool& pool_of(TensorType type, std::int64_t cols) {
    const auto key = std::pair(type, cols);
    const auto found = pools_.find(key);
    if (found != pools_.end()) return found->second;
    const std::int64_t bytes = row_bytes(type, cols);
    std::vector<std::byte> file(static_cast<std::size_t>(kPoolRows * bytes));
    for (std::int64_t row = 0; row < kPoolRows; ++row) {
      rows_.fill("pool", row, type, cols, 1.0 / std::sqrt(static_cast<double>(cols)),
                 std::span(file).subspan(static_cast<std::size_t>(row * bytes), static_cast<std::size_t>(bytes)));
    }
    Pool pool{std::vector<float>(static_cast<std::size_t>(kPoolRows * cols)),
              cuda::DeviceBuffer<std::byte>(kPoolRows * cuda::packed_row_bytes(type, cols))};
    dequantise_row(type, file, pool.values);
    cuda::DeviceBuffer<std::byte> staging(kPoolRows * bytes);
    cuda::upload_packed({type, kPoolRows, cols, file}, pool.packed.data(), 1, staging, stream_);
    stream_.synchronize();
    return pools_.emplace(key, std::move(pool)).first->second;
  }

  void repeat_pool(const Matrix& matrix, std::byte* to) {
    const Pool& pool = pool_of(matrix.type, matrix.cols);
    for (std::int64_t left = matrix.bytes(); left > 0; left -= pool.packed.size(), to += pool.packed.size()) {
      cuda::check(cudaMemcpyAsync(to, pool.packed.data(), static_cast<std::size_t>(std::min(pool.packed.size(), left)),
                                  cudaMemcpyDeviceToDevice, stream_),
                  "repetition of a pool of rows");
    }
  }

  SyntheticRows rows_;
  cuda::Stream stream_;
  cuda::LinearPrefill ahead_, in_turn_;
  std::map<std::pair<TensorType, std::int64_t>, Pool> pools_;
  cuda::DeviceBuffer<Bf16> x_, out_, dequantised_;
  double copy_gb_per_s_ = 0;
};

double tflops(double flop, double us) {
  return 1e-6 * flop / us;
}

void write_matrix(ResultTable& table, Bench& bench, const std::string& mix, const Matrix& matrix, std::int64_t count,
                  std::int64_t n_token, const Bench::Times& times) {
  const double error = bench.error_of_bound(matrix, n_token), flop = matrix.flop(n_token);
  const double dequantise_bytes = static_cast<double>(matrix.bytes() + 2 * matrix.rows * matrix.cols);
  const double dequantise_gb_per_s = 1e-3 * dequantise_bytes / times.dequantise_us;
  auto row = table.row();
  row.set("mix", mix).set("matrix", matrix.name).set("type", type_name(matrix.type)).set("n_out", matrix.rows);
  row.set("n_in", matrix.cols).set("n_token", n_token).set("n_per_pass", count).set("dequantise", "ahead");
  row.set("median_us", times.linear.median_us).set("p10_us", times.linear.p10_us).set("p90_us", times.linear.p90_us);
  row.set("n_repeat", times.linear.n_repeat).set("tflop", 1e-12 * flop);
  row.set("tflops", tflops(flop, times.linear.median_us)).set("gemm_us", times.gemm_us);
  row.set("gemm_tflops", tflops(flop, times.gemm_us)).set("of_gemm", times.gemm_us / times.linear.median_us);
  row.set("dequantise_us", times.dequantise_us).set("dequantise_gb_per_s", dequantise_gb_per_s);
  row.set("copy_gb_per_s", bench.copy_rate()).set("dequantise_of_copy", dequantise_gb_per_s / bench.copy_rate());
  row.set("error_of_bound", error);
  if (error <= 1.0) {
    row.commit();
  } else {
    row.fail("wrong: the error is beyond the bound");
  }
}

void write_pass(ResultTable& table, const std::string& mix, const char* name, const char* dequantise,
                std::int64_t n_token, double flop, const Timing& timing, std::optional<double> gemm_us,
                std::optional<double> dequantise_us) {
  auto row = table.row();
  row.set("mix", mix).set("matrix", name).set("n_token", n_token).set("n_per_pass", 1).set("dequantise", dequantise);
  row.set("median_us", timing.median_us).set("p10_us", timing.p10_us).set("p90_us", timing.p90_us);
  row.set("n_repeat", timing.n_repeat).set("tflop", 1e-12 * flop).set("tflops", tflops(flop, timing.median_us));
  row.set("gemm_us", gemm_us).set("dequantise_us", dequantise_us);
  if (gemm_us) row.set("gemm_tflops", tflops(flop, *gemm_us)).set("of_gemm", *gemm_us / timing.median_us);
  row.commit();
}

void measure_mix(ResultTable& table, Bench& bench, const std::string& mix, const std::vector<std::int64_t>& tokens) {
  const std::vector<Matrix> matrices = matrices_of(mix);
  std::vector<std::pair<Matrix, std::int64_t>> distinct;
  for (const Matrix& matrix : matrices) {
    const auto found = std::ranges::find_if(distinct, [&](const auto& entry) { return entry.first == matrix; });
    found == distinct.end() ? (void)distinct.emplace_back(matrix, 1) : (void)++found->second;
  }
  for (const std::int64_t n_token : tokens) {
    Timing sum;
    double flop = 0, gemm_us = 0, dequantise_us = 0;
    for (const auto& [matrix, count] : distinct) {
      const Bench::Times times = bench.time_matrix(matrix, n_token);
      write_matrix(table, bench, mix, matrix, count, n_token, times);
      const auto n = static_cast<double>(count);
      sum.median_us += n * times.linear.median_us, sum.p10_us += n * times.linear.p10_us;
      sum.p90_us += n * times.linear.p90_us, sum.n_repeat = times.linear.n_repeat;
      gemm_us += n * times.gemm_us, dequantise_us += n * times.dequantise_us, flop += n * matrix.flop(n_token);
    }
    write_pass(table, mix, "pass_sum", "ahead", n_token, flop, sum, gemm_us, dequantise_us);
    const Bench::Weights weights = bench.make_weights(matrices);
    for (const bool ahead : {true, false}) {
      write_pass(table, mix, "pass_chained", ahead ? "ahead" : "in_turn", n_token, flop,
                 bench.time_pass(matrices, weights, n_token, ahead), gemm_us, dequantise_us);
    }
  }
}

/// Gate and up, with every matrix of one type.
void measure_gate_up(ResultTable& table, Bench& bench, const std::string& format,
                     const std::vector<std::int64_t>& tokens) {
  const std::vector<Matrix> matrices = matrices_of(format);
  const auto is_gate_up = [](const Matrix& matrix) { return matrix.is_gate_up; };
  const Matrix& matrix = *std::ranges::find_if(matrices, is_gate_up);
  for (const std::int64_t n_token : tokens) {
    write_matrix(table, bench, format, matrix, std::ranges::count_if(matrices, is_gate_up), n_token,
                 bench.time_matrix(matrix, n_token));
  }
}

const TableShape kShape = {
    {"mix", "matrix", "type", "n_out", "n_in", "n_token", "n_per_pass", "dequantise"},
    {"median_us", "p10_us", "p90_us", "n_repeat", "tflop", "tflops", "gemm_us", "gemm_tflops", "of_gemm",
     "dequantise_us", "dequantise_gb_per_s", "copy_gb_per_s", "dequantise_of_copy", "error_of_bound"},
    {"mix", "matrix", "type", "n_out", "n_in", "n_token", "n_per_pass", "dequantise", "median_us", "tflops",
     "gemm_tflops", "of_gemm", "dequantise_of_copy", "error_of_bound", "status"}};

void run(int argc, char** argv) {
  CLI::App app("How fast a chunk of tokens passes the matrices of the 31B's layers, one by one and all of them.");
  DriverOptions driver;
  std::vector<std::int64_t> tokens = {512, 2048, 4096};
  std::vector<std::string> mixes = {"q4_k_m"}, formats = block_format_names();
  add_seed(app, driver);
  add_out(app, driver);
  add_whole(app, "--tokens", tokens, "Tokens of a chunk, comma-separated", {1, 16384})->delimiter(',');
  app.add_option("--mix", mixes, "Types of the weights: a mix, or a block format for every matrix, comma-separated")
      ->delimiter(',')
      ->check(CLI::IsMember(mix_or_format_names()))
      ->capture_default_str();
  app.add_option("--format", formats, "Block formats of which gate and up alone are measured, comma-separated; or none")
      ->delimiter(',')
      ->check(CLI::IsMember(block_format_names_or_none()))
      ->capture_default_str();
  parse(app, argc, argv);
  formats = formats_beside(mixes, formats);

  const RunInfo info = gpu_run_info("linear_prefill", argc, argv, driver.seed);
  run_table(driver, info, kShape, [&](ResultTable& table) {
    Bench bench(driver.seed, std::ranges::max(tokens));
    for (const std::string& mix : mixes) measure_mix(table, bench, mix, tokens);
    for (const std::string& format : formats) measure_gate_up(table, bench, format, tokens);
  });
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
