// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/weight_mix.hpp"
#include "gemma4/assistant_config.hpp"
#include "gemma4/config_json.hpp"
#include "gemma4/gguf/assistant_tensors.hpp"
#include "gemma4/report/progress.hpp"
#include "gemma4/synthetic/synthetic_assistant.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"

namespace gemma4::experiment {
namespace {

/// nullopt is a mix.
std::optional<TensorType> parse_weight_type(const std::string& name) {
  for (const TensorType type : kWeightTypes) {
    if (name == type_name(type)) return type;
  }
  return std::nullopt;
}

/// Bytes from a number with a unit of gguf-split's kind: 5G, 500M, 1000000; 0 for anything else.
std::int64_t parse_split_size(const std::string& text) {
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string unit(end, text.data() + text.size());
  std::int64_t factor = 0;
  for (const auto& [name, bytes] : {std::pair("", 1), {"K", 1000}, {"M", 1'000'000}, {"G", 1'000'000'000}}) {
    if (unit == name) factor = bytes;
  }
  if (error != std::errc() || number < 1 || __builtin_mul_overflow(number, factor, &number)) return 0;
  return number;
}

std::string check_split_size(const std::string& text) {
  return parse_split_size(text) > 0 ? ""
                                    : "'" + text + "': expected a number of bytes, K, M or G, at least 1, as in 5G";
}

/// Files that `write(on_progress)` makes, with the bytes so far of `n_byte` shown meanwhile.
template <class TWrite>
std::vector<std::filesystem::path> with_progress(const DriverOptions& driver, std::int64_t n_byte, TWrite&& write) {
  Progress progress("synthesize", n_byte, progress_options(driver, "B"));
  const auto files = write([&](std::int64_t done) { progress.update(done); });
  progress.finish();
  return files;
}

/// @param type of all matrices
std::vector<std::filesystem::path> write_drafter(const DriverOptions& driver, const AssistantConfig& drafter,
                                                 SyntheticOptions options, const std::string& type) {
  options.only = parse_weight_type(type);
  require(options.only.has_value(), "--type ", type, ": a mix of text models; a drafter has one type");
  return with_progress(driver, total_bytes(assistant_tensors(drafter, synthetic_assistant_type(options))),
                       [&](const auto& done) { return write_synthetic_assistant(driver.out, drafter, options, done); });
}

/// @param n_layer of the shape; 0: all, and their number is then in it
std::vector<std::filesystem::path> write_model(const DriverOptions& driver, const std::string& shape,
                                               const SyntheticOptions& options, std::int64_t& n_layer) {
  ModelConfig config = config_from_name(shape);
  require(n_layer <= config.n_layer(), "--layers ", n_layer, ": the shape ", shape, " has ", config.n_layer());
  if (n_layer > 0) config.is_sliding.resize(static_cast<std::size_t>(n_layer));
  n_layer = config.n_layer();
  return with_progress(driver, total_bytes(model_tensors(config, options.only, options.mix)),
                       [&](const auto& done) { return write_synthetic_model(driver.out, config, options, done); });
}

void run(int argc, char** argv) {
  CLI::App app("Writes a GGUF model of any shape with random weights, for measuring speed and memory.");
  DriverOptions driver;
  SyntheticOptions options;
  std::string shape, type = "Q4_K_M", mix = "q4_k_m", split;
  std::int64_t n_layer = 0;
  app.add_option(
         "--shape", shape,
         "31b, 12b, nano, tiny or a .json file of dimensions; or a drafter, 31b-assistant or nano-assistant, in Q8_0")
      ->required();
  app.add_option("--out", driver.out, "GGUF file to write")->required();
  CLI::Option* const of_mix =
      app.add_option("--mix", mix,
                     "Types of the matrices, as published files mix them. q4_k_m: Q4_K and some Q6_K, 17.4 GiB for the "
                     "31b. qat-q4_0: Q4_0, as weights trained for it are published, 16.4 GiB. The embedding is Q6_K in "
                     "both, norms are F32")
          ->check(CLI::IsMember(mix_names()))
          ->capture_default_str();
  CLI::Option* const of_type =
      app.add_option("--type", type, "One type for all matrices, the embedding too, instead of a mix; Q4_K_M: q4_k_m")
          ->check(CLI::IsMember({"Q4_K_M", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "BF16", "F16", "F32"}))
          ->excludes(of_mix)
          ->capture_default_str();
  add_whole(app, "--layers", n_layer, "Only so many layers of the shape, for a smaller file; 0: all", {0, 4096});
  app.add_option("--split-max-size", split,
                 "Bytes of tensors in a part, as in 5G or 500M, for a model of several files")
      ->check(CLI::Validator(check_split_size, "SIZE"));
  const auto add_number = [&](const char* name, double& value, double high, const char* text) {
    add_real(app, name, value, text, {0.0, high});
  };
  add_number("--score-deviation", options.score_deviation, 100,
             "|q| |k| / sqrt(head_dim): deviation of the scores of unrelated queries and keys");
  add_number("--attention-share", options.attention_share, 100,
             "Squared RMS of the attention branches over that of the stream, summed over the layers");
  add_number("--mlp-share", options.mlp_share, 100, "The same of the feed-forward branches");
  add_number("--common-share", options.common_share, 0.9, "Share of a vector that all embeddings have in common");
  add_number("--logit-deviation", options.logit_deviation, 100, "Deviation of the logits before the cap");
  add_seed(app, driver);
  add_quiet(app, driver);
  parse(app, argc, argv);
  options.seed = driver.seed;
  if (!split.empty()) options.split_max_bytes = parse_split_size(split);
  const std::optional<AssistantConfig> drafter = assistant_from_name(shape);
  std::vector<std::filesystem::path> files;
  if (drafter) {
    require(n_layer == 0 && of_mix->empty(), "--shape ", shape,
            ": a drafter has all its layers and one type; leave out ", n_layer == 0 ? "--mix" : "--layers");
    n_layer = drafter->own.n_layer();
    files = write_drafter(driver, *drafter, options, of_type->empty() ? "Q8_0" : type);
  } else {
    options.mix = parse_mix(mix);
    options.only = parse_weight_type(type);
    files = write_model(driver, shape, options, n_layer);
  }
  double size = 0;
  for (const std::filesystem::path& file : files) size += static_cast<double>(std::filesystem::file_size(file));
  std::cout << files.front().string() << ": " << n_layer << " layers, " << size / 1e9 << " GB, seed " << options.seed;
  if (files.size() > 1) std::cout << ", " << files.size() << " parts";
  std::cout << "\n";
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
