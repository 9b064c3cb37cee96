// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"

/// Reads back what ResultTable writes: RFC 4180 with one header line, and no line break inside a cell.
namespace gemma4 {

/// The cells of a line. A cell in quotes may hold commas, and quotes doubled.
/// @throws FormatError for a quote that is not closed, or text after one that is
[[nodiscard]] inline std::vector<std::string> split_csv_line(std::string_view line) {
  std::vector<std::string> cells(1);
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == ',') {
      cells.emplace_back();
    } else if (line[i] != '"' || !cells.back().empty()) {
      cells.back() += line[i];
    } else {
      for (++i; i < line.size() && (line[i] != '"' || (i + 1 < line.size() && line[i + 1] == '"')); ++i) {
        if (line[i] == '"') ++i;
        cells.back() += line[i];
      }
      require_format(i < line.size(), "CSV line: a quote is not closed: ", line);
      require_format(i + 1 == line.size() || line[i + 1] == ',', "CSV line: text after a closing quote: ", line);
    }
  }
  return cells;
}

struct CsvTable {
  std::string name;  ///< for messages
  std::vector<std::string> columns;
  std::vector<std::vector<std::string>> rows;

  [[nodiscard]] std::optional<std::size_t> find_column(std::string_view column) const {
    const auto found = std::ranges::find(columns, column);
    if (found == columns.end()) return std::nullopt;
    return static_cast<std::size_t>(found - columns.begin());
  }
  /// The cell, "" where the table has no such column.
  [[nodiscard]] std::string cell(std::size_t row, std::string_view column) const {
    const auto index = find_column(column);
    return index ? rows[row][*index] : std::string();
  }
};

/// @throws FormatError for a file that cannot be read, or a row that has another number of cells than the header
[[nodiscard]] inline CsvTable read_csv(const std::filesystem::path& path) {
  std::ifstream file(path);
  require_format(file.good(), path.string(), ": cannot read the table");
  CsvTable table{.name = path.string(), .columns = {}, .rows = {}};
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) continue;
    std::vector<std::string> cells = split_csv_line(line);
    if (table.columns.empty()) {
      table.columns = std::move(cells);
      continue;
    }
    require_format(cells.size() == table.columns.size(), path.string(), ": row ", table.rows.size() + 1, " has ",
                   cells.size(), " cells, the header has ", table.columns.size());
    table.rows.push_back(std::move(cells));
  }
  require_format(!table.columns.empty(), path.string(), ": the table is empty");
  return table;
}

/// A cell as a number; nothing when it is empty, which stands for not measured.
/// @throws FormatError for anything else
[[nodiscard]] inline std::optional<double> csv_number(std::string_view cell) {
  if (cell.empty()) return std::nullopt;
  double value = 0;
  const auto [end, error] = std::from_chars(cell.data(), cell.data() + cell.size(), value);
  require_format(error == std::errc() && end == cell.data() + cell.size(), "CSV cell '", cell, "': expected a number");
  return value;
}

}  // namespace gemma4
