// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device_buffer.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/lm_head.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/weight_repack.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/driver.hpp"
#include "experiments/gpu_run_info.cuh"
#include "gemma4/block_decode.hpp"
#include "gemma4/model_tensors.hpp"
#include "gemma4/synthetic_weights.hpp"

namespace gemma4::experiment {
namespace {

constexpr std::int64_t kPoolRows = 64;  ///< rows that are drawn; matrices repeat them

enum class End { kPlain, kGeluUp, kSoftcap };

/// One launch of a decode step: matrices that share their input.
struct Launch {
  std::string name;
  std::vector<TensorType> types;
  std::vector<std::int64_t> rows;
  std::int64_t cols = 0;
  End end = End::kPlain;
  bool operator==(const Launch&) const = default;

  [[nodiscard]] std::int64_t bytes() const {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) sum += rows[i] * cuda::packed_row_bytes(types[i], cols);
    return sum;
  }
  [[nodiscard]] std::int64_t total_rows() const {
    std::int64_t sum = 0;
    for (const std::int64_t count : rows) sum += count;
    return sum;
  }
  [[nodiscard]] std::string type_text() const {
    std::string text;
    for (const TensorType type : types) text += (text.empty() ? "" : "+") + std::string(type_name(type));
    return text;
  }
};

/// The launches of one decode step, in order.
std::vector<Launch> launches_of(const ModelConfig& config, const std::vector<ModelTensor>& tensors) {
  std::map<std::string, const ModelTensor*> by_name;
  for (const ModelTensor& tensor : tensors) by_name[tensor.name] = &tensor;
  std::vector<Launch> launches;
  const auto add = [&](std::string name, const std::vector<std::string>& members, End end) {
    Launch launch{.name = std::move(name), .types = {}, .rows = {}, .end = end};
    for (const std::string& member : members) {
      const auto found = by_name.find(member);
      if (found == by_name.end()) continue;
      launch.cols = found->second->row_len();
      launch.types.push_back(found->second->type);
      launch.rows.push_back(found->second->rows());
    }
    if (end == End::kGeluUp) launch.types = {launch.types[0]}, launch.rows = {launch.rows[0] + launch.rows[1]};
    launches.push_back(std::move(launch));
  };
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    const std::string kind = config.sliding_layer(layer) ? "sliding" : "full";
    add("qkv_" + kind, {prefix + "attn_q.weight", prefix + "attn_k.weight", prefix + "attn_v.weight"}, End::kPlain);
    add("attn_output_" + kind, {prefix + "attn_output.weight"}, End::kPlain);
    add("gate_up", {prefix + "ffn_gate.weight", prefix + "ffn_up.weight"}, End::kGeluUp);
    add("down", {prefix + "ffn_down.weight"}, End::kPlain);
  }
  add("lm_head", {"token_embd.weight"}, End::kSoftcap);
  return launches;
}

/// Rows of one type and width, on the host and packed on the device.
struct Pool {
  std::vector<std::byte> file;
  cuda::DeviceBuffer<std::byte> packed;
};

