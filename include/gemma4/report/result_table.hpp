// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/report/csv_appender.hpp"
#include "gemma4/report/run_info.hpp"

/// The one writer of result files.
///
///   ResultTable table(path, run, {"cache", "context"}, {"nll", "kl_mean"});
///   table.row().set("cache", "tq4").set("context", 8192).set("nll", 1.25).commit();
///   table.print(std::cout, {"cache", "context", "nll", "status"});
///
/// Columns, in order: what produced the row (kRunColumns), the parameters, the measures, `status`. Names are unique,
/// of lower-case letters, digits and '_', with the unit as a suffix. A cell that was not set is empty: not measured.
///
/// The file is append only. A row is one line and one write under a lock, so a killed run leaves whole rows and runs
/// may share a file. The place is opened, locked and looked at before the first row, so that a long run does not find
/// out at its end. A file with another header is refused. A file whose last line is not complete (a full disk, a lost
/// machine) is refused too and never repaired silently: the message says how many bytes to cut.
/// Line breaks inside a cell become spaces; a cell with a comma or a quote is quoted, quotes doubled (RFC 4180).
/// Numbers are written with a dot whatever the locale, in the fewest digits that read back to the same value.
namespace gemma4 {

inline constexpr std::array<std::string_view, 19> kRunColumns = {
    "schema",     "experiment",    "git_sha", "git_dirty",      "utc",  "gpu",      "card",  "sm_count", "sm_mhz",
    "memory_mhz", "power_limit_w", "driver",  "driver_release", "cuda", "compiler", "build", "flags",    "seed",
    "argv"};

inline constexpr std::string_view kStatusColumn = "status";

namespace detail {

/// A cell in full for the file and in brief for the eye.
struct ResultCell {
  std::string full;
  std::string brief;
  bool is_number = false;
};

template <class T>
requires(std::integral<T> || std::floating_point<T>) [[nodiscard]] ResultCell result_cell(T value) {
  char full[64];
  char brief[64];
  if constexpr (std::same_as<T, bool>) {
    return {value ? "1" : "0", value ? "1" : "0", true};
  } else if constexpr (std::integral<T>) {
    const auto end = std::to_chars(full, full + sizeof(full), value);
    return {std::string(full, end.ptr), std::string(full, end.ptr), true};
  } else {
    const auto end = std::to_chars(full, full + sizeof(full), value);
    const auto brief_end = std::to_chars(brief, brief + sizeof(brief), value, std::chars_format::general, 5);
    return {std::string(full, end.ptr), std::string(brief, brief_end.ptr), true};
  }
}

[[nodiscard]] inline ResultCell result_cell(std::string_view text) {
  std::string line(text);
  for (char& c : line) {
    if (c == '\n' || c == '\r' || c == '\0') c = ' ';
  }
  return {line, line, false};
}

[[nodiscard]] inline std::string csv_cell(std::string_view text) {
  if (text.find_first_of(",\"") == text.npos) return std::string(text);
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + '"';
}

/// Columns that a terminal needs for UTF-8 text: bytes that do not continue a code point.
[[nodiscard]] inline std::size_t text_width(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0u) != 0x80u; }));
}

}  // namespace detail

class ResultTable {
 public:
  /// A row under construction. It is written by commit() or fail(), and forgotten when neither is called.
  class Row {
   public:
    /// Sets a parameter or measure. A number, a bool (1 or 0), text, or an optional of these (none: not measured).
    /// @throws std::invalid_argument for a column that the table does not have, or one that is set already
    template <class T>
    Row& set(std::string_view column, const T& value) {
      if constexpr (std::floating_point<T>) {
        if (!std::isfinite(value)) not_finite_ = concat(column, " is ", value);
      }
      return assign(column, detail::result_cell(value));
    }
    template <class T>
    Row& set(std::string_view column, const std::optional<T>& value) {
      if (value) return set(column, *value);
      (void)table_->index_of(column);
      return *this;
    }

