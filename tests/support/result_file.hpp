// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "gemma4/report/result_table.hpp"
#include "gemma4/report/run_info.hpp"

/// What the tests of result tables share: a table's text read back, a run, and what a call throws.
namespace gemma4::testkit {

/// RFC 4180, written independently of the writer: one record a line.
[[nodiscard]] inline std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> row(1);
  bool is_quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (is_quoted) {
      if (c == '"' && i + 1 < text.size() && text[i + 1] == '"') {
        row.back() += text[++i];
      } else if (c == '"') {
        is_quoted = false;
      } else {
        row.back() += c;
      }
    } else if (c == '"') {
      is_quoted = true;
    } else if (c == ',') {
      row.emplace_back();
    } else if (c == '\n') {
      rows.push_back(row);
      row.assign(1, "");
    } else {
      row.back() += c;
    }
  }
  return rows;
}

[[nodiscard]] inline RunInfo example_run() {
  const char* const argv[] = {"/somewhere/bin/accuracy", "--cache", "bf16,tq4", "--prompt", "it's, \"so\""};
  return run_info("accuracy", 5, argv, 7, {"0123456789abcdef", "0", "Release", "-O3 -march=native"});
}

[[nodiscard]] inline std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace gemma4::testkit
