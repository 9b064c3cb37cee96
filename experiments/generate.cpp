// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/notes.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/text/chat_template.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "reference/backend.hpp"
#include "reference/sampler.hpp"

/// What does the model say?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;
using Clock = std::chrono::steady_clock;

struct Options : DriverOptions {
  std::string prompt;
  std::filesystem::path file;
  std::string chat;
  std::int64_t max_tokens = 128;
  std::int64_t context = 0;
  std::int64_t chunk = 512;
  SamplerSettings sampler;
  bool echo = false;
  bool profile = false;
};

[[nodiscard]] std::string read_text(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  require(stream.good(), "cannot read ", path.string());
  return {std::istreambuf_iterator<char>(stream), {}};
}

[[nodiscard]] std::vector<std::int32_t> prompt_ids(const Options& options, const Tokenizer& tokenizer) {
  if (options.chat.empty()) {
    return tokenizer.encode(options.file.empty() ? options.prompt : read_text(options.file));
  }
  const std::vector<ChatMessage> messages = {{"user", options.chat}};
  return encode_chat(tokenizer, messages);
}

[[nodiscard]] double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void print_rate(const char* what, std::int64_t count, double seconds) {
  std::cerr << what << ": " << count << " tokens in " << seconds << " s, " << static_cast<double>(count) / seconds
            << " tokens/s\n";
}

/// Tokens until an end token, the limit or a full context, each written to stdout as it comes; returns how many forward
/// passes there were.
template <class TBackend>
[[nodiscard]] std::int64_t decode_loop(Model<TBackend>& model, TBackend& backend, const Tokenizer& tokenizer,
                                       const Options& options) {
  std::vector<float> logits(static_cast<std::size_t>(backend.config().vocab));
  std::int64_t n_forward = 0;
  for (std::int64_t n = 0; n < options.max_tokens; ++n) {
    backend.copy_logits(0, logits);
    const std::int32_t token = reference::sample(logits, options.sampler, model.position() - 1);
    if (tokenizer.is_end(token)) break;
    std::cout << tokenizer.decode_piece(token, {.skip_control = true}) << std::flush;
    if (n + 1 == options.max_tokens || model.position() == backend.context()) break;
    model.decode(token);
    ++n_forward;
  }
  std::cout << "\n";
  return n_forward;
}

/// Where the time went, to stderr: the longest first.
void print_profile(const char* what, std::vector<ComponentTime> times) {
  double total = 0;
  for (const ComponentTime& time : times) total += time.us;
  std::ranges::sort(times, std::greater<>{}, &ComponentTime::us);
  std::cerr << what << ": " << total << " us in components, launched one by one\n";
  for (const ComponentTime& time : times) {
    std::cerr << "  " << std::setw(18) << std::left << time.name << std::right << std::setw(12) << time.us << " us"
              << std::setw(8) << std::setprecision(3) << 100 * time.us / total << " %" << std::setprecision(6)
              << std::setw(8) << time.n_call << " calls\n";
  }
}

/// The same text from the device, where the chosen token stays: the host sees it some steps later, and prints.
void run_cuda(const Options& options, const Tokenizer& tokenizer, std::span<const std::int32_t> ids,
              const CudaSettings& settings) {
  const auto model = load_cuda_model(options.model, {.progress = progress_options(options, "B")}, settings);
  const auto session = model->make_session(settings);
  show_plans(options, to_string(settings.cache), session->step_plans());
  const auto profiled = [&](const char* what, const std::function<void()>& work) {
    options.profile ? print_profile(what, session->profile(work)) : work();
  };
  Stretch prompt, decoded;
  {
    Progress progress("prompt", static_cast<std::int64_t>(ids.size()), progress_options(options, "tokens"));
    profiled("prompt",
             [&] { prompt = session->prefill(ids, options.chunk, [&](std::int64_t done) { progress.update(done); }); });
  }
  if (options.echo) std::cout << tokenizer.decode(ids, {.skip_control = true}) << std::flush;
  const std::int64_t n_token = std::min(options.max_tokens, settings.context - session->position());
  if (n_token > 0) {
    profiled("decode", [&] {
      decoded = session->decode(n_token, options.sampler, [&](std::int32_t token) {
        if (tokenizer.is_end(token)) return false;
        std::cout << tokenizer.decode_piece(token, {.skip_control = true}) << std::flush;
        return true;
      });
    });
  }
  std::cout << "\n";
  print_rate("prompt", prompt.n_token, 1e-6 * prompt.us);
  if (decoded.n_token > 0) print_rate("decode", decoded.n_token, 1e-6 * decoded.us);
}