    /// Writes the row with status "ok"; where a cell is no finite number, with the reason: such a row is never ok, and
    /// finish() says so.
    void commit() {
      if (not_finite_.empty()) return write("ok");
      ++table_->n_not_finite_;
      fail(not_finite_);
    }
    /// Writes the row with the reason as its status: a case that did not run is a row, never a gap.
    void fail(std::string_view reason) { write(concat("failed: ", reason)); }

   private:
    friend class ResultTable;
    explicit Row(ResultTable& table) : table_(&table), cells_(table.columns_.size()), is_set_(cells_.size(), false) {}

    Row& assign(std::string_view column, detail::ResultCell cell) {
      const std::size_t index = table_->index_of(column);
      require(!is_set_[index], "result table: column '", column, "' is set twice in one row");
      cells_[index] = std::move(cell);
      is_set_[index] = true;
      return *this;
    }

    void write(std::string_view status) {
      require(!is_written_, "result table: a row is written twice");
      cells_.back() = detail::result_cell(status);
      table_->append(cells_);
      is_written_ = true;
    }

    ResultTable* table_;
    std::vector<detail::ResultCell> cells_;
    std::vector<bool> is_set_;
    std::string not_finite_;
    bool is_written_ = false;
  };

  /// @param path where rows go; empty: nowhere, the table is only printed. Its folder is created, the file with the
  ///        first row.
  /// @throws std::invalid_argument for a bad or repeated column name, a file with another header or an incomplete last
  ///         line, or a place that cannot be written
  ResultTable(const std::filesystem::path& path, const RunInfo& run, const std::vector<std::string>& parameters,
              const std::vector<std::string>& measures) {
    for (const std::string_view name : kRunColumns) add_column(std::string(name));
    for (const std::string& name : parameters) add_column(name);
    for (const std::string& name : measures) add_column(name);
    add_column(std::string(kStatusColumn));
    run_cells_ = {run.schema,        run.experiment, run.git_sha,        run.git_dirty, run.utc,
                  run.gpu,           run.card,       run.sm_count,       run.sm_mhz,    run.memory_mhz,
                  run.power_limit_w, run.driver,     run.driver_release, run.cuda,      run.compiler,
                  run.build,         run.flags,      run.seed,           run.argv};
    if (!path.empty()) file_.emplace(path, join(columns_));
  }
  ResultTable(const ResultTable&) = delete;  // rows point to their table
  ResultTable& operator=(const ResultTable&) = delete;

  [[nodiscard]] Row row() { return Row(*this); }

  /// From here on a row that cannot be written does not end the run: it is kept, tried again with the next one, and
  /// what is lost in the end is for finish() to say.
  void keep_rows() { keeps_rows_ = true; }

  /// @throws std::runtime_error when rows of this run are not in the file, or hold a number that is not finite
  void finish() {
    flush();
    const std::string where = file_ ? file_->path().string() : std::string();
    if (!unwritten_.empty()) {
      throw std::runtime_error(
          concat(unwritten_.size(), " of ", rows_.size(), " rows are not in ", where, ": ", reason_));
    }
    if (n_not_finite_ > 0) throw std::runtime_error(concat(n_not_finite_, " rows hold a number that is not finite"));
  }

  /// The same, and the status where a row has failed.
  void print_with_failures(std::ostream& stream, std::vector<std::string> columns) const {
    const bool has_failed =
        std::any_of(rows_.begin(), rows_.end(), [](const auto& row) { return row.back().full != "ok"; });
    const bool is_shown = std::find(columns.begin(), columns.end(), kStatusColumn) != columns.end();
    if (has_failed && !is_shown) columns.emplace_back(kStatusColumn);
    print(stream, columns);
  }

  [[nodiscard]] const std::vector<std::string>& columns() const { return columns_; }
  [[nodiscard]] std::size_t n_row() const { return rows_.size(); }

