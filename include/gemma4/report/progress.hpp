// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <string>
#include <utility>

#include "gemma4/platform.hpp"

/// How far a long loop is, on stderr; results go elsewhere.
///   terminal:  prefill [############------------] 50 %, 1.23k tokens/s, ETA 0:12   redrawn ten times a second at most
///   otherwise: prefill 50 % (4096 of 8192 tokens, 1.23k tokens/s, ETA 0:12)      a line for every ten percent
namespace gemma4 {

enum class ProgressMode { kAuto, kBar, kLines, kSilent };

struct ProgressOptions {
  ProgressMode mode = ProgressMode::kAuto;  ///< auto: a bar when stderr is a terminal, else lines
  std::string unit = "steps";
  std::ostream* stream = &std::cerr;
  /// Seconds since any fixed moment; tests give their own.
  std::function<double()> clock = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
};

/// `count` with three digits and a suffix: 999, 1.23k, 45.6M.
[[nodiscard]] inline std::string short_count(double count) {
  constexpr const char* kSuffixes[] = {"", "k", "M", "G", "T"};
  int suffix = 0;
  while (std::isfinite(count) && std::abs(count) >= 999.5 && suffix < 4) count /= 1000, ++suffix;
  char text[48];
  std::snprintf(text, sizeof(text), "%.3g%s", count, kSuffixes[suffix]);
  return text;
}

/// 0:07, 12:34 or 1:02:03.
[[nodiscard]] inline std::string duration_text(double seconds) {
  if (!std::isfinite(seconds) || seconds >= 1e9) return "?";
  const auto total = static_cast<long long>(std::llround(std::max(seconds, 0.0)));
  char text[48];
  if (total >= 3600) {
    std::snprintf(text, sizeof(text), "%lld:%02lld:%02lld", total / 3600, total / 60 % 60, total % 60);
  } else {
    std::snprintf(text, sizeof(text), "%lld:%02lld", total / 60, total % 60);
  }
  return text;
}

/// Reports `done` of `total`; a total of 0 is an unknown one. For one thread. The line is closed by finish(), or by the
/// destructor when the loop was left early.
class Progress {
 public:
  Progress(std::string label, std::int64_t total, ProgressOptions options = {})
      : label_(std::move(label)), total_(std::max<std::int64_t>(total, 0)), options_(std::move(options)) {
    if (options_.mode == ProgressMode::kAuto) {
      options_.mode = isatty(STDERR_FILENO) != 0 ? ProgressMode::kBar : ProgressMode::kLines;
    }
    start_ = last_draw_ = options_.clock();
    if (options_.mode == ProgressMode::kBar) draw(start_);
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress() {
    try {
      close();
    } catch (...) {  // a stream set to throw: a destructor may not, and there is nobody left to tell
    }
  }

  /// Sets how much is done; may be called as often as the loop likes.
  void update(std::int64_t done) {
    done_ = done;
    if (finished_ || options_.mode == ProgressMode::kSilent) return;
    const double now = options_.clock();
    if (options_.mode == ProgressMode::kBar) {
      if (now - last_draw_ >= kRedrawSeconds) draw(now);
    } else {
      const bool is_due = total_ > 0 ? tenth() > last_tenth_ : now - last_draw_ >= kUnknownTotalSeconds;
      if (is_due) write_line(now);
    }
  }

  void advance(std::int64_t count = 1) { update(done_ + count); }

  /// Shows the final state with the time taken, and ends the line.
  void finish() {
    if (finished_) return;
    finished_ = true;
    if (options_.mode == ProgressMode::kSilent) return;
    const double now = options_.clock();
    *options_.stream << (is_bar() ? "\r\x1b[K" : "") << label_ << ": " << done_ << " " << options_.unit << " in "
                     << duration_text(now - start_) << rate_text(now) << "\n"
                     << std::flush;
  }

  [[nodiscard]] std::int64_t done() const { return done_; }

 private:
  static constexpr double kRedrawSeconds = 0.1;
  static constexpr double kUnknownTotalSeconds = 10;
  static constexpr int kBarWidth = 24;  // the whole line stays below 80 columns for labels of up to 20

  [[nodiscard]] bool is_bar() const { return options_.mode == ProgressMode::kBar; }

  [[nodiscard]] double fraction() const {
    return total_ == 0 ? 0.0 : std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0.0, 1.0);
  }
  [[nodiscard]] int tenth() const { return static_cast<int>(fraction() * 10); }

  /// Leading comma and space; nothing while no time has passed.
  [[nodiscard]] std::string rate_text(double now) const {
    const double elapsed = now - start_;
    if (!(elapsed > 0) || done_ <= 0) return "";
    return ", " + short_count(static_cast<double>(done_) / elapsed) + " " + options_.unit + "/s";
  }
  [[nodiscard]] std::string eta_text(double now) const {
    const double elapsed = now - start_;
    if (total_ == 0 || done_ <= 0 || !(elapsed > 0)) return "";
    return ", ETA " + duration_text(elapsed / static_cast<double>(done_) * static_cast<double>(total_ - done_));
  }

  void draw(double now) {
    last_draw_ = now;
    std::string line = "\r" + label_ + " ";
    if (total_ > 0) {
      const int filled = static_cast<int>(fraction() * kBarWidth);
      line += "[" + std::string(static_cast<std::size_t>(filled), '#') +
              std::string(static_cast<std::size_t>(kBarWidth - filled), '-') + "] " +
              std::to_string(static_cast<int>(fraction() * 100)) + " %";
    } else {
      line += std::to_string(done_) + " " + options_.unit;
    }
    *options_.stream << line << rate_text(now) << eta_text(now) << "\x1b[K" << std::flush;
    is_open_ = true;
  }

  void write_line(double now) {
    last_draw_ = now;
    last_tenth_ = tenth();
    *options_.stream << label_ << " ";
    if (total_ > 0) {
      *options_.stream << static_cast<int>(fraction() * 100) << " % (" << done_ << " of " << total_;
    } else {
      *options_.stream << "(" << done_;
    }
    *options_.stream << " " << options_.unit << rate_text(now) << eta_text(now) << ")\n" << std::flush;
  }

  /// Leaves an abandoned bar on its own line, so that an error message starts on a fresh one.
  void close() {
    if (!finished_ && is_open_) *options_.stream << "\n" << std::flush;
    finished_ = true;
  }

  std::string label_;
  std::int64_t total_;
  ProgressOptions options_;
  std::int64_t done_ = 0;
  double start_ = 0;
  double last_draw_ = 0;
  int last_tenth_ = 0;
  bool is_open_ = false;
  bool finished_ = false;
};

}  // namespace gemma4
