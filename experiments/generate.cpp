// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iomanip>
#include <iostream>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/answer.hpp"
#include "experiments/support/chat_console.hpp"
#include "experiments/support/checkpoint_option.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/drafting.hpp"
#include "experiments/support/host_sequence.hpp"
#include "experiments/support/input_text.hpp"
#include "experiments/support/interruptions.hpp"
#include "experiments/support/notes.hpp"
#include "experiments/support/sequence.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/json.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/sampler.hpp"
#include "gemma4/session/model_fingerprint.hpp"
#include "gemma4/session/session_reader.hpp"
#include "gemma4/text/chat_message.hpp"
#include "gemma4/text/conversation.hpp"
#include "gemma4/text/sampling_defaults.hpp"
#include "gemma4/text/tokenizer.hpp"

/// What does the model say?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

/// Of an interactive chat, where nobody knows how long it will be.
constexpr std::int64_t kChatContext = 16384;

struct Options : DriverOptions {
  std::string prompt;
  std::filesystem::path file;
  std::string chat;
  std::filesystem::path messages;
  std::string system;
  bool has_chat = false, has_system = false;
  bool is_interactive = false;  ///< --chat without a text
  bool think = false, keep_thoughts = false, allow_markers = false;
  std::int64_t max_tokens = 128;
  bool has_max_tokens = false;
  std::int64_t context = 0;
  std::int64_t chunk = 512;
  std::filesystem::path session;
  CheckpointPolicy checkpoints = kUsualCheckpoints;
  SamplerSettings sampler;
  GivenSampling given;
  bool echo = false;
  bool profile = false;
  DraftSettings drafting;

  [[nodiscard]] bool is_chat() const { return has_chat || !messages.empty(); }
  /// Of the sequence: a run that keeps nothing copies no rings.
  [[nodiscard]] CheckpointPolicy kept() const { return session.empty() ? CheckpointPolicy{} : checkpoints; }
};

// ---- the command line

/// What the options of an App tell only after it has parsed.
struct Seen {
  CLI::Option *chat, *system, *temperature, *top_k, *top_p, *max_tokens, *draft;
};

[[nodiscard]] std::string check_input(const std::string& path) {
  return path == "-" ? std::string() : CLI::ExistingFile(path);
}

void add_text(CLI::App& app, Options& options, Seen& seen) {
  CLI::Option* const prompt = app.add_option("--prompt", options.prompt, "Text to continue");
  CLI::Option* const file =
      app.add_option("--file", options.file, "File with the text to continue; - for standard input")
          ->check(CLI::Validator(check_input, "FILE"));
  seen.chat = app.add_option("--chat", options.chat,
                             "A user's message, put into the chat template; without a text a chat: on a terminal, or a "
                             "message a line from standard input")
                  ->expected(0, 1)
                  ->excludes(prompt)
                  ->excludes(file);
  app.add_option(
         "--messages", options.messages,
         "JSON file of messages, [{\"role\": \"user\", \"content\": ...}, ...], to answer; with --chat to go on "
         "from; - for standard input")
      ->check(CLI::Validator(check_input, "FILE"))
      ->excludes(prompt)
      ->excludes(file);
  file->excludes(prompt);
  seen.system = app.add_option("--system", options.system, "In a chat: what the model is told first");
  app.add_flag("--think", options.think, "In a chat: the model thinks before it answers; its thoughts go to stderr");
  app.add_flag(
      "--keep-thoughts", options.keep_thoughts,
      "In a chat that goes on: thoughts of earlier answers stay in the cache, so that nothing is read twice; the "
      "template drops them");
  app.add_flag("--allow-markers", options.allow_markers,
               "Markers such as <|turn> in what you write are markers; else they are text");
}

