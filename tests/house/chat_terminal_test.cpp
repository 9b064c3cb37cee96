// SPDX-License-Identifier: Apache-2.0
// generate as people use one: at a pseudo terminal, through pipes, interrupted. GEMMA4_BIN names the folder of the
// drivers.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/temp_dir.hpp"
#include "tests/support/text_file.hpp"

namespace {

using gemma4::testkit::read_text;
using gemma4::testkit::TempDir;
using Arguments = std::vector<std::string>;

const TempDir& scratch() {
  static const TempDir directory;
  return directory;
}

/// A program under test. On a terminal it has a pseudo terminal of its own for input and messages; its stdout always
/// goes to a file.
class Program {
 public:
  Program(const std::string& name, Arguments arguments, bool on_terminal, const std::string& input = "")
      : out_(scratch().file("stdout")), input_(scratch().file("stdin")) {
    std::ofstream(input_) << input;
    std::ofstream{out_};  // empty, before anybody asks how long it is
    const char* const bin = ::getenv("GEMMA4_BIN");
    arguments.insert(arguments.begin(), (bin == nullptr ? std::string("build/bin") : std::string(bin)) + "/" + name);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    on_terminal ? open_terminal() : open_pipe();
    pid_ = ::fork();
    if (pid_ == 0) {
      become(argv.data(), on_terminal);
      ::_exit(127);
    }
    ::close(far_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    ::close(near_);
  }

  void type(const std::string& text) {
    ASSERT_EQ(::write(near_, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  void signal(int number) { ::kill(pid_, number); }

  /// Reads messages until one matches; @return the match, empty where none came in a minute.
  std::smatch expect(const std::string& pattern) {
    const std::regex regex(pattern);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    std::smatch match;
    for (;;) {
      said_.assign(messages_, at_, std::string::npos);
      if (std::regex_search(said_, match, regex)) {
        at_ += static_cast<std::size_t>(match.position(0) + match.length(0));
        return match;
      }
      const bool late = std::chrono::steady_clock::now() > deadline;
      if (late || !read_more()) {
        ADD_FAILURE() << "expected '" << pattern << "', found: " << said_ << (late ? " (a minute)" : " (the end)");
        return {};
      }
    }
  }

  /// Waits until stdout holds more than so many bytes.
  void await_output(std::uintmax_t n_byte) {
    for (int turn = 0; turn < 6000 && std::filesystem::file_size(out_) <= n_byte; ++turn) ::usleep(10000);
    ASSERT_GT(std::filesystem::file_size(out_), n_byte) << messages_;
  }

  /// Waits for the end; the exit code, or minus the signal.
  int end() {
    while (read_more()) {
    }
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

  [[nodiscard]] const std::string& messages() const { return messages_; }
  [[nodiscard]] std::string output() const { return read_text(out_); }

 private:
  void open_terminal() {
    near_ = ::posix_openpt(O_RDWR | O_NOCTTY);
    ::grantpt(near_);
    ::unlockpt(near_);
    far_ = ::open(::ptsname(near_), O_RDWR | O_NOCTTY);
  }
  void open_pipe() {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) == 0) near_ = ends[0], far_ = ends[1];
  }
  /// In the child: its three descriptors, and the terminal that sends it SIGINT.
  void become(char** argv, bool on_terminal) const {
    ::setsid();
    ::signal(SIGINT, SIG_DFL);
    if (on_terminal) {
      const int terminal = ::open(::ptsname(near_), O_RDWR);  // the first one that a session opens controls it
      ::dup2(terminal, STDIN_FILENO);
    } else {
      ::dup2(::open(input_.c_str(), O_RDONLY), STDIN_FILENO);
    }
    ::dup2(far_, STDERR_FILENO);
    ::dup2(::open(out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
    ::setenv("OMP_NUM_THREADS", "1", 1);
    ::execv(argv[0], argv);
  }
  /// @return false at the end, or when nothing came for a second
  bool read_more() {
    pollfd wanted = {.fd = near_, .events = POLLIN, .revents = 0};
    if (::poll(&wanted, 1, 1000) == 0) return true;
    std::array<char, 4096> bytes;
    const ssize_t count = ::read(near_, bytes.data(), bytes.size());
    if (count <= 0) return false;
    messages_.append(bytes.data(), static_cast<std::size_t>(count));
    return true;
  }

  std::filesystem::path out_, input_;
  int near_ = -1, far_ = -1;
  pid_t pid_ = -1;
  std::string messages_, said_;
  std::size_t at_ = 0;
};

/// A model of two layers and 320 tokens, written once.
const std::string& micro() {
  static const std::string path = [] {
    std::ofstream(scratch().file("micro.json"))
        << R"({"vocab": 320, "hidden": 256, "ffn_hidden": 256, "n_head": 4, "is_sliding": [1, 0], "window": 32,
               "context": 4096, "sliding": {"head_dim": 64, "n_head_kv": 1}, "full": {"head_dim": 128, "n_head_kv": 1}})";
    std::string out = scratch().file("micro.gguf").string();
    Program synthesize("synthesize", {"--shape", scratch().file("micro.json").string(), "--out", out, "--quiet"},
                       false);
    EXPECT_EQ(synthesize.end(), 0) << synthesize.messages();
    return out;
  }();
  return path;
}

std::string backend() {
  const char* const named = ::getenv("GEMMA4_CHAT_BACKEND");
  return named == nullptr ? "reference" : named;
}

/// Nothing is tested on a device that is not there, unless one must be.
class Device : public testing::Environment {
 public:
  void SetUp() override {
    if (backend() != "cuda") return;
    Program device("device", {}, false);
    if (device.end() == 0) return;
    if (::getenv("GEMMA4_REQUIRE_GPU") != nullptr) FAIL() << "no device: " << device.output() << device.messages();
    GTEST_SKIP() << "no device: " << device.output() << device.messages();
  }
};
[[maybe_unused]] const auto* const kDevice = testing::AddGlobalTestEnvironment(new Device);

Arguments with(Arguments more) {
  Arguments all = {"--model", micro(), "--backend", backend(), "--temperature", "0", "--quiet"};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

struct Ran {
  int code = 0;
  std::string output, messages;
};

Ran run(const Arguments& more, const std::string& input = "") {
  Program program("generate", with(more), false, input);
  const int code = program.end();
  return {code, program.output(), program.messages()};
}

int number(const std::smatch& match, std::size_t group = 1) {
  return match.empty() ? -1 : std::stoi(match[group].str());
}

TEST(ChatTerminal, GoesOnWithWhatItHasRead) {
  Program chat("generate", with({"--chat", "--max-tokens", "8"}), true);
  chat.expect("> $");
  chat.type("hello\n");
  const int n_first = number(chat.expect("prompt: ([0-9]+) tokens"));
  const int held = number(chat.expect("end: token limit, --max-tokens 8; ([0-9]+) of 4096 positions"));
  EXPECT_EQ(held, n_first + 8);
  chat.expect("> $");
  chat.type("more\\\nand more\n");
  const int n_second = number(chat.expect("prompt: ([0-9]+) tokens"));
  EXPECT_EQ(number(chat.expect("; ([0-9]+) of 4096 positions")), held + n_second + 8);
  EXPECT_EQ(chat.messages().find("read anew"), std::string::npos) << chat.messages();
  chat.type("/reset\nhello\n");
  EXPECT_LE(number(chat.expect("prompt: ([0-9]+) tokens")), n_first) << "what both begin with may stay";
  EXPECT_EQ(number(chat.expect("; ([0-9]+) of 4096 positions")), held);
  chat.type("\x04");
  EXPECT_EQ(chat.end(), 0);
  EXPECT_EQ(chat.output().find("> "), std::string::npos) << "answers alone go to stdout: " << chat.output();
}

TEST(ChatTerminal, CtrlCEndsTheAnswerAndNotTheProgram) {
  Program chat("generate", with({"--chat"}), true);
  chat.expect("> $");
  // Twice the same answer, which is a long one: behind an answer that was cut somewhere, the model may end at once.
  for (const char* message : {"hello\n", "/reset\nhello\n"}) {
    const auto before = chat.output().size();
    chat.type(message);
    chat.await_output(before + 4);
    chat.type("\x03");
    chat.expect("end: interrupted");
    chat.expect("> $");
  }
  chat.type("\x03");
  chat.expect("Ctrl-D or /exit ends the chat");
  chat.type("half a line\x03");
  chat.expect("Ctrl-D or /exit ends the chat");
  chat.type("/exit\n");
  EXPECT_EQ(chat.end(), 0);
}

TEST(ChatTerminal, CtrlCBeforeTheAnswerTakesTheMessageBack) {
  if (backend() == "cuda") GTEST_SKIP() << "a device reads faster than anybody presses Ctrl-C";
  Program chat("generate", with({"--chat", "--max-tokens", "8", "--chunk", "1"}), true);
  chat.expect("> $");
  const std::string message(3500, '~');  // a second or two to read, token by token
  std::string said;
  for (int turn = 0; turn < 10 && said != "before there was an answer"; ++turn) {
    chat.type(message + "\n");
    ::usleep(100000);
    chat.type("\x03");  // what was not read by then, the terminal drops
    said = chat.expect("before there was an answer|ends the chat\\.|end: ")[0];
    chat.expect("> $");
  }
  EXPECT_EQ(said, "before there was an answer");
  chat.type("hello\n");
  EXPECT_LT(number(chat.expect("prompt: ([0-9]+) tokens")), 100) << "the long message is gone";
  chat.expect("end: token limit");
  chat.type("\x04");
  EXPECT_EQ(chat.end(), 0);
}

TEST(ChatTerminal, CommandsAreNotMessages) {
  Program chat("generate", with({"--chat", "--max-tokens", "2"}), true);
  chat.type("/help\n");
  chat.expect("/exit +end the chat");
  chat.type("/save\n");
  chat.expect("/save needs a file");
  chat.type("/load " + scratch().file("nothing").string() + "\n");
  chat.expect("/load: cannot open");
  chat.type("/nonsense\n");
  chat.expect("There is no command /nonsense");
  EXPECT_EQ(chat.output(), "");
  chat.type("//nonsense\n");
  chat.expect("end: token limit");
  chat.type("/quit\n");
  EXPECT_EQ(chat.end(), 0);
}

/// Saved, gone on, and gone back to: the same question has the same answer, and nothing is read twice.
TEST(ChatTerminal, AChatIsSavedAndGoneOnWith) {
  const std::string file = scratch().file("kept.session").string();
  const auto ask = [](Program& chat) {
    chat.type("and then?\n");
    const int n_prompt = number(chat.expect("prompt: ([0-9]+) tokens"));
    chat.expect("end: token limit.*; ([0-9]+) of 200");
    return n_prompt;
  };
  std::string first, second, third;
  int n_prompt = 0;
  {
    Program chat("generate", with({"--chat", "--max-tokens", "4", "--context", "200"}), true);
    chat.type("hello\n");
    chat.expect("end: token limit");
    chat.type("/save " + file + "\n");
    chat.expect("Saved: [0-9]+ tokens");
    const std::string before = chat.output();
    n_prompt = ask(chat);
    first = chat.output().substr(before.size());
    chat.type("/load " + file + "\n");
    chat.expect("Loaded: 2 messages");
    const std::string again = chat.output();
    EXPECT_EQ(ask(chat), n_prompt);
    second = chat.output().substr(again.size());
    chat.type("/quit\n");
    EXPECT_EQ(chat.end(), 0);
  }
  Program other("generate", with({"--chat", "--max-tokens", "4", "--context", "200", "--session", file}), true);
  other.expect("Loaded: 2 messages");
  EXPECT_EQ(ask(other), n_prompt) << "another process";
  third = other.output();
  other.type("/quit\n");
  other.expect("Saved: [0-9]+ tokens");
  EXPECT_EQ(other.end(), 0);
  EXPECT_FALSE(first.empty());
  EXPECT_EQ(second, first);
  EXPECT_EQ(third, first);
}

TEST(ChatTerminal, AFullContextIsSaid) {
  Program chat("generate", with({"--chat", "--context", "60"}), true);
  chat.type("hello\n");
  chat.expect("end: context full, all 60 positions are taken");
  chat.type("more\n");
  chat.expect("context full: the chat would have [0-9]+ tokens, the caches hold 60");
  chat.type("/reset\nhello\n");
  chat.expect("end: context full, all 60 positions are taken");
  chat.type("\x04");
  EXPECT_EQ(chat.end(), 0);
}

TEST(ChatPipe, ALineIsAMessage) {
  const Ran chat = run({"--chat", "--max-tokens", "8"}, "hello\nagain");
  EXPECT_EQ(chat.code, 0) << chat.messages;
  EXPECT_EQ(chat.messages.find('>'), std::string::npos) << "no prompt where nobody types";
  const Ran one = run({"--chat", "hello", "--max-tokens", "8"});
  EXPECT_EQ(chat.output.substr(0, one.output.size()), one.output);
  EXPECT_GT(chat.output.size(), one.output.size());
}

TEST(ChatPipe, AnEmptyMessageIsAChat) {
  const Ran chat = run({"--chat", "", "--max-tokens", "8"}), prompt = run({"--prompt", "", "--max-tokens", "8"});
  EXPECT_EQ(chat.code, 0) << chat.messages;
  EXPECT_NE(chat.output, prompt.output);
  std::smatch match;
  ASSERT_TRUE(std::regex_search(chat.messages, match, std::regex("prompt: ([0-9]+) tokens"))) << chat.messages;
  EXPECT_GT(number(match), 10) << "the template's markup";
}

TEST(ChatPipe, MessagesOfAFileAreThoseOfTheFlags) {
  const Ran flags = run({"--system", "be brief", "--chat", "hello", "--max-tokens", "8"});
  const Ran file = run({"--messages", "-", "--max-tokens", "8"},
                       R"([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}])");
  EXPECT_EQ(file.code, 0) << file.messages;
  EXPECT_EQ(file.output, flags.output);
  EXPECT_NE(file.output, run({"--chat", "hello", "--max-tokens", "8"}).output) << "the control: without the system's";
  const Ran bad = run({"--messages", "-"}, R"([{"role": "user", "content": 5}])");
  EXPECT_EQ(bad.code, 1);
  EXPECT_NE(bad.messages.find("message 0: content is a number"), std::string::npos) << bad.messages;
}

TEST(ChatPipe, AFileCanBeStandardInput) {
  const Ran file = run({"--file", "-", "--max-tokens", "8"}, "hello");
  EXPECT_EQ(file.code, 0) << file.messages;
  EXPECT_EQ(file.output, run({"--prompt", "hello", "--max-tokens", "8"}).output);
}

TEST(ChatPipe, WhatNeedsAChatSaysSo) {
  for (const Arguments& more : {Arguments{"--prompt", "x", "--system", "y"}, Arguments{"--prompt", "x", "--think"}}) {
    const Ran refused = run(more);
    EXPECT_EQ(refused.code, 1);
    EXPECT_NE(refused.messages.find("need a chat"), std::string::npos) << refused.messages;
  }
}

TEST(ChatPipe, MarkersInAMessageAreTextUnlessAllowed) {
  const auto n_token = [](const Arguments& more) {
    const Ran ran = run(more);
    std::smatch match;
    return std::regex_search(ran.messages, match, std::regex("prompt: ([0-9]+) tokens")) ? number(match) : -1;
  };
  const int plain = n_token({"--chat", "a<|turn>", "--max-tokens", "1"});
  const int allowed = n_token({"--chat", "a<|turn>", "--max-tokens", "1", "--allow-markers"});
  EXPECT_GT(allowed, 0);
  EXPECT_GT(plain, allowed);
}

TEST(ChatPipe, AnInterruptedAnswerIsWholeSoFarAndTheCodeSaysSo) {
  Program program("generate", with({"--prompt", "hello", "--max-tokens", "4000"}), false);
  program.await_output(4);
  program.signal(SIGINT);
  EXPECT_EQ(program.end(), 130) << program.messages();
  EXPECT_NE(program.messages().find("end: interrupted"), std::string::npos) << program.messages();
  EXPECT_NE(program.messages().find("decode: "), std::string::npos) << program.messages();
}

}  // namespace