void run_reference(const Options& options, const GgufFile& gguf, const Tokenizer& tokenizer,
                   std::span<const std::int32_t> ids, const CudaSettings& settings) {
  const ModelWeights weights = weights_from_gguf(gguf);
  show_notes(model_notes(gguf));
  reference::Backend<float> backend(
      weights, {.cache = settings.cache, .context = settings.context, .max_chunk = settings.max_chunk});
  Model<reference::Backend<float>> model(backend);
  show_plans(options, to_string(settings.cache), backend.step_plans());
  const auto prefill_start = Clock::now();
  {
    Progress progress("prompt", static_cast<std::int64_t>(ids.size()), progress_options(options, "tokens"));
    model.prefill(ids, options.chunk, [&](std::int64_t done) { progress.update(done); });
  }
  const double prefill_seconds = seconds_since(prefill_start);
  if (options.echo) std::cout << tokenizer.decode(ids, {.skip_control = true}) << std::flush;
  const auto decode_start = Clock::now();
  const std::int64_t n_forward = decode_loop(model, backend, tokenizer, options);
  const double decode_seconds = seconds_since(decode_start);
  print_rate("prompt", static_cast<std::int64_t>(ids.size()), prefill_seconds);
  if (n_forward > 0) print_rate("decode", n_forward, decode_seconds);
}

int run(int argc, char** argv) {
  CLI::App app("Continues a prompt, a file or a chat message. The text goes to stdout, progress and rates to stderr.");
  Options options;
  options.caches = {"tq4"};
  add_model(app, options);
  CLI::Option* prompt = app.add_option("--prompt", options.prompt, "Text to continue");
  CLI::Option* file =
      app.add_option("--file", options.file, "File with the text to continue")->check(CLI::ExistingFile);
  app.add_option("--chat", options.chat, "A user's message, put into the chat template")
      ->excludes(prompt)
      ->excludes(file);
  file->excludes(prompt);
  add_real(app, "--temperature", options.sampler.temperature, "0: always the most likely token", {});
  add_whole(app, "--top-k", options.sampler.top_k, "Only the k most likely tokens; 0: all", {0, INT32_MAX});
  add_real(app, "--top-p", options.sampler.top_p, "Only the most likely tokens that reach p together; 1: all", {0, 1});
  add_tokens(app, "--max-tokens", options.max_tokens, "Tokens to generate at most", 0);
  add_tokens(app, "--context", options.context, "Positions that the caches hold; 0: prompt and generated tokens", 0);
  add_tokens(app, "--chunk", options.chunk, "Prompt tokens that go through the model at a time");
  app.add_flag("--echo", options.echo, "Write the prompt before its continuation");
  app.add_flag("--profile", options.profile,
               "With --backend cuda: launch every step anew, without a graph, and say what each component took");
  add_policy(app, options);
  add_cache(app, options);
  add_backend(app, options);
  add_seed(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);
  require(!options.profile || options.backend == "cuda",
          "--profile: needs --backend cuda; the reference has no events");
  options.sampler.seed = options.seed;
  validate(options.sampler);

  const GgufFile gguf = GgufFile::open(options.model);
  const Tokenizer tokenizer(gguf);
  show_notes(tokenizer.vocabulary().notes());
  const std::vector<std::int32_t> ids = prompt_ids(options, tokenizer);
  require(!ids.empty(), "the prompt has no tokens: give --prompt, --file or --chat");
  CudaSettings settings{.cache = with_seed(parse_cache_spec(options.caches.front()), options.seed),
                        .max_chunk = options.chunk};
  settings.policy = options.policy();
  settings.policy.graph = settings.policy.graph && !options.profile;
  settings.context = options.context > 0 ? options.context
                                         : std::min(static_cast<std::int64_t>(ids.size()) + options.max_tokens,
                                                    config_from_gguf(gguf).context);
  if (options.backend == "cuda") {
    run_cuda(options, tokenizer, ids, settings);
  } else {
    run_reference(options, gguf, tokenizer, ids, settings);
  }
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