void add_sampling(CLI::App& app, Options& options, Seen& seen) {
  seen.temperature = add_real(app, "--temperature", options.sampler.temperature,
                              "0: always the most likely token; where not given, as the file says", {});
  seen.top_k = add_whole(app, "--top-k", options.sampler.top_k,
                         "Only the k most likely tokens; 0: all; where not given, as the file says", {0, INT32_MAX});
  seen.top_p =
      add_real(app, "--top-p", options.sampler.top_p,
               "Only the most likely tokens that reach p together; 1: all; where not given, as the file says", {0, 1});
  seen.max_tokens = add_tokens(app, "--max-tokens", options.max_tokens,
                               "Tokens to generate at most; an interactive chat has no limit but the context's", 0);
  add_tokens(app, "--context", options.context,
             "Positions that the caches hold; 0: prompt and generated tokens, in an interactive chat 16384", 0);
  add_tokens(app, "--chunk", options.chunk, "Prompt tokens that go through the model at a time");
  app.add_option("--session", options.session,
                 "File of a sequence that was read. Where it is there, what it shares with the prompt is not read "
                 "again; else it is made once the prompt is read. An interactive chat goes on from it and is saved to "
                 "it when it ends");
  add_checkpoints(
      app, options.checkpoints,
      "With --session: tokens between copies of the sliding layers' caches, from which a sequence goes back "
      "to where a prompt parts from it; in the host's memory and in the file; 0: none");
}

void add_drafting(CLI::App& app, Options& options, Seen& seen, std::string& n_draft) {
  app.add_option(
         "--drafter", options.drafting.drafter,
         "Who proposes tokens that the model verifies several at a time: lookup (what followed the last tokens "
         "where they stood before), the GGUF file of a drafter, or none. The text is the same; that of a drafter "
         "from a file, at a temperature, of the same distribution with --backend reference")
      ->capture_default_str();
  seen.draft =
      app.add_option("--draft", n_draft, "Tokens to propose for each step, 1 to 7; auto: from what was accepted so far")
          ->capture_default_str();
}

/// Whether a --chat on the command line has no text, not even an empty one.
[[nodiscard]] bool has_bare_chat(int argc, char** argv) {
  const std::span<char*> arguments(argv, static_cast<std::size_t>(argc));
  const auto found =
      std::ranges::find(arguments, std::string_view("--chat"), [](char* text) { return std::string_view(text); });
  return found != arguments.end() && (found + 1 == arguments.end() || (*(found + 1))[0] != '\0');
}

void check_options(const Options& options) {
  require(options.is_chat() || !(options.has_system || options.think || options.keep_thoughts),
          "--system, --think and --keep-thoughts need a chat: --chat or --messages");
  require(!options.profile || options.backend == "cuda",
          "--profile: needs --backend cuda; the reference has no events");
  require(!options.profile || !options.is_interactive, "--profile: needs a --chat with a text");
  require_drafter(options.drafting);
  require(!options.profile || !options.drafting.is_on(), "--profile: cannot be had with --drafter");
  require(!options.echo || !options.is_interactive, "--echo: needs a --chat with a text");
  require(!options.is_interactive || options.messages != "-",
          "--messages -: standard input is what --chat without a text reads; give --chat a text, or a file");
}

[[nodiscard]] Options parse_options(int argc, char** argv) {
  CLI::App app(
      "Continues a prompt or a file, or chats. The text goes to stdout, thoughts, progress, rates and why it ended to "
      "stderr.");
  Options options;
  Seen seen{};
  options.caches = {"tq4"};
  add_model(app, options);
  add_text(app, options, seen);
  add_sampling(app, options, seen);
  std::string n_draft = "auto";
  add_drafting(app, options, seen, n_draft);
  app.add_flag("--echo", options.echo, "Write the prompt before its continuation");
  app.add_flag("--profile", options.profile,
               "With --backend cuda: launch every step anew, without a graph, and say what each component took");
  add_policy(app, options);
  add_cache(app, options);
  add_backend(app, options);
  add_seed(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);
  options.has_chat = seen.chat->count() > 0;
  options.has_system = seen.system->count() > 0;
  options.is_interactive = options.has_chat && options.chat.empty() && has_bare_chat(argc, argv);
  options.has_max_tokens = seen.max_tokens->count() > 0;
  options.given = {
      .temperature = seen.temperature->count() > 0, .top_k = seen.top_k->count() > 0, .top_p = seen.top_p->count() > 0};
  options.sampler.seed = options.seed;
  options.drafting.n_draft = parse_n_draft(n_draft);
  require(seen.draft->count() == 0 || options.drafting.is_on(), "--draft: needs a --drafter");
  check_options(options);
  return options;
}

// ---- what is asked

[[nodiscard]] std::vector<ChatMessage> first_messages(const Options& options) {
  std::vector<ChatMessage> messages;
  if (!options.messages.empty()) {
    const std::string source = options.messages.string();
    messages = chat_messages(parse_json(read_input("--messages", options.messages), source), source);
    require(!messages.empty(), "--messages ", source, ": there is no message in it");
  }
  if (options.has_system) {
    require(messages.empty() || !is_system_role(messages.front().role), "--system: ", options.messages.string(),
            " begins with a system message of its own");
    messages.insert(messages.begin(), {.role = "system", .content = options.system});
  }
  return messages;
}

