// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/tokenizer.hpp"

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "experiments/driver.hpp"
#include "experiments/support/notes.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/text/id_list.hpp"
#include "gemma4/text/text_escapes.hpp"

/// What does a model's tokenizer make of a text?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions {
  std::string file, text;
  bool print_ids = false, decode = false, no_bos = false, no_special = false, no_escape = false;
};

void add_options(CLI::App& app, Options& options) {
  add_model(app, options);
  auto* const input = app.add_option_group("input", "What to read");
  input->add_option("--file", options.file, "File to read; - for standard input");
  input->add_option("--text", options.text, "The text itself");
  input->require_option(1);
  auto* const ids =
      app.add_flag("--ids", options.print_ids, "Print the ids as [2, 304, ...], not a line for each token");
  auto* const decode = app.add_flag("--decode", options.decode, "Read ids as --ids prints them, and print their text");
  decode->excludes(ids);
  app.add_flag("--no-bos", options.no_bos, "Encode: no begin-of-sequence token. Decode: print one that comes first");
  app.add_flag("--no-special", options.no_special, "Leave the text of control tokens, such as <|turn>, plain text");
  app.add_flag("--no-escape", options.no_escape,
               R"(Leave \n, \r, \t, \', \", \\ and \xHH as they are; by default they become the byte they name)");
}

std::string read_input(const Options& options) {
  if (options.file.empty()) return options.text;
  std::ifstream file;
  if (options.file != "-") file.open(options.file, std::ios::binary);
  std::istream& stream = options.file == "-" ? std::cin : file;
  require(!std::filesystem::is_directory(options.file) && stream.good(), "--file ", options.file, ": cannot be opened");
  std::string text{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  require(!stream.bad(), "--file ", options.file, ": cannot be read");
  return text;
}

void print_encoded(const Tokenizer& tokenizer, const Options& options) {
  const std::string input = read_input(options);
  EncodeOptions encode{.add_bos = {}, .parse_special = !options.no_special};
  if (options.no_bos) encode.add_bos = false;
  const auto ids = tokenizer.encode(options.no_escape ? input : unescape(input), encode);
  if (options.print_ids) {
    std::cout << format_ids(ids) << "\n";
    return;
  }
  for (const std::int32_t id : ids) std::cout << id << " -> '" << tokenizer.decode_piece(id) << "'\n";
}

void print_decoded(const Tokenizer& tokenizer, const Options& options) {
  std::vector<std::int32_t> ids = parse_ids(read_input(options));
  const bool starts = !ids.empty() && ids.front() == tokenizer.vocabulary().bos_id();
  if (starts && !options.no_bos) ids.erase(ids.begin());
  std::cout << tokenizer.decode(ids);
}

void run(int argc, char** argv) {
  CLI::App app("What does a model's tokenizer make of a text? Prints its tokens, or the text of tokens.");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  const GgufFile file = GgufFile::open(options.model);
  const Tokenizer tokenizer(file);
  require_no_part(file);
  show_notes(tokenizer.vocabulary().notes());
  options.decode ? print_decoded(tokenizer, options) : print_encoded(tokenizer, options);
}

}  // namespace

int main(int argc, char** argv) {
  return run_main(argc, argv, run);
}
