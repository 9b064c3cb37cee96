// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/report/csv_table.hpp"
#include "gemma4/report/table_query.hpp"

/// Writes the tables of a markdown page, so that no figure of it is typed. What lies between a query and `<!-- end -->`
/// is written; the rest of the page stays. There are three queries, each a comment that stays in the page:
///
// clang-format off
///   <!-- table: accuracy                         the newest table of results/accuracy, or a file below results/
///   where: context=131072, text=heldout-ids.u16  of these rows (table_query.hpp)
///   if there: hint_kb=0                          of tables that have this column, of these rows
///   rows: cache                                  one line for each value of these columns
///   column: NLL | nll | %.4f | range=0-131072    header | measure | format | further conditions
///   column: change | nll | %+.4f | range=0-131072 | minus cache=bf16
///   -->
///
///   <!-- wanted: wanted.csv                      lines of results/wanted.csv against what was measured
///   where: section=31b -->
///   <!-- files: accuracy, throughput -->         every CSV below these folders; one that is not there yet has none
// clang-format on
///
/// A column takes, in any order after its format, conditions (in place of those of `where` on the same columns),
/// `times <number>`, `minus <conditions>` or `over <conditions>` (the same measure of another row), `least` or `most`
/// of several rows, where otherwise there may be one, and `if there`: then it is left out where the table has none of
/// it. Format %s is the cell as it stands. A case that was not measured is a dash; a column of dashes alone is refused.
namespace gemma4 {
namespace detail {

struct MarkdownColumn {
  std::string header = {}, measure = {}, format = "%s";
  std::vector<Condition> where = {}, minus = {}, over = {};
  double times = 1;
  std::string pick = {};     ///< least, most, or nothing
  bool is_optional = false;  ///< left out where there is no value of it
};

struct MarkdownQuery {
  std::string kind, source;
  std::vector<Condition> where;
  std::vector<Condition> if_there;  ///< of tables that have the column
  std::vector<std::string> rows;
  std::vector<MarkdownColumn> columns;
};

/// The rest of `text` behind `word` and a blank; nothing when it begins otherwise.
[[nodiscard]] inline std::optional<std::string> behind(std::string_view text, std::string_view word) {
  if (!text.starts_with(word)) return std::nullopt;
  return trimmed(text.substr(word.size()));
}

/// Pieces between " | ": a condition may hold a bare bar.
[[nodiscard]] inline std::vector<std::string> bar_pieces(std::string_view text) {
  std::vector<std::string> pieces;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(" | ", at), text.size());
    pieces.push_back(trimmed(text.substr(at, end - at)));
    at = end + 3;
  }
  return pieces;
}

[[nodiscard]] inline MarkdownColumn parse_markdown_column(std::string_view text) {
  const std::vector<std::string> pieces = bar_pieces(text);
  require_format(pieces.size() >= 2, "column '", text, "': expected header | measure | format");
  MarkdownColumn column{.header = pieces[0], .measure = pieces[1]};
  if (pieces.size() > 2) column.format = pieces[2];
  for (std::size_t i = 3; i < pieces.size(); ++i) {
    if (const auto minus = behind(pieces[i], "minus ")) {
      column.minus = parse_conditions(*minus);
    } else if (const auto over = behind(pieces[i], "over ")) {
      column.over = parse_conditions(*over);
    } else if (const auto times = behind(pieces[i], "times ")) {
      const auto number = csv_number(*times);
      require_format(number.has_value(), "column '", text, "': expected times <number>");
      column.times = *number;
    } else if (pieces[i] == "least" || pieces[i] == "most") {
      column.pick = pieces[i];
    } else if (pieces[i] == "if there") {
      column.is_optional = true;
    } else {
      column.where = parse_conditions(pieces[i]);
    }
  }
  return column;
}