[[nodiscard]] Conversation conversation(const Options& options, const Tokenizer& tokenizer) {
  const ChatOptions chat{.thinking = options.think ? Thinking::kOn : Thinking::kOff,
                         .allow_markers = options.allow_markers};
  Conversation result(tokenizer, chat, first_messages(options), options.keep_thoughts);
  if (options.has_chat && !options.is_interactive) result.say(options.chat);
  return result;
}

[[nodiscard]] std::vector<std::int32_t> prompt_ids(const Options& options, const Tokenizer& tokenizer) {
  if (options.is_chat()) return conversation(options, tokenizer).prompt();
  const std::string text = options.file.empty() ? options.prompt : read_input("--file", options.file);
  const TextRange all{.begin = 0, .end = text.size()};
  EncodeOptions encode{.add_bos = {}, .parse_special = options.allow_markers};
  if (!options.allow_markers) encode.plain = std::span(&all, 1);
  std::vector<std::int32_t> ids = tokenizer.encode(text, encode);
  require(!ids.empty(), "the prompt has no tokens: give --prompt, --file, --chat or --messages");
  return ids;
}

/// As the command line says, else as the file does, which is said on stderr.
[[nodiscard]] SamplerSettings sampler_settings(const Options& options, const GgufFile& gguf) {
  SamplerSettings settings = options.sampler;
  const SamplingDefaults defaults = sampling_defaults(gguf);
  const std::string taken = apply_sampling_defaults(settings, defaults, options.given);
  show_notes(defaults.notes);
  if (!taken.empty()) std::cerr << taken << '\n';
  validate(settings);
  return settings;
}

// ---- the model

/// A model in memory, and the one sequence that it holds.
struct Loaded {
  std::unique_ptr<CudaModel> device;
  std::optional<ModelWeights> weights;
  std::unique_ptr<Sequence> sequence;
};

