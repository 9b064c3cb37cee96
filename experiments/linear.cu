// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/lm_head.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/residual_norm.cuh"
#include "cuda/weights/repack.cuh"
#include "experiments/benchmark.cuh"
#include "experiments/bf16_product.cuh"
#include "experiments/block_formats.hpp"
#include "experiments/driver.hpp"
#include "experiments/gpu_run_info.cuh"
#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"

namespace gemma4::experiment {
namespace {

constexpr std::int64_t kPoolRows = 64;    ///< rows that are drawn; matrices repeat them
constexpr std::size_t kRowsPerStep = 12;  ///< of the table, at most: nine matrices, their sum, and two chains of them

enum class End { kPlain, kGeluUp, kSoftcap };

/// Where a launch has its input from.
enum class Start {
  kPlain,       ///< rows of bf16
  kNormLaunch,  ///< where the model normalises the residual stream first, a launch in front does it
};

[[nodiscard]] const char* input_name(Start start) {
  return start == Start::kPlain ? "bf16" : "norm_launch";
}

/// What multiplies, and for how many tokens.
struct Width {
  std::int64_t n_token = 0;
  cuda::LinearPath path = cuda::LinearPath::kDot;

  [[nodiscard]] const char* path_name() const { return path == cuda::LinearPath::kDot ? "dot" : "int8"; }
  [[nodiscard]] std::int64_t int8_from() const { return path == cuda::LinearPath::kDot ? n_token + 1 : n_token; }
};

/// Every number of tokens with every path that takes as many, few tokens first.
std::vector<Width> widths_of(std::vector<std::int64_t> tokens, const std::vector<std::string>& paths) {
  std::ranges::sort(tokens);
  std::vector<Width> widths;
  for (const std::int64_t n_token : tokens) {
    for (const cuda::LinearPath path : {cuda::LinearPath::kDot, cuda::LinearPath::kInt8}) {
      const Width width{n_token, path};
      const bool is_asked = std::ranges::find(paths, width.path_name()) != paths.end();
      if (is_asked && (path == cuda::LinearPath::kInt8 || n_token <= cuda::kMaxDecodeTokens)) widths.push_back(width);
    }
  }
  return widths;
}

/// One launch of a decode step: matrices that share their input.
struct Launch {
  std::string name;
  std::vector<TensorType> types;
  std::vector<std::int64_t> rows;
  std::int64_t cols = 0;
  End end = End::kPlain;
  bool begins_with_norm = false;  ///< in the model
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
  const auto add = [&](std::string name, const std::vector<std::string>& members, End end, bool begins_with_norm) {
    Launch launch{.name = std::move(name), .types = {}, .rows = {}, .end = end, .begins_with_norm = begins_with_norm};
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
    add("qkv_" + kind, {prefix + "attn_q.weight", prefix + "attn_k.weight", prefix + "attn_v.weight"}, End::kPlain,
        true);
    add("attn_output_" + kind, {prefix + "attn_output.weight"}, End::kPlain, false);
    add("gate_up", {prefix + "ffn_gate.weight", prefix + "ffn_up.weight"}, End::kGeluUp, true);
    add("down", {prefix + "ffn_down.weight"}, End::kPlain, false);
  }
  add("lm_head", {"token_embd.weight"}, End::kSoftcap, true);
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
               const cuda::LinearOptions& options) {
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
    cuda::residual_norm<float, Bf16>(
        make_view(residual_.data(), n_token, launch.cols),
        make_view(static_cast<const float*>(pending_.data()), n_token, launch.cols), norms_.data(), 1.0f, norms_.data(),
        1e-6f, make_view(normed_.data(), n_token, launch.cols), stream_, device_.compute_capability >= 90, true);
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
              Start::kPlain, {.tickets = tickets_.data(), .int8_from = width.int8_from()});
    });
  }

  /// All matrices of one token, each its own memory, one launch after another.
  [[nodiscard]] Timing time_token(const std::vector<Launch>& launches, const Weights& weights, const Width& width,
                                  Start start) {
    return time_calls(stream_, {.n_launch = 1, .n_warmup = 3, .n_repeat = 20}, [&](int) {
      for (std::size_t i = 0; i < launches.size(); ++i) {
        enqueue(launches[i], weights.bytes.data() + weights.begin[i], width.n_token, start,
                {.tickets = tickets_.data(), .int8_from = width.int8_from()});
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
  cuda::DeviceBuffer<Bf16> x_, normed_;
  std::vector<Bf16> host_x_;
  cuda::DeviceBuffer<float> out_, norms_;
  cuda::DeviceBuffer<float> pending_, residual_;
  cuda::DeviceBuffer<cuda::LinearTickets> tickets_;
  double copy_gb_per_s_ = 0;
};

/// What a row says besides its matrix and its time.
struct RowContext {
  std::string mix;
  Width width;
  Start start = Start::kPlain;
};

class Experiment {
 public:
  Experiment(Bench& bench, ResultTable& table, Progress& progress)
      : bench_(bench), table_(table), progress_(progress) {}

  void measure(const std::string& mix, const std::vector<Width>& widths) {
    const std::vector<Launch> launches = launches_of(gemma4_31b(), tensors_of_31b(mix));
    const Bench::Weights weights = bench_.make_weights(launches);
    for (const Width& width : widths) {
      measure_launches(launches, {mix, width});
      for (const Start start : {Start::kPlain, Start::kNormLaunch}) {
        write_step("step_chained", launches, {mix, width, start}, bench_.time_token(launches, weights, width, start));
      }
    }
  }

  /// One matrix of a step.
  void measure_matrix(const std::string& mix, const std::string& name, const std::vector<Width>& widths) {
    const std::vector<Launch> launches = launches_of(gemma4_31b(), tensors_of_31b(mix));
    const auto has_name = [&](const Launch& launch) { return launch.name == name; };
    const auto found = std::ranges::find_if(launches, has_name);
    for (const Width& width : widths) {
      write_launch(*found, std::ranges::count_if(launches, has_name), {mix, width}, bench_.time_launch(*found, width));
      progress_.advance();
    }
  }

 private:
  void measure_launches(const std::vector<Launch>& launches, const RowContext& context) {
    std::vector<std::pair<Launch, std::int64_t>> distinct;
    for (const Launch& launch : launches) {
      const auto same = [&](const auto& entry) { return entry.first == launch; };
      const auto found = std::ranges::find_if(distinct, same);
      found == distinct.end() ? (void)distinct.emplace_back(launch, 1) : (void)++found->second;
    }
    Timing sum;
    for (const auto& [launch, count] : distinct) {
      const Timing timing = bench_.time_launch(launch, context.width);
      write_launch(launch, count, context, timing);
      const auto n = static_cast<double>(count);
      sum.median_us += n * timing.median_us, sum.p10_us += n * timing.p10_us, sum.p90_us += n * timing.p90_us;
      sum.n_repeat = timing.n_repeat;
      progress_.advance();
    }
    write_step("step_sum", launches, context, sum);
  }

  [[nodiscard]] ResultTable::Row row_of(const RowContext& context, const std::string& matrix, std::int64_t count,
                                        std::int64_t bytes, const Timing& timing, const std::string& types = {}) {
    const double gb_per_s = 1e-3 * static_cast<double>(bytes) / timing.median_us;
    auto row = table_.row();
    row.set("mix", context.mix).set("matrix", matrix).set("n_token", context.width.n_token);
    row.set("n_per_step", count).set("input", input_name(context.start)).set("path", context.width.path_name());
    row.set("median_us", timing.median_us).set("p10_us", timing.p10_us).set("p90_us", timing.p90_us);
    row.set("n_repeat", timing.n_repeat).set("bytes", bytes).set("gb_per_s", gb_per_s);
    row.set("copy_gb_per_s", bench_.copy_rate()).set("of_copy", gb_per_s / bench_.copy_rate());
    row.set("step_us", static_cast<double>(count) * timing.median_us);
    const std::string what = context.mix + ' ' + matrix + ' ' + types + ' ' + input_name(context.start);
    const bool is_one = context.width.n_token == 1 && context.width.path == cuda::LinearPath::kDot;
    if (is_one) one_token_us_[what] = timing.median_us;
    const auto one = one_token_us_.find(what);
    if (one != one_token_us_.end()) row.set("over_one_token", timing.median_us / one->second);
    return row;
  }

  /// One row: `count` launches of a token take `timing` each.
  void write_launch(const Launch& launch, std::int64_t count, const RowContext& context, const Timing& timing) {
    double error = 0;
    bool has_bits = true;
    for (const TensorType type : launch.types) {
      error = std::max(error, bench_.error_of_bound(type, launch.cols, context.width));
      has_bits = has_bits && bench_.has_bits_of_one(type, launch.cols, context.width);
    }
    auto row = row_of(context, launch.name, count, launch.bytes(), timing, launch.type_text());
    row.set("types", launch.type_text()).set("n_out", launch.total_rows()).set("n_in", launch.cols);
    if (context.width.path == cuda::LinearPath::kDot) {  // once for each number of tokens
      const double blas_us = bench_.time_blas(launch, context.width.n_token).median_us;
      row.set("blas_bf16_us", blas_us).set("over_blas", blas_us / timing.median_us);
    }
    row.set("error_of_bound", error);
    if (error > 1.0) {
      row.fail("wrong: the error is beyond the bound");
    } else if (!has_bits) {
      row.fail("wrong: other bits than each token alone");
    } else {
      row.commit();
    }
  }

  /// A step as one row: the sum of its launches, or the chain of them.
  void write_step(const std::string& name, const std::vector<Launch>& launches, const RowContext& context,
                  const Timing& timing) {
    std::int64_t bytes = 0;
    for (const Launch& launch : launches) bytes += launch.bytes();
    row_of(context, name, 1, bytes, timing).commit();
    progress_.advance();
  }

  Bench& bench_;
  ResultTable& table_;
  Progress& progress_;
  std::map<std::string, double> one_token_us_;  ///< by dot products, by what was measured
};

const TableShape kShape = {
    {"mix", "matrix", "types", "n_out", "n_in", "n_token", "n_per_step", "input", "path"},
    {"median_us", "p10_us", "p90_us", "n_repeat", "bytes", "gb_per_s", "copy_gb_per_s", "of_copy", "step_us",
     "over_one_token", "blas_bf16_us", "over_blas", "error_of_bound"},
    {"mix", "matrix", "types", "n_out", "n_in", "n_token", "n_per_step", "input", "path", "median_us", "gb_per_s",
     "of_copy", "step_us", "over_one_token", "over_blas", "error_of_bound", "status"}};

void run(int argc, char** argv) {
  CLI::App app("How fast the matrices of a decode step of the 31B are read, one by one and as a whole step.");
  DriverOptions driver;
  std::vector<std::int64_t> tokens = {1, 2, 4, 8, 16};
  std::vector<std::string> mixes = {"q4_k_m", "q4_k"}, formats = block_format_names(), paths = {"dot", "int8"};
  add_seed(app, driver);
  add_out(app, driver);
  add_quiet(app, driver);
  add_whole(app, "--tokens", tokens, "Tokens of a step, comma-separated", {1, cuda::kMaxInt8Tokens})->delimiter(',');
  app.add_option("--path", paths,
                 "What multiplies, comma-separated: dot (a dot product a token, up to 8) or int8 (tensor cores)")
      ->delimiter(',')
      ->check(CLI::IsMember({"dot", "int8"}))
      ->capture_default_str();
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
  const std::vector<Width> widths = widths_of(tokens, paths);

  const RunInfo info = gpu_run_info("linear", argc, argv, driver.seed);
  run_table(driver, info, kShape, [&](ResultTable& table) {
    Bench bench(driver.seed);
    Progress progress("linear",
                      static_cast<std::int64_t>((mixes.size() * kRowsPerStep + formats.size()) * widths.size()),
                      progress_options(driver, "row"));
    Experiment experiment(bench, table, progress);
    for (const std::string& mix : mixes) experiment.measure(mix, widths);
    for (const std::string& format : formats) experiment.measure_matrix(format, "gate_up", widths);
    progress.finish();
  });
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