/// @param lines of the comment, without <!-- and -->
[[nodiscard]] inline MarkdownQuery parse_markdown_query(const std::vector<std::string>& lines) {
  MarkdownQuery query;
  for (const std::string& line : lines) {
    if (trimmed(line).empty()) continue;
    const std::size_t colon = line.find(':');
    require_format(colon != line.npos, "'", line, "': expected table:, where:, if there:, rows: or column:");
    const std::string word = trimmed(line.substr(0, colon)), rest = trimmed(line.substr(colon + 1));
    if (query.kind.empty()) {
      query.kind = word;
      query.source = rest;
    } else if (word == "where") {
      query.where = parse_conditions(rest);
    } else if (word == "if there") {
      query.if_there = parse_conditions(rest);
    } else if (word == "rows") {
      query.rows = split(rest, ',');
    } else if (word == "column") {
      query.columns.push_back(parse_markdown_column(rest));
    } else {
      require_format(false, "'", line, "': expected where:, if there:, rows: or column:");
    }
  }
  return query;
}

[[nodiscard]] inline std::string markdown_row(const std::vector<std::string>& cells) {
  std::string line = "|";
  for (const std::string& cell : cells) {
    line += ' ';
    for (const char c : cell) line += c == '|' ? std::string("\\|") : std::string(1, c);
    line += cell.empty() ? "|" : " |";
  }
  return line + "\n";
}

[[nodiscard]] inline std::string markdown_header(const std::vector<std::string>& cells) {
  std::string line = "|";
  for (std::size_t i = 0; i < cells.size(); ++i) line += "---|";
  return markdown_row(cells) + line + "\n";
}

/// The measure of a row that the conditions hold for; "" where there is none.
[[nodiscard]] inline std::string picked_cell(const CsvTable& table, const std::vector<Condition>& conditions,
                                             const MarkdownColumn& column) {
  if (column.pick.empty()) {
    const auto row = find_row(table, conditions);
    return row ? table.cell(*row, column.measure) : std::string();
  }
  std::string best;
  for (const std::size_t row : rows_where(table, conditions)) {
    const std::string cell = table.cell(row, column.measure);
    const auto number = csv_number(cell), so_far = csv_number(best);
    if (number && (!so_far || (column.pick == "least" ? *number < *so_far : *number > *so_far))) best = cell;
  }
  return best;
}

/// What a column shows of the row that `base` and the column's own conditions name: its cell, and as a number the
/// measure after minus, over and times. Both empty where there is no such row or nothing was measured.
struct MarkdownValue {
  std::string cell;
  std::optional<double> number;
};

[[nodiscard]] inline MarkdownValue markdown_value(const CsvTable& table, const MarkdownColumn& column,
                                                  const std::vector<Condition>& base) {
  const std::vector<Condition> conditions = overridden(base, column.where);
  const auto cell_where = [&](const std::vector<Condition>& over) {
    return picked_cell(table, overridden(conditions, over), column);
  };
  MarkdownValue value{.cell = cell_where({}), .number = {}};
  if (column.format == "%s" || value.cell.empty()) return value;
  value.number = csv_number(value.cell);
  for (const auto* other : {&column.minus, &column.over}) {
    if (other->empty()) continue;
    const auto against = csv_number(cell_where(*other));
    if (!against) return {};
    value.number = other == &column.minus ? *value.number - *against : *value.number / *against;
  }
  value.number = *value.number * column.times;
  return value;
}

/// "-" for what was not measured.
[[nodiscard]] inline std::string markdown_cell(const CsvTable& table, const MarkdownColumn& column,
                                               const std::vector<Condition>& base) {
  const MarkdownValue value = markdown_value(table, column, base);
  if (value.cell.empty()) return "-";
  return value.number ? format_number(column.format, *value.number) : value.cell;
}

/// "NVIDIA H200 (card 1a2b3c4d), commit e1c3639d": what measured a row.
[[nodiscard]] inline std::string measured_by(const CsvTable& table, std::size_t row) {
  const std::string card = table.cell(row, "card");
  return table.cell(row, "gpu") + (card.empty() ? "" : " (card " + card + ")") + ", commit " +
         table.cell(row, "git_sha").substr(0, 8);
}

/// Writes the tables of one page. @throws FormatError for a query that cannot be answered
class MarkdownWriter {
 public:
  MarkdownWriter(std::filesystem::path results, std::filesystem::path page_folder)
      : results_(std::move(results)), page_folder_(std::move(page_folder)) {}

  [[nodiscard]] std::string write(const MarkdownQuery& query) const {
    if (query.kind == "table") return write_table(query);
    if (query.kind == "wanted") return write_wanted(query);
    require_format(query.kind == "files", "'", query.kind, "': expected table, wanted or files");
    return write_files(query);
  }

