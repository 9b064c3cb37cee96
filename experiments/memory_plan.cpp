// SPDX-License-Identifier: Apache-2.0
#include "gemma4/plan/memory_plan.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/checkpoint_option.hpp"
#include "experiments/support/notes.hpp"
#include "experiments/support/weight_mix.hpp"
#include "gemma4/assistant_config.hpp"
#include "gemma4/config_json.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/gguf/assistant_tensors.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/drafter_plan.hpp"

namespace gemma4::experiment {
namespace {

struct Model {
  ModelConfig config;
  std::vector<ModelTensor> tensors;
};

/// Whether a file begins as a GGUF file does; its name says nothing.
bool is_gguf(const std::string& name) {
  std::ifstream stream(name, std::ios::binary);
  char magic[4] = {};
  stream.read(magic, sizeof(magic));
  return stream.gcount() == sizeof(magic) && std::string_view(magic, sizeof(magic)) == kGgufMagic;
}

/// A GGUF file; or a shape by name or a .json file of dimensions, whose matrices are of the types of `mix`.
Model load_model(const std::string& name, const std::optional<std::string>& mix) {
  if (is_gguf(name) || name.ends_with(".gguf")) {
    require(!mix, "--mix ", mix.value_or(""), ": a file says itself of what types its matrices are");
    const GgufFile file = GgufFile::open(name);
    const ModelConfig config = weights_from_gguf(file).config;  // a part of a model has no plan
    show_notes(model_notes(file));
    return {config, model_tensors(file)};
  }
  const ModelConfig config = config_from_name(name);
  return {config, model_tensors(config, std::nullopt, parse_mix(mix.value_or("q4_k_m")))};
}

/// What a drafter takes: that of a GGUF file, or of a shape by name.
/// @throws FormatError where it is not a drafter of this model
std::vector<PlannedBuffer> load_drafter(const std::string& name, const ModelConfig& target, PlanTarget room) {
  if (is_gguf(name) || name.ends_with(".gguf")) {
    const GgufFile file = GgufFile::open(name);
    const AssistantConfig config = assistant_weights_from_gguf(file, target).config;
    return drafter_buffers(config, model_tensors(file), room);
  }
  const std::optional<AssistantConfig> config = assistant_from_name(name);
  require(config.has_value(), "--drafter '", name, "': expected a GGUF file, 31b-assistant or nano-assistant");
  require_assistant_fits(name, *config, target);
  return drafter_buffers(*config, assistant_tensors(*config), room);
}

/// Bytes from a number with an optional unit: 24GB, 23GiB, 512MiB, 1000000.
std::int64_t parse_bytes(const std::string& text) {
  constexpr std::pair<const char*, double> kUnits[] = {{"", 1.0},   {"B", 1.0},      {"MB", 1e6},
                                                       {"GB", 1e9}, {"MiB", 0x1p20}, {"GiB", 0x1p30}};
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string unit(end, text.data() + text.size());
  for (const auto& [name, factor] : kUnits) {
    if (error == std::errc() && number >= 0 && number <= 1e6 * 0x1p30 && unit == name) {
      return static_cast<std::int64_t>(number * factor);
    }
  }
  require(false, "--limit '", text, "': expected a number of B, MB, GB, MiB or GiB, as in 23GiB");
  return 0;
}

std::string gib(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f GiB", static_cast<double>(bytes) / 0x1p30);
  return text;
}

/// The copies of the rings beside the memory of a device; of the reference they are a buffer of the plan.
void print_host_checkpoints(const ModelConfig& config, const MemoryPlanOptions& options) {
  if (options.target == PlanTarget::kReference || !options.checkpoints.is_on()) return;
  std::cout << "in the host's memory, beside it: ring_checkpoints "
            << gib(ring_checkpoint_bytes(config, options.cache, options.context, options.checkpoints)) << ", "
            << ring_checkpoint_formula(config, options.cache, options.context, options.checkpoints) << '\n';
}

void explain_limit(const Model& model, const MemoryPlanOptions& options, const MemoryPlan& plan, std::int64_t limit) {
  if (plan.fits(limit)) {
    std::cout << "fits in " << gib(limit) << ", " << gib(limit - plan.total_bytes()) << " to spare\n";
    return;
  }
  std::cout << "does not fit in " << gib(limit) << ": " << gib(plan.total_bytes() - limit) << " too much\n";
  const auto context = largest_context(model.config, model.tensors, options, limit);
  const auto chunk = largest_chunk(model.config, model.tensors, options, limit);
  if (context) std::cout << "would fit: --context " << *context << " with --chunk " << options.chunk << "\n";
  if (chunk) std::cout << "would fit: --chunk " << *chunk << " with --context " << options.context << "\n";
  if (!context && !chunk) std::cout << "no context and no chunk fits; a smaller model or cache format is needed\n";
}

void write_rows(ResultTable& table, const DriverOptions& driver, const std::string& model,
                const MemoryPlanOptions& options, const MemoryPlan& plan, std::optional<std::int64_t> limit) {
  const auto row = [&](const std::string& buffer, std::int64_t bytes, const std::string& formula) {
    auto cells = table.row();
    cells.set("model", model).set("backend", driver.backend).set("context", options.context);
    cells.set("chunk", options.chunk).set("cache", to_string(options.cache)).set("buffer", buffer);
    cells.set("bytes", bytes).set("formula", formula).set("limit_bytes", limit);
    if (limit) cells.set("is_within_limit", bytes <= *limit);
    cells.commit();
  };
  for (const PlannedBuffer& buffer : plan.buffers) row(buffer.name, buffer.bytes, buffer.formula);
  row("total", plan.total_bytes(), "");
}

const TableShape kShape = {{"model", "backend", "context", "chunk", "cache", "buffer"},
                           {"bytes", "formula", "limit_bytes", "is_within_limit"},
                           {}};  // the plan is printed in words

int run(int argc, char** argv) {
  CLI::App app("The bytes of every buffer of a run, before it runs and without a GPU.");
  DriverOptions driver;
  driver.backend = "cuda";
  driver.caches = {"tq4"};
  driver.out = "-";
  std::string model_name, drafter_name, limit_text;
  MemoryPlanOptions options;
  app.add_option("--model", model_name, "GGUF file; or 31b, 12b, nano, tiny or a .json file of dimensions")->required();
  app.add_option("--drafter", drafter_name,
                 "A drafter beside it: GGUF file; or 31b-assistant or nano-assistant, in Q8_0");
  add_backend(app, driver);
  CLI::Option* const context = add_tokens(app, "--context", options.context,
                                          "Positions that the caches hold; the model's own where it has fewer");
  add_whole(app, "--chunk", options.chunk, "Tokens of the longest prefill chunk", {1, std::int64_t{1} << 20});
  std::string mix = "q4_k_m";
  CLI::Option* const of_mix = app.add_option("--mix", mix, "Types of the matrices of a model that is no file")
                                  ->check(CLI::IsMember(mix_names()))
                                  ->capture_default_str();
  add_cache(app, driver);
  add_checkpoints(
      app, options.checkpoints,
      "Tokens between copies of the sliding layers' caches in the host's memory, as generate keeps them with "
      "--session; 0: none");
  app.add_option("--limit", limit_text,
                 "Memory that there is, as in 23GiB or 24GB; exit code 1 when the plan exceeds it");
  app.add_option("--out", driver.out, "CSV file to append to; '-' for none")->capture_default_str();
  parse(app, argc, argv);

  options.target = driver.backend == "cuda" ? PlanTarget::kCuda : PlanTarget::kReference;
  options.cache = parse_cache_spec(driver.caches.front());
  const std::optional<std::int64_t> limit = limit_text.empty() ? std::nullopt : std::optional(parse_bytes(limit_text));
  const Model model = load_model(model_name, of_mix->count() > 0 ? std::optional(mix) : std::nullopt);
  if (context->count() == 0) options.context = std::min(options.context, model.config.context);
  require(options.context <= model.config.context, "--context ", options.context, ": the model was trained for ",
          model.config.context, " positions");
  if (!drafter_name.empty()) {
    options.drafter = load_drafter(drafter_name, model.config, options.target);
    options.n_logit_row = draft::kMaxDrafts + 1;  // all that a step verifies
  }
  const MemoryPlan plan = plan_memory(model.config, model.tensors, options);
  run_table(driver, run_info("memory_plan", argc, argv, 0, build_info()), kShape, [&](ResultTable& table) {
    print_memory_plan(std::cout, plan);
    print_host_checkpoints(model.config, options);
    if (limit) explain_limit(model, options, plan, *limit);
    write_rows(table, driver, model_name, options, plan, limit);
  });
  return limit && !plan.fits(*limit) ? 1 : 0;
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