[[nodiscard]] Loaded load(const Options& options, const GgufFile& gguf, std::int64_t context) {
  CudaSettings settings{.cache = with_seed(parse_cache_spec(options.caches.front()), options.seed),
                        .context = context,
                        .max_chunk = options.chunk,
                        .policy = options.policy(),
                        .checkpoints = options.kept()};
  settings.policy.graph = settings.policy.graph && !options.profile;
  if (options.drafting.is_on()) {
    settings.max_draft = options.drafting.n_draft.value_or(draft::kMaxDrafts);
    settings.auto_drafts = !options.drafting.n_draft;
    settings.max_chunk = std::max(settings.max_chunk, draft::kMaxDrafts + 1);
  }
  Loaded loaded;
  if (options.backend == "cuda") {
    const CudaLoadSettings load{.progress = progress_options(options, "B"), .drafter = options.drafting.file()};
    loaded.device = load_cuda_model(options.model, load, settings);
    loaded.sequence = std::make_unique<DeviceSequence>(*loaded.device, settings);
  } else {
    loaded.weights.emplace(weights_from_gguf(gguf));
    show_notes(model_notes(gguf));
    loaded.sequence = std::make_unique<ReferenceSequence>(
        *loaded.weights,
        reference::BackendOptions{
            .cache = settings.cache, .context = settings.context, .max_chunk = settings.max_chunk},
        options.drafting, settings.checkpoints);
  }
  show_plans(options, to_string(settings.cache), loaded.sequence->step_plans());
  const ModelConfig config = config_from_gguf(gguf);
  const std::int64_t kept = ring_checkpoint_bytes(config, settings.cache, context, settings.checkpoints);
  if (kept > 0 && !options.is_quiet) {
    std::cerr << "checkpoints: up to " << n_checkpoint(context, settings.checkpoints) << ", "
              << 1e-6 * static_cast<double>(kept) << " MB of the host's memory and of the file\n";
  }
  return loaded;
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

// ---- the session file

/// Of --session, where there is one.
[[nodiscard]] std::optional<SessionFile> find_session(const Options& options) {
  if (options.session.empty() || !std::filesystem::exists(options.session)) return std::nullopt;
  return SessionFile::open(options.session);
}

/// What of the prompt a session file holds, which is then in the caches; where there is no file, one is to be made.
void begin_from(const std::optional<SessionFile>& file, const GgufFile& gguf, std::span<const std::int32_t> ids,
                Sequence& sequence) {
  if (!file) return;
  sequence.restore(*file, model_fingerprint(gguf));
  const std::span<const std::int32_t> held = sequence.held();
  const auto n_same = std::mismatch(held.begin(), held.end(), ids.begin(), ids.end()).first - held.begin();
  std::cerr << file->name() << ": " << n_same << " of " << ids.size() << " prompt tokens are there\n";
}

// ---- the two ways to run

/// One prompt, one text. @return the exit code
int run_once(const Options& options, const GgufFile& gguf, const Tokenizer& tokenizer, const SamplerSettings& sampler) {
  const std::vector<std::int32_t> ids = prompt_ids(options, tokenizer);
  const auto n_prompt = static_cast<std::int64_t>(ids.size());
  const std::optional<SessionFile> session = find_session(options);
  const std::int64_t n_saved = session ? static_cast<std::int64_t>(session->info().tokens.size()) : 0;
  const std::int64_t wanted =
      std::min(std::max(n_prompt + options.max_tokens, n_saved), config_from_gguf(gguf).context);
  const Loaded loaded = load(options, gguf, options.context > 0 ? options.context : wanted);
  Sequence& sequence = *loaded.sequence;
  const auto profiled = [&](const char* what, const std::function<void()>& work) {
    options.profile ? print_profile(what, sequence.profile(work)) : work();
  };
  begin_from(session, gguf, ids, sequence);
  Answer answer;
  {
    Progress progress("prompt", n_prompt, progress_options(options, "tokens"));
    profiled("prompt", [&] {
      answer.prompt = read_rest(sequence, ids, options.chunk, [&](std::int64_t done) { progress.update(done); });
    });
  }
  if (!options.session.empty() && !session) {
    sequence.save(options.session, {.model_hash = model_fingerprint(gguf), .sampler = sampler});
  }
  if (options.echo) std::cout << tokenizer.decode(ids, {.skip_control = true}) << std::flush;
  AnswerPrinter printer(tokenizer, options.is_chat(), options.is_quiet ? nullptr : &std::cerr);
  printer.begin(ids);
  {
    const Interruptions interruptions;
    profiled("decode", [&] { write_answer(sequence, tokenizer, options.max_tokens, sampler, printer, answer); });
  }
  print_rate("prompt", answer.prompt);
  print_rate("decode", answer.decode);
  if (const auto counts = sequence.draft_counts()) print_drafts(std::cerr, *counts);
  std::cerr << "end: " << end_text(answer, tokenizer, options.max_tokens, sequence.context()) << '\n';
  return answer.end == AnswerEnd::kInterrupted ? kInterruptedExit : EXIT_SUCCESS;
}

int run_chat(const Options& options, const GgufFile& gguf, const Tokenizer& tokenizer, const SamplerSettings& sampler) {
  Conversation chat = conversation(options, tokenizer);
  const std::int64_t context =
      options.context > 0 ? options.context : std::min(kChatContext, config_from_gguf(gguf).context);
  const Loaded loaded = load(options, gguf, context);
  ChatSettings settings{.chunk = options.chunk, .sampler = sampler, .model_hash = model_fingerprint(gguf)};
  if (options.has_max_tokens) settings.max_tokens = options.max_tokens;
  if (options.is_quiet) settings.thoughts = nullptr;
  ChatConsole console(*loaded.sequence, chat, tokenizer, settings);
  if (!options.session.empty() && std::filesystem::exists(options.session)) console.load(options.session);
  const bool was_interrupted = console.run();
  if (!options.session.empty()) console.save(options.session);
  if (const auto counts = loaded.sequence->draft_counts()) print_drafts(std::cerr, *counts);
  return was_interrupted ? kInterruptedExit : EXIT_SUCCESS;
}

int run(int argc, char** argv) {
  const Options options = parse_options(argc, argv);
  const GgufFile gguf = GgufFile::open(options.model);
  const Tokenizer tokenizer(gguf);
  show_notes(tokenizer.vocabulary().notes());
  const SamplerSettings sampler = sampler_settings(options, gguf);
  return options.is_interactive ? run_chat(options, gguf, tokenizer, sampler)
                                : run_once(options, gguf, tokenizer, sampler);
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