 private:
  /// [driver/file.csv](path from the page)
  [[nodiscard]] std::string link(const CsvTable& table) const {
    return "[" + std::filesystem::relative(table.name, results_).generic_string() + "](" +
           std::filesystem::relative(table.name, page_folder_).generic_string() + ")";
  }

  [[nodiscard]] std::string write_table(const MarkdownQuery& query) const {
    require_format(!query.rows.empty() && !query.columns.empty(), "table: expected rows: and at least one column:");
    std::vector<std::string> names = query.rows;
    for (const MarkdownColumn& column : query.columns) {
      if (!column.is_optional) names.push_back(column.measure);
    }
    const std::vector<CsvTable> tables = tables_of(results_, query.source);
    const CsvTable* const table = newest_table(tables, query.where, names, query.if_there);
    require_format(table != nullptr, query.source, ": no table has these columns and such rows");
    const std::vector<Condition> where = conditions_of(*table, query.where, query.if_there);

    std::vector<std::vector<std::string>> keys, values;  // of each line
    const std::vector<std::size_t> rows = rows_where(*table, where);
    for (const std::size_t row : rows) {
      std::vector<std::string> cells;
      for (const std::string& name : query.rows) cells.push_back(table->cell(row, name));
      if (std::ranges::find(keys, cells) != keys.end()) continue;
      std::vector<Condition> key;
      for (std::size_t i = 0; i < cells.size(); ++i) key.push_back({.column = query.rows[i], .values = {cells[i]}});
      keys.push_back(cells);
      values.emplace_back();
      for (const MarkdownColumn& column : query.columns) {
        values.back().push_back(markdown_cell(*table, column, overridden(where, key)));
      }
    }
    std::vector<std::string> header = query.rows;
    for (std::size_t i = 0; i < query.columns.size(); ++i) {
      const MarkdownColumn& column = query.columns[i];
      const bool is_measured = std::ranges::any_of(values, [&](const auto& cells) { return cells[i] != "-"; });
      require_format(is_measured || column.is_optional, table->name, ": column '", column.header,
                     "' has no value in any row");
      if (!is_measured) continue;
      header.push_back(column.header);
      for (std::size_t line = 0; line < keys.size(); ++line) keys[line].push_back(values[line][i]);
    }
    std::string text = markdown_header(header);
    for (const std::vector<std::string>& cells : keys) text += markdown_row(cells);
    return text + "\nFrom " + link(*table) + ": " + measured_by(*table, rows.back()) + ".\n";
  }

  /// A line of the table of what was wanted: the newest value, whether it meets the bound, the values of other tables
  /// of the same commit, and somebody else's figure.
  [[nodiscard]] std::vector<std::string> wanted_cells(const CsvTable& wanted, std::size_t line) const {
    const auto of = [&](const char* name) { return wanted.cell(line, name); };
    const std::vector<Condition> conditions = parse_conditions(of("conditions"));
    MarkdownColumn column{.header = "", .measure = of("measure"), .format = of("format")};
    column.minus = parse_conditions(of("minus"));
    column.times = csv_number(of("times")).value_or(1);
    const std::vector<CsvTable> tables = tables_of(results_, of("driver"));
    const CsvTable* const table = newest_table(tables, conditions, {column.measure});
    require_format(table != nullptr, "wanted '", of("what"), "': no table of ", of("driver"), " has such rows");
    const auto value = markdown_value(*table, column, conditions).number, bound = csv_number(of("wanted"));
    require_format(value && bound, "wanted '", of("what"), "': expected a number");
    const std::string relation = of("relation");
    require_format(relation == "at least" || relation == "at most", "wanted '", of("what"), "': relation '", relation,
                   "', expected at least or at most");
    const bool is_met = relation == "at least" ? *value >= *bound : *value <= *bound;
    const std::string sha = table->cell(find_row(*table, conditions).value(), "git_sha");
    std::string others, peer;
    for (const CsvTable& other : tables) {
      const auto row = find_row(other, conditions);
      if (&other == table || !row || other.cell(*row, "git_sha") != sha) continue;
      others += (others.empty() ? "" : ", ") + markdown_cell(other, column, conditions);
    }
    if (const std::string asked = of("peer"); !asked.empty()) {
      const CsvTable peers = read_csv(results_ / of("peer_table"));
      const auto row = find_row(peers, parse_conditions(asked));
      require_format(row.has_value(), "wanted '", of("what"), "': no such row in ", peers.name);
      peer = peers.cell(*row, of("measure")) + " (" + peers.cell(*row, "engine") + ")";
    }
    return {of("what"),
            relation + " " + format_number(column.format, *bound),
            format_number(column.format, *value),
            is_met ? "yes" : "**no**",
            others,
            peer,
            link(*table)};
  }

