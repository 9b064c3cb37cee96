// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <thread>

#include "gemma4/error.hpp"
#include "gemma4/fnv1a.hpp"
#include "gemma4/platform.hpp"

/// What produced a row of results: the first columns of every result table (see result_table.hpp).
namespace gemma4 {

/// What only the build system knows. The drivers get theirs from a generated source file; "unknown" elsewhere.
struct BuildInfo {
  std::string git_sha = "unknown";    ///< of the checkout that was built
  std::string git_dirty = "unknown";  ///< 1 when tracked files outside results/ differed from it, else 0
  std::string build = "unknown";      ///< build type
  std::string flags = "unknown";      ///< compiler flags
};

/// One run of one driver. Text, ready for a cell.
struct RunInfo {
  std::string schema = "1";  ///< raised by a driver when its columns change their meaning but not their names
  std::string experiment;
  std::string git_sha;
  std::string git_dirty;
  std::string utc;             ///< start of the run, ISO 8601
  std::string gpu;             ///< device name; a run without a GPU says "cpu: <model>"
  std::string card;            ///< which of the cards of that name: card_name() of its UUID; empty without a GPU
  std::string sm_count;        ///< multiprocessors of the GPU; hardware threads for a CPU
  std::string sm_mhz;          ///< clock of the multiprocessors, measured at the start of the run; empty without a GPU
  std::string memory_mhz;      ///< clock of the GPU's memory as the driver names it; empty without a GPU
  std::string power_limit_w;   ///< that the GPU is held to; empty without a GPU, or where the driver does not say
  std::string driver;          ///< newest CUDA that the driver runs; empty without a GPU
  std::string driver_release;  ///< of the driver, as 580.95.05; empty without a GPU, or where nothing says
  std::string cuda;            ///< empty without a GPU
  std::string compiler;
  std::string build;
  std::string flags;
  std::string seed;
  std::string argv;  ///< the command that repeats the run
};

/// `time` as 2026-01-31T23:59:59Z.
[[nodiscard]] inline std::string utc_text(std::chrono::system_clock::time_point time) {
  const std::time_t seconds = std::chrono::system_clock::to_time_t(time);
  std::tm fields{};
  gmtime_r(&seconds, &fields);
  char text[32];
  const std::size_t n_char = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &fields);
  return {text, n_char};
}

/// The compiler of this translation unit with its version.
[[nodiscard]] inline std::string compiler_name() {
#if defined(__clang__)
  return concat("clang ", __clang_major__, ".", __clang_minor__, ".", __clang_patchlevel__);
#elif defined(__GNUC__)
  return concat("gcc ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

/// The processor's model name as the kernel gives it, or "unknown".
[[nodiscard]] inline std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != line.npos) return line.substr(colon + 2);
  }
  return "unknown";
}

/// Names a card without giving its UUID away: the upper 32 bits of the FNV-1a hash of its bytes, as 8 hex digits.
[[nodiscard]] inline std::string card_name(std::string_view uuid) {
  const std::uint64_t hash = fnv1a(uuid);
  std::string name;
  for (int shift = 60; shift >= 32; shift -= 4) name += "0123456789abcdef"[(hash >> shift) & 0xfu];
  return name;
}

/// The driver's release in what /proc/driver/nvidia/version says: the first word of numbers with dots between. "" when
/// there is none.
[[nodiscard]] inline std::string driver_release_in(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find_first_of(" \t\n", at), text.size());
    const std::string_view word = text.substr(at, end - at);
    const bool is_release = word.find('.') != word.npos && word.find_first_not_of("0123456789.") == word.npos &&
                            word.front() != '.' && word.back() != '.';
    if (is_release) return std::string(word);
    at = end + 1;
  }
  return {};
}

/// The arguments as a shell takes them: quoted where they hold anything but plain characters.
[[nodiscard]] inline std::string command_text(int argc, const char* const* argv) {
  const auto plain = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 ||
           std::string_view("-_./=,:+@%").find(c) != std::string_view::npos;
  };
  std::string text;
  for (int i = 0; i < argc; ++i) {
    const std::string_view argument = argv[i];
    bool quote = argument.empty();
    for (const char c : argument) quote = quote || !plain(c);
    if (i > 0) text += ' ';
    if (!quote) {
      text += argument;
      continue;
    }
    text += '\'';
    for (const char c : argument) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
    text += '\'';
  }
  return text;
}

/// Describes a run on this processor. A driver that uses a GPU overwrites what describes the device.
/// argv[0] is shortened to the program's name, so that a row does not depend on where it was built.
[[nodiscard]] inline RunInfo run_info(std::string experiment, int argc, const char* const* argv, std::uint64_t seed,
                                      const BuildInfo& build = {}) {
  RunInfo info;
  info.experiment = std::move(experiment);
  info.git_sha = build.git_sha;
  info.git_dirty = build.git_dirty;
  info.utc = utc_text(std::chrono::system_clock::now());
  info.gpu = "cpu: " + cpu_name();
  info.sm_count = std::to_string(std::thread::hardware_concurrency());
  info.compiler = compiler_name();
  info.build = build.build;
  info.flags = build.flags;
  info.seed = std::to_string(seed);
  if (argc > 0) {
    const std::string program = std::filesystem::path(argv[0]).filename().string();
    const char* const name = program.c_str();
    info.argv = command_text(1, &name);
    if (argc > 1) info.argv += " " + command_text(argc - 1, argv + 1);
  }
  return info;
}

/// results/<experiment>/<device>-<first 8 digits of the commit>.csv, the device in lower-case words joined by '-'.
[[nodiscard]] inline std::filesystem::path default_result_path(const RunInfo& info,
                                                               const std::filesystem::path& root = "results") {
  std::string device;
  for (const char c : info.gpu) {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
      device += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    } else if (!device.empty() && device.back() != '-') {
      device += '-';
    }
  }
  while (device.ends_with('-')) device.pop_back();
  return root / info.experiment / (device + "-" + info.git_sha.substr(0, 8) + ".csv");
}

}  // namespace gemma4