class Bench {
 public:
  explicit Bench(std::uint64_t seed) : rows_(seed), device_(cuda::current_device()) {
    x_ = cuda::DeviceBuffer<Bf16>(cuda::kMaxDecodeTokens * kMaxCols);
    fill_random(x_.data(), x_.size(), static_cast<std::uint32_t>(seed) + 7, stream_);
    host_x_ = x_.to_host(stream_);
    out_ = cuda::DeviceBuffer<float>(cuda::kMaxDecodeTokens * kMaxRows);
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

  void enqueue(const Launch& launch, const std::byte* data, std::int64_t n_token) {
    const auto x = make_view(static_cast<const Bf16*>(x_.data()), n_token, launch.cols);
    std::array<cuda::PackedMatrix, 4> matrices{};
    std::array<View<float, 2>, 4> outs{};
    float* out = out_.data();
    for (std::size_t m = 0; m < launch.rows.size(); ++m) {
      matrices[m] = {launch.types[m], launch.rows[m], launch.cols, data};
      data += matrices[m].bytes();
      outs[m] = make_view(out, n_token, launch.rows[m]);
      out += n_token * launch.rows[m];
    }
    if (launch.end == End::kSoftcap) {
      cuda::lm_head<Bf16>(x, matrices[0], 30.0f, outs[0], device_, stream_);
    } else if (launch.end == End::kGeluUp) {
      const auto gated = make_view(reinterpret_cast<Bf16*>(out_.data()), n_token, launch.rows[0] / 2);
      cuda::gate_up_decode<Bf16, Bf16>(x, {.joined = matrices[0], .gate = {}, .up = {}}, {}, gated, device_, stream_);
    } else {
      cuda::quantized_linear_decode<Bf16, float>(x, std::span(matrices).first(launch.rows.size()),
                                                 std::span<const View<float, 2>>(outs).first(launch.rows.size()),
                                                 device_, stream_);
    }
  }

  /// Largest error of the pool's rows, in units of the bound of 8-bit activations; above 1 is wrong.
  [[nodiscard]] double error_of_bound(TensorType type, std::int64_t cols, std::int64_t n_token) {
    const Pool& pool = pool_of(type, cols);
    const cuda::PackedMatrix matrix{type, kPoolRows, cols, pool.packed.data()};
    cuda::quantized_linear_decode<Bf16, float>(make_view(static_cast<const Bf16*>(x_.data()), n_token, cols), matrix,
                                               make_view(out_.data(), n_token, kPoolRows), device_, stream_);
    const std::vector<float> out = out_.to_host(stream_);
    std::vector<float> weight(static_cast<std::size_t>(kPoolRows * cols));
    decode_row(type, pool.file, weight);
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

  [[nodiscard]] Timing time_launch(const Launch& launch, std::int64_t n_token) {
    constexpr std::int64_t kBeyondL2 = 256 << 20;
    const std::int64_t n_copy = std::max<std::int64_t>(2, (kBeyondL2 + launch.bytes() - 1) / launch.bytes());
    const Weights weights = make_weights(std::vector<Launch>(static_cast<std::size_t>(n_copy), launch));
    const int n_launch = static_cast<int>(n_copy * ((15 + n_copy) / n_copy));
    return time_calls(stream_, {.n_launch = n_launch, .n_warmup = 4, .n_repeat = 30}, [&](int i) {
      enqueue(launch, weights.bytes.data() + weights.begin[static_cast<std::size_t>(i % n_copy)], n_token);
    });
  }

  /// All matrices of one token, each its own memory, one launch after another.
  [[nodiscard]] Timing time_token(const std::vector<Launch>& launches, std::int64_t n_token) {
    const Weights weights = make_weights(launches);
    return time_calls(stream_, {.n_launch = 1, .n_warmup = 3, .n_repeat = 20}, [&](int) {
      for (std::size_t i = 0; i < launches.size(); ++i) {
        enqueue(launches[i], weights.bytes.data() + weights.begin[i], n_token);
      }
    });
  }

 private:
  static constexpr std::int64_t kMaxCols = 21504, kMaxRows = 262144;

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
  cuda::Stream stream_;
  std::map<std::pair<TensorType, std::int64_t>, Pool> pools_;
  cuda::DeviceBuffer<Bf16> x_;
  std::vector<Bf16> host_x_;
  cuda::DeviceBuffer<float> out_;
  double copy_gb_per_s_ = 0;
};

struct Mix {
  std::string name;
  std::optional<TensorType> only;
};

/// Writes one row: `count` launches of a token take `timing` each.
void write_row(ResultTable& table, const Bench& bench, const std::string& mix, const Launch& launch,
               std::int64_t n_token, std::int64_t count, const Timing& timing, std::optional<double> error) {
  const double gb_per_s = 1e-3 * static_cast<double>(launch.bytes()) / timing.median_us;
  auto row = table.row();
  row.set("mix", mix).set("matrix", launch.name).set("types", launch.type_text()).set("n_out", launch.total_rows());
  row.set("n_in", launch.cols).set("n_token", n_token).set("n_per_step", count);
  row.set("median_us", timing.median_us).set("p10_us", timing.p10_us).set("p90_us", timing.p90_us);
  row.set("n_repeat", timing.n_repeat).set("bytes", launch.bytes()).set("gb_per_s", gb_per_s);
  row.set("copy_gb_per_s", bench.copy_rate()).set("of_copy", gb_per_s / bench.copy_rate());
  row.set("step_us", static_cast<double>(count) * timing.median_us).set("error_of_bound", error);
  if (!error || *error <= 1.0) {
    row.commit();
  } else {
    row.fail("wrong: the error is beyond the bound");
  }
}

/// A step as one row: the sum of its launches, or the chain of them.
void write_step(ResultTable& table, const Bench& bench, const std::string& mix, const std::string& name,
                std::int64_t bytes, std::int64_t n_token, const Timing& timing) {
  const double gb_per_s = 1e-3 * static_cast<double>(bytes) / timing.median_us;
  auto row = table.row();
  row.set("mix", mix).set("matrix", name).set("n_token", n_token).set("n_per_step", 1);
  row.set("median_us", timing.median_us).set("p10_us", timing.p10_us).set("p90_us", timing.p90_us);
  row.set("n_repeat", timing.n_repeat).set("bytes", bytes).set("gb_per_s", gb_per_s);
  row.set("copy_gb_per_s", bench.copy_rate()).set("of_copy", gb_per_s / bench.copy_rate());
  row.set("step_us", timing.median_us);
  row.commit();
}

void measure_mix(ResultTable& table, Bench& bench, const Mix& mix, const std::vector<std::int64_t>& tokens) {
  const ModelConfig config = gemma4_31b();
  const std::vector<Launch> launches = launches_of(config, model_tensors(config, mix.only));
  std::vector<std::pair<Launch, std::int64_t>> distinct;
  for (const Launch& launch : launches) {
    const auto same = [&](const auto& entry) { return entry.first == launch; };
    const auto found = std::ranges::find_if(distinct, same);
    found == distinct.end() ? (void)distinct.emplace_back(launch, 1) : (void)++found->second;
  }
  for (const std::int64_t n_token : tokens) {
    Timing sum;
    std::int64_t bytes = 0;
    for (const auto& [launch, count] : distinct) {
      double error = 0;
      for (const TensorType type : launch.types) {
        error = std::max(error, bench.error_of_bound(type, launch.cols, n_token));
      }
      const Timing timing = bench.time_launch(launch, n_token);
      write_row(table, bench, mix.name, launch, n_token, count, timing, error);
      const auto n = static_cast<double>(count);
      sum.median_us += n * timing.median_us, sum.p10_us += n * timing.p10_us, sum.p90_us += n * timing.p90_us;
      sum.n_repeat = timing.n_repeat;
      bytes += count * launch.bytes();
    }
    write_step(table, bench, mix.name, "step_sum", bytes, n_token, sum);
    write_step(table, bench, mix.name, "step_chained", bytes, n_token, bench.time_token(launches, n_token));
  }
}

void run(int argc, char** argv) {
  CLI::App app("How fast the matrices of a decode step of the 31B are read, one by one and as a whole step.");
  DriverOptions driver;
  std::vector<std::int64_t> tokens = {1, 2, 4, 8};
  std::vector<std::string> mixes = {"q4_k_m", "q4_k"};
  add_seed(app, driver);
  add_out(app, driver);
  app.add_option("--tokens", tokens, "Tokens of a step, comma-separated")
      ->delimiter(',')
      ->check(CLI::Range(1, 8))
      ->capture_default_str();
  app.add_option("--mix", mixes, "Types of the weights: q4_k_m (the usual mix), q4_k, q6_k or q8_0 (all alike)")
      ->delimiter(',')
      ->check(CLI::IsMember({"q4_k_m", "q4_k", "q6_k", "q8_0"}))
      ->capture_default_str();
  parse(app, argc, argv);

  const RunInfo info = gpu_run_info("linear", argc, argv, driver.seed);
  Bench bench(driver.seed);
  ResultTable table(result_path(driver, info), info,
                    {"mix", "matrix", "types", "n_out", "n_in", "n_token", "n_per_step"},
                    {"median_us", "p10_us", "p90_us", "n_repeat", "bytes", "gb_per_s", "copy_gb_per_s", "of_copy",
                     "step_us", "error_of_bound"});
  const std::map<std::string, std::optional<TensorType>> types = {
      {"q4_k_m", std::nullopt}, {"q4_k", TensorType::kQ4K}, {"q6_k", TensorType::kQ6K}, {"q8_0", TensorType::kQ8_0}};
  for (const std::string& mix : mixes) measure_mix(table, bench, {mix, types.at(mix)}, tokens);
  table.print(std::cout, {"mix", "matrix", "types", "n_out", "n_in", "n_token", "n_per_step", "median_us", "gb_per_s",
                          "of_copy", "step_us", "error_of_bound", "status"});
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