  [[nodiscard]] std::string write_wanted(const MarkdownQuery& query) const {
    const CsvTable wanted = read_csv(results_ / query.source);
    std::string text =
        markdown_header({"", "wanted", "measured", "met", "other tables of the commit", "a peer", "from"});
    const std::vector<std::size_t> lines = rows_where(wanted, query.where);
    require_format(!lines.empty(), wanted.name, ": no such lines");
    for (const std::size_t line : lines) text += markdown_row(wanted_cells(wanted, line));
    return text;
  }

  [[nodiscard]] std::string write_files(const MarkdownQuery& query) const {
    std::string text = markdown_header({"file", "rows", "measured by", "day"});
    for (const std::string& folder : split(query.source, ',')) {
      if (!std::filesystem::exists(results_ / folder)) continue;
      for (const CsvTable& table : tables_of(results_, folder)) {
        require_format(!table.rows.empty(), table.name, ": no row");
        const std::size_t last = table.rows.size() - 1;
        text += markdown_row({link(table), std::to_string(table.rows.size()), measured_by(table, last),
                              table.cell(last, "utc").substr(0, 10)});
      }
    }
    return text;
  }

  std::filesystem::path results_, page_folder_;
};

[[nodiscard]] inline std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    lines.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

[[nodiscard]] inline bool begins_query(std::string_view line) {
  return line.starts_with("<!-- table:") || line.starts_with("<!-- wanted:") || line.starts_with("<!-- files:");
}

}  // namespace detail

/// The page with its tables as the results have them now.
/// @param name of the page, for messages
/// @param page_folder that links are relative to
/// @throws FormatError with the page and the line for a query that cannot be answered, or one without its end
[[nodiscard]] inline std::string with_markdown_tables(std::string_view page, const std::string& name,
                                                      const std::filesystem::path& page_folder,
                                                      const std::filesystem::path& results) {
  const detail::MarkdownWriter writer(results, page_folder);
  const std::vector<std::string> lines = detail::lines_of(page);
  std::string text;
  for (std::size_t at = 0; at < lines.size(); ++at) {
    text += lines[at] + "\n";
    if (!detail::begins_query(lines[at])) continue;
    const std::size_t first = at;
    std::vector<std::string> query;
    for (; at < lines.size(); ++at) {
      if (at > first) text += lines[at] + "\n";
      const std::size_t close = lines[at].find("-->");
      query.push_back(lines[at].substr(0, close));
      if (close != std::string::npos) break;
    }
    query.front().erase(0, 4);  // <!--
    const auto end =
        std::find(lines.begin() + static_cast<std::ptrdiff_t>(std::min(at, lines.size())), lines.end(), "<!-- end -->");
    require_format(end != lines.end(), name, ":", first + 1, ": this query has no <!-- end -->");
    try {
      text += writer.write(detail::parse_markdown_query(query));
    } catch (const std::exception& error) {
      require_format(false, name, ":", first + 1, ": ", error.what());
    }
    text += "<!-- end -->\n";
    at = static_cast<std::size_t>(end - lines.begin());
  }
  return text;
}

/// Where a page differs from what its tables should say; nothing when it does not.
[[nodiscard]] inline std::optional<std::string> page_difference(std::string_view page, std::string_view expected,
                                                                const std::string& name) {
  const std::vector<std::string> found = detail::lines_of(page), wanted = detail::lines_of(expected);
  for (std::size_t i = 0; i < std::max(found.size(), wanted.size()); ++i) {
    const std::string here = i < found.size() ? found[i] : "(nothing)";
    const std::string there = i < wanted.size() ? wanted[i] : "(nothing)";
    if (here != there) return concat(name, ":", i + 1, ": found\n  ", here, "\nexpected\n  ", there);
  }
  return std::nullopt;
}

}  // namespace gemma4
