// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "experiments/support/answer.hpp"
#include "experiments/support/interruptions.hpp"
#include "experiments/support/sequence.hpp"
#include "gemma4/session/session_reader.hpp"
#include "gemma4/text/conversation.hpp"
#include "gemma4/text/dialogue_note.hpp"
#include "gemma4/text/tokenizer.hpp"

/// A dialogue at a terminal, or line by line from a pipe.
namespace gemma4::experiment {

struct ChatSettings {
  std::int64_t max_tokens = std::numeric_limits<std::int64_t>::max();  ///< of an answer
  std::int64_t chunk = 512;
  SamplerSettings sampler;
  std::ostream* thoughts = &std::cerr;  ///< nullptr: not shown
  std::uint64_t model_hash = 0;         ///< of what is saved
};

class ChatConsole {
 public:
  ChatConsole(Sequence& sequence, Conversation& conversation, const Tokenizer& tokenizer, const ChatSettings& settings)
      : sequence_(sequence),
        conversation_(conversation),
        tokenizer_(tokenizer),
        settings_(settings),
        printer_(tokenizer, true, settings.thoughts),
        is_terminal_(::isatty(STDIN_FILENO) != 0),
        lines_(STDIN_FILENO) {}

  /// Until /exit or the end of the input. @return whether it was an interruption that ended it
  bool run() {
    const Interruptions interruptions;
    if (is_terminal_) std::cerr << "Ctrl-C ends an answer, Ctrl-D or /exit the chat; /help says what else there is.\n";
    if (ends_with_user()) answer();
    for (;;) {
      const LineReader::Line message = read_message();
      if (message.kind == LineReader::Kind::kEnd) break;
      if (message.kind == LineReader::Kind::kInterrupted) {
        if (!is_terminal_) return true;
        std::cerr << "\nCtrl-D or /exit ends the chat.\n";
      } else if (message.text.starts_with('/') && !message.text.starts_with("//")) {
        if (!obey(message.text)) return false;
      } else if (!message.text.empty()) {
        conversation_.say(message.text.substr(message.text.starts_with("//") ? 1 : 0));
        answer();
      }
    }
    if (is_terminal_) std::cerr << '\n';
    return false;
  }

  /// The chat to a file, with the caches: nothing of it is read again when it goes on.
  void save(const std::filesystem::path& path) {
    sequence_.save(path, {.model_hash = settings_.model_hash,
                          .sampler = settings_.sampler,
                          .note = dialogue_note(conversation_.state(sequence_.held()))});
    std::cerr << "Saved: " << sequence_.held().size() << " tokens in " << path.string() << ", "
              << 1e-6 * static_cast<double>(std::filesystem::file_size(path)) << " MB\n";
  }

  /// Goes on with a chat from a file.
  /// @throws what the file is refused with; where its caches were damaged the chat begins anew
  void load(const std::filesystem::path& path) {
    const SessionFile file = SessionFile::open(path);
    const auto n_token = static_cast<std::int64_t>(file.info().tokens.size());
    Conversation::State state = parse_dialogue_note(file.info().note, path.string(), n_token);
    try {
      sequence_.restore(file, settings_.model_hash);
    } catch (...) {
      if (sequence_.held().empty()) conversation_.reset();
      throw;
    }
    conversation_.resume(std::move(state), sequence_.held());
    std::cerr << "Loaded: " << conversation_.messages().size() << " messages, " << n_token << " tokens of "
              << sequence_.context() << '\n';
  }

 private:
  [[nodiscard]] bool ends_with_user() const {
    return !conversation_.messages().empty() && conversation_.messages().back().role == "user";
  }

  /// A line, and those after it as long as one ends with a backslash.
  [[nodiscard]] LineReader::Line read_message() {
    std::string text;
    for (const char* prompt = "> ";; prompt = "  ") {
      if (is_terminal_) std::cerr << prompt << std::flush;
      LineReader::Line line = lines_.next();
      if (line.kind == LineReader::Kind::kEnd && !text.empty()) return {LineReader::Kind::kLine, std::move(text)};
      if (line.kind != LineReader::Kind::kLine) return line;
      if (!line.text.ends_with('\\')) return {LineReader::Kind::kLine, text + line.text};
      line.text.back() = '\n';
      text += line.text;
    }
  }

  /// A command. @return false when it ends the chat
  bool obey(std::string_view line) {
    const std::string_view name = line.substr(0, line.find(' '));
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/help") {
      std::cerr << "/save FILE   keep this chat, and what was read of it\n/load FILE   go on with one that was kept\n"
                   "/reset       forget what was said\n/help        this\n/exit        end the chat, as Ctrl-D does\n"
                   "A line that ends with \\ goes on in the next; //... says /...\n";
    } else if (name == "/reset") {
      conversation_.reset();
      std::cerr << "Nothing was said.\n";
      if (ends_with_user()) answer();
    } else if (name == "/save" || name == "/load") {
      const std::size_t blank = line.find(' ');
      const std::string path(blank == line.npos ? "" : line.substr(blank + 1));
      try {
        require(!path.empty(), name, " needs a file, as in ", name, " chat.session");
        name == "/save" ? save(path) : load(path);
      } catch (const std::exception& error) {
        std::cerr << name << ": " << error.what() << '\n';
      }
    } else {
      std::cerr << "There is no command " << gemma4::detail::printable(name)
                << "; /help lists them, and //... says /...\n";
    }
    return true;
  }

  void answer() {
    const std::vector<std::int32_t> wanted = conversation_.prompt();
    Answer answer;
    if (static_cast<std::int64_t>(wanted.size()) >= sequence_.context()) {
      std::cerr << "context full: the chat would have " << wanted.size() << " tokens, the caches hold "
                << sequence_.context() << "; /reset begins anew, --context N makes more\n";
      return take_back();
    }
    try {
      answer.prompt = read(wanted);
    } catch (const Interrupted&) {
      (void)Interruptions::take();
      std::cerr << "\ninterrupted before there was an answer; what you said is taken back\n";
      return take_back();
    }
    printer_.begin(wanted);
    write_answer(sequence_, tokenizer_, settings_.max_tokens, settings_.sampler, printer_, answer);
    conversation_.answer(answer.tokens);
    print_rate("prompt", answer.prompt);
    print_rate("decode", answer.decode);
    std::cerr << "end: " << end_text(answer, tokenizer_, settings_.max_tokens, sequence_.context()) << "; "
              << sequence_.held().size() << " of " << sequence_.context() << " positions\n";
  }

  /// What the cache does not hold yet; all of it where the cache cannot go back to where the two part.
  Stretch read(std::span<const std::int32_t> wanted) {
    const bool is_anew = cache_steps(sequence_.held(), wanted, sequence_.max_back()).reset;
    if (is_anew && conversation_.messages().size() > 2)
      std::cerr << "The chat is read anew: thoughts or messages are gone.\n";
    return read_rest(sequence_, wanted, settings_.chunk, [](std::int64_t) {
      if (Interruptions::pending()) throw Interrupted();
    });
  }

  /// A message from the user; one that the chat began with stays, and has no answer.
  void take_back() {
    if (conversation_.can_take_back()) {
      conversation_.take_back();
    } else {
      conversation_.answer({});
    }
  }

  Sequence& sequence_;
  Conversation& conversation_;
  const Tokenizer& tokenizer_;
  ChatSettings settings_;
  AnswerPrinter printer_;
  bool is_terminal_;
  LineReader lines_;
};

}  // namespace gemma4::experiment