  /// The rows of this run as a table for the eye: numbers to five digits, right-aligned; '-' for not measured.
  /// @throws std::invalid_argument for a column that the table does not have
  void print(std::ostream& stream, const std::vector<std::string>& columns) const {
    std::vector<std::vector<detail::ResultCell>> grid(1);
    std::vector<ColumnLayout> layout;
    for (const std::string& column : columns) grid[0].push_back({column, column, false});
    for (const auto& row : rows_) {
      auto& line = grid.emplace_back();
      for (const std::string& column : columns) line.push_back(row[index_of(column, kAnyColumn)]);
    }
    for (std::size_t c = 0; c < columns.size(); ++c) {
      ColumnLayout& column = layout.emplace_back();
      for (const auto& line : grid) {
        column.width = std::max(column.width, detail::text_width(line[c].brief));
        column.is_number = column.is_number || line[c].is_number;
      }
    }
    for (const auto& line : grid) write_line(stream, line, layout);
    stream.flush();
  }

 private:
  static constexpr bool kAnyColumn = true;

  struct ColumnLayout {
    std::size_t width = 1;
    bool is_number = false;
  };

  void add_column(std::string name) {
    const bool is_plain = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
    });
    require(is_plain, "result table: column '", name, "' must consist of lower-case letters, digits and '_'");
    require(std::find(columns_.begin(), columns_.end(), name) == columns_.end(), "result table: column '", name,
            "' is there twice");
    columns_.push_back(std::move(name));
  }

  /// A row sets parameters and measures; the run's own columns and the status are the table's.
  [[nodiscard]] std::size_t index_of(std::string_view column, bool any_column = false) const {
    const auto found = std::find(columns_.begin(), columns_.end(), column);
    const auto index = static_cast<std::size_t>(found - columns_.begin());
    const bool is_own = index >= kRunColumns.size() && column != kStatusColumn;
    require(found != columns_.end() && (any_column || is_own), "result table: no ", any_column ? "" : "settable ",
            "column '", column, "'; there are: ", join({columns_.begin() + kRunColumns.size(), columns_.end() - 1}));
    return index;
  }

  [[nodiscard]] static std::string join(const std::vector<std::string>& names) {
    std::string line;
    for (const std::string& name : names) line += (line.empty() ? "" : ",") + name;
    return line;
  }

  void append(std::vector<detail::ResultCell> cells) {
    for (std::size_t c = 0; c < run_cells_.size(); ++c) cells[c] = detail::result_cell(run_cells_[c]);
    std::string line;
    for (std::size_t c = 0; c < cells.size(); ++c) line += (c == 0 ? "" : ",") + detail::csv_cell(cells[c].full);
    if (!keeps_rows_) {
      if (file_) file_->append({line});
      rows_.push_back(std::move(cells));
      return;
    }
    rows_.push_back(std::move(cells));
    if (file_) unwritten_.push_back(line);
    flush();
  }

  /// Tries again what could not be written, in order.
  void flush() {
    if (unwritten_.empty()) return;
    try {
      file_->append(unwritten_);
      unwritten_.clear();
    } catch (const std::exception& error) {
      reason_ = error.what();
    }
  }

  static void write_line(std::ostream& stream, const std::vector<detail::ResultCell>& line,
                         const std::vector<ColumnLayout>& layout) {
    std::string text;
    for (std::size_t c = 0; c < line.size(); ++c) {
      const std::string cell = line[c].brief.empty() ? "-" : line[c].brief;
      const std::string padding(layout[c].width - detail::text_width(cell), ' ');
      text += (c == 0 ? "" : "  ") + (layout[c].is_number ? padding + cell : cell + padding);
    }
    text.erase(text.find_last_not_of(' ') + 1);
    stream << text << '\n';
  }

  std::vector<std::string> columns_;
  std::vector<std::string> run_cells_;
  std::optional<detail::CsvAppender> file_;
  std::vector<std::vector<detail::ResultCell>> rows_;
  bool keeps_rows_ = false;
  std::vector<std::string> unwritten_;  ///< lines of rows that are not in the file yet
  std::string reason_;
  std::int64_t n_not_finite_ = 0;
};

}  // namespace gemma4
