// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/report/csv_table.hpp"

/// Asks result tables for rows: conditions on cells, the newest table of a driver, and a number in words.
namespace gemma4 {

/// column=value, column=a|b, column!=value, column>number or column<number.
struct Condition {
  enum class Kind { kIs, kIsNot, kAbove, kBelow };
  std::string column;
  Kind kind = Kind::kIs;
  std::vector<std::string> values;
  bool operator==(const Condition&) const = default;
};

namespace detail {

[[nodiscard]] inline std::string trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == text.npos) return {};
  return std::string(text.substr(first, text.find_last_not_of(" \t") - first + 1));
}

/// The pieces between separators, without the blanks around them.
[[nodiscard]] inline std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> pieces;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(separator, at), text.size());
    pieces.push_back(trimmed(text.substr(at, end - at)));
    at = end + 1;
  }
  return pieces;
}

}  // namespace detail

/// @throws FormatError for a text that is no condition
[[nodiscard]] inline Condition parse_condition(std::string_view text) {
  const std::size_t at = text.find_first_of("=<>");
  const bool is_negated = at != text.npos && at > 0 && text[at] == '=' && text[at - 1] == '!';
  const std::string column = detail::trimmed(text.substr(0, at == text.npos ? 0 : at - (is_negated ? 1 : 0)));
  require_format(!column.empty(), "'", text,
                 "': expected column=value, column=a|b, column!=value, column>number or column<number");
  Condition condition{.column = column, .values = detail::split(text.substr(at + 1), '|')};
  if (is_negated) condition.kind = Condition::Kind::kIsNot;
  if (text[at] == '=') return condition;
  condition.kind = text[at] == '>' ? Condition::Kind::kAbove : Condition::Kind::kBelow;
  require_format(condition.values.size() == 1 && csv_number(condition.values[0]).has_value(), "'", text,
                 "': expected one number");
  return condition;
}

/// Conditions with commas between them; none of an empty text.
[[nodiscard]] inline std::vector<Condition> parse_conditions(std::string_view text) {
  std::vector<Condition> conditions;
  if (detail::trimmed(text).empty()) return conditions;
  for (const std::string& piece : detail::split(text, ',')) conditions.push_back(parse_condition(piece));
  return conditions;
}

/// A column that the table lacks is empty; an empty cell is above and below nothing.
[[nodiscard]] inline bool holds(const CsvTable& table, std::size_t row, const Condition& condition) {
  const std::string cell = table.cell(row, condition.column);
  const bool is_among = std::ranges::find(condition.values, cell) != condition.values.end();
  if (condition.kind == Condition::Kind::kIs) return is_among;
  if (condition.kind == Condition::Kind::kIsNot) return !is_among;
  const auto number = csv_number(cell), limit = csv_number(condition.values.front());
  if (!number) return false;
  return condition.kind == Condition::Kind::kAbove ? *number > *limit : *number < *limit;
}

/// Rows that all the conditions hold for.
[[nodiscard]] inline std::vector<std::size_t> rows_where(const CsvTable& table,
                                                         const std::vector<Condition>& conditions) {
  std::vector<std::size_t> rows;
  for (std::size_t row = 0; row < table.rows.size(); ++row) {
    if (std::ranges::all_of(conditions, [&](const Condition& condition) { return holds(table, row, condition); })) {
      rows.push_back(row);
    }
  }
  return rows;
}

/// `base`, where `over` says nothing of the same column, and `over`.
[[nodiscard]] inline std::vector<Condition> overridden(const std::vector<Condition>& base,
                                                       const std::vector<Condition>& over) {
  std::vector<Condition> conditions;
  for (const Condition& condition : base) {
    if (std::ranges::find(over, condition.column, &Condition::column) == over.end()) conditions.push_back(condition);
  }
  conditions.insert(conditions.end(), over.begin(), over.end());
  return conditions;
}

/// The row of the newest run (column utc) that all conditions hold for; nothing when there is none.
/// @throws FormatError when that run has several such rows: a figure of which nobody knows the case
[[nodiscard]] inline std::optional<std::size_t> find_row(const CsvTable& table,
                                                         const std::vector<Condition>& conditions) {
  std::optional<std::size_t> found;
  std::size_t count = 0;
  for (const std::size_t row : rows_where(table, conditions)) {
    const std::string utc = table.cell(row, "utc"), best = found ? table.cell(*found, "utc") : "";
    if (found && utc < best) continue;
    count = found && utc == best ? count + 1 : 1;
    found = row;
  }
  require_format(count < 2, table.name, ": ", count, " rows of one run are meant; narrow the query");
  return found;
}

/// The tables of a driver, results/<driver>/*.csv, or the one file that is named, in the order of their paths.
[[nodiscard]] inline std::vector<CsvTable> tables_of(const std::filesystem::path& results, const std::string& source) {
  std::vector<std::filesystem::path> paths;
  if (source.ends_with(".csv")) {
    paths.push_back(results / source);
  } else {
    require_format(std::filesystem::is_directory(results / source), (results / source).string(), ": no such folder");
    for (const auto& entry : std::filesystem::directory_iterator(results / source)) {
      if (entry.path().extension() == ".csv") paths.push_back(entry.path());
    }
  }
  std::ranges::sort(paths);
  std::vector<CsvTable> tables;
  for (const std::filesystem::path& path : paths) tables.push_back(read_csv(path));
  return tables;
}

/// `conditions`, and those of `if_there` whose column the table has.
[[nodiscard]] inline std::vector<Condition> conditions_of(const CsvTable& table, std::vector<Condition> conditions,
                                                          const std::vector<Condition>& if_there) {
  for (const Condition& condition : if_there) {
    if (table.find_column(condition.column)) conditions.push_back(condition);
  }
  return conditions;
}

/// The table whose rows that the conditions hold for are the newest (column utc). Tables that lack a column of
/// `conditions` or `columns` are older than the question and are passed over. nullptr when none has such rows.
[[nodiscard]] inline const CsvTable* newest_table(const std::vector<CsvTable>& tables,
                                                  const std::vector<Condition>& conditions,
                                                  const std::vector<std::string>& columns,
                                                  const std::vector<Condition>& if_there = {}) {
  const CsvTable* newest = nullptr;
  std::string newest_utc;
  for (const CsvTable& table : tables) {
    const auto has = [&](const std::string& column) { return table.find_column(column).has_value(); };
    if (!std::ranges::all_of(columns, has)) continue;
    if (!std::ranges::all_of(conditions, [&](const Condition& condition) { return has(condition.column); })) continue;
    std::string utc;
    const std::vector<std::size_t> rows = rows_where(table, conditions_of(table, conditions, if_there));
    for (const std::size_t row : rows) utc = std::max(utc, table.cell(row, "utc"));
    if (rows.empty() || (newest != nullptr && utc < newest_utc)) continue;
    newest = &table;
    newest_utc = utc;
  }
  return newest;
}

/// A number as `format` has it: text around one of %.<digits>f and %+.<digits>f, with %% for a percent sign.
/// @throws FormatError for any other format
[[nodiscard]] inline std::string format_number(const std::string& format, double value) {
  std::string text;
  int n_conversion = 0;
  for (std::size_t at = 0; at < format.size(); ++at) {
    if (format[at] != '%') {
      text += format[at];
      continue;
    }
    if (format.compare(at, 2, "%%") == 0) {
      text += '%';
      ++at;
      continue;
    }
    const bool has_sign = format.compare(at + 1, 1, "+") == 0;
    const std::size_t dot = at + (has_sign ? 2 : 1);
    const bool is_fixed = dot + 2 < format.size() && format[dot] == '.' && format[dot + 1] >= '0' &&
                          format[dot + 1] <= '9' && format[dot + 2] == 'f';
    require_format(is_fixed, "format '", format, "': expected %.<digit>f or %+.<digit>f");
    char number[64];
    std::snprintf(number, sizeof(number), has_sign ? "%+.*f" : "%.*f", format[dot + 1] - '0', value);
    text += number;
    at = dot + 2;
    ++n_conversion;
  }
  require_format(n_conversion == 1, "format '", format, "': expected one %.<digit>f or %+.<digit>f");
  return text;
}

}  // namespace gemma4
