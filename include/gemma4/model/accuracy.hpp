// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/finite.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/report/accuracy_stats.hpp"

/// What a cache costs in accuracy, measured on a model that runs: next-token predictions over a text, and key recall.
namespace gemma4 {

struct PositionRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::string name() const { return std::to_string(begin) + "-" + std::to_string(end); }
  bool operator==(const PositionRange&) const = default;
};

/// All positions of a context, and then its parts between 0 and these edges where there is more than one.
[[nodiscard]] inline std::vector<PositionRange> position_ranges(std::int64_t context,
                                                                const std::vector<std::int64_t>& edges = {
                                                                    2048, 8192, 32768, 131072}) {
  std::vector<PositionRange> ranges = {{0, context}};
  std::int64_t begin = 0;
  for (const std::int64_t edge : edges) {
    if (begin >= context) break;
    ranges.push_back({begin, std::min<std::int64_t>(edge, context)});
    begin = edge;
  }
  if (ranges.size() == 2) ranges.pop_back();  // the one part is the whole
  return ranges;
}

/// One backend's predictions over a text, each beside the base's.
struct AccuracyTrace {
  std::vector<PositionAccuracy> positions;
  std::vector<double> forward_s;  ///< after each position: seconds in the model so far, the logits asked for included
};

namespace detail {

/// Logits of some rows of a chunk, [n_row, vocab].
struct LogitRows {
  std::int64_t vocab = 0;
  std::vector<float> values;
  [[nodiscard]] std::span<float> row(std::size_t i) {
    return std::span(values).subspan(i * static_cast<std::size_t>(vocab), static_cast<std::size_t>(vocab));
  }
};

/// Asks a backend that can tell. @param number of the backend, for whoever names it
template <class TBackend>
void require_finite(Model<TBackend>& model, std::span<const std::int32_t> tokens, std::size_t number = 0) {
  if constexpr (WatchedBackend<TBackend>) {
    try {
      model.require_finite(tokens);
    } catch (NotFiniteError& error) {
      error.backend = number;
      throw;
    }
  }
}

/// One chunk through the model, in pieces no longer than its backend takes, and the logits of `rows` of it.
template <Backend TBackend>
void forward_pieces(Model<TBackend>& model, std::span<const std::int32_t> tokens, std::span<const std::int64_t> rows,
                    LogitRows& logits) {
  const auto n_token = static_cast<std::int64_t>(tokens.size());
  TBackend& backend = model.backend();
  std::size_t done = 0;
  for (std::int64_t begin = 0; begin < n_token; begin += backend.max_chunk()) {
    const std::int64_t count = std::min(backend.max_chunk(), n_token - begin);
    std::vector<std::int64_t> some;
    for (std::size_t i = done; i < rows.size() && rows[i] < begin + count; ++i) some.push_back(rows[i] - begin);
    model.forward(tokens.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)), some);
    const auto vocab = static_cast<std::size_t>(logits.vocab);
    const std::span<float> out = std::span(logits.values).subspan(done * vocab, some.size() * vocab);
    if constexpr (requires { backend.copy_logit_rows(out); }) {
      if (!some.empty()) backend.copy_logit_rows(out);
    } else {
      for (std::size_t r = 0; r < some.size(); ++r) {
        backend.copy_logits(static_cast<std::int64_t>(r), out.subspan(r * vocab, vocab));
      }
    }
    done += some.size();
  }
}

}  // namespace detail

/// The ids up to `end` through a model that holds the first of them, in chunks counted from where it is; with logits of
/// the last one. `on_chunk(n_token)` after each.
template <Backend TBackend, class TOnChunk>
void read_to(Model<TBackend>& model, std::span<const std::int32_t> ids, std::int64_t end, std::int64_t chunk,
             TOnChunk&& on_chunk) {
  detail::LogitRows last{model.backend().config().vocab, {}};
  last.values.resize(static_cast<std::size_t>(last.vocab));
  while (model.position() < end) {
    const std::int64_t begin = model.position(), count = std::min(chunk, end - begin);
    std::vector<std::int64_t> rows;
    if (begin + count == end) rows.push_back(count - 1);
    detail::forward_pieces(model, ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)), rows,
                           last);
    on_chunk(count);
  }
}

/// Where a comparison begins. Nobody looks at what is before, so that the caches may hold it from wherever it came.
template <class TBackend>
struct AccuracyStart {
  std::int64_t position = 0;
  /// Brings the model of a backend, which is empty, there.
  std::function<void(std::size_t backend, Model<TBackend>& model)> bring = {};
};

namespace detail {

template <class TBackend, class TOnModel>
void bring_all(std::vector<Model<TBackend>>& models, const AccuracyStart<TBackend>& start, TOnModel&& on_model) {
  for (std::size_t b = 0; b < models.size() && start.position > 0; ++b) {
    start.bring(b, models[b]);
    require(models[b].position() == start.position, "measure_positions: backend ", b, " was brought to ",
            models[b].position(), ", need ", start.position);
    on_model();
  }
}

}  // namespace detail

/// Runs the backends over the ids in lockstep, chunk by chunk, and compares their logits at `positions` (increasing);
/// position p predicts ids[p + 1]. The first backend is the base of every comparison, its own included. Entry i of a
/// trace is positions[i]. `on_chunk(n_done)` after each chunk of each backend, in positions times backends. The logits
/// of a position are the same whatever else is asked for, so that few positions of a long text cost little. A backend
/// of shorter chunks takes each of these in pieces of its own length.
/// @param start at or before the first position; chunks are counted from there
/// @throws std::invalid_argument before any work when ids or positions do not fit
/// @throws NotFiniteError when a backend's numbers are not finite, with its place among the backends
template <Backend TBackend, class TOnChunk>
[[nodiscard]] std::vector<AccuracyTrace> measure_positions(std::span<TBackend* const> backends,
                                                           std::span<const std::int32_t> ids,
                                                           std::span<const std::int64_t> positions, std::int64_t chunk,
                                                           TOnChunk&& on_chunk,
                                                           const AccuracyStart<TBackend>& start = {}) {
  using Clock = std::chrono::steady_clock;
  require(!backends.empty(), "measure_positions: no backend");
  require(!positions.empty() && positions.front() >= 0 && std::ranges::is_sorted(positions, std::less_equal<>{}),
          "measure_positions: need increasing positions");
  const std::int64_t n_position = positions.back() + 1;
  require(n_position < static_cast<std::int64_t>(ids.size()), "measure_positions: ", n_position, " positions need ",
          n_position + 1, " ids, there are ", ids.size());
  require(start.position >= 0 && start.position <= positions.front(), "measure_positions: begins at ", start.position,
          ", behind the first position ", positions.front());
  const std::int64_t vocab = backends.front()->config().vocab;
  for (const std::int32_t id : ids) {
    require(id >= 0 && id < vocab, "measure_positions: id ", id, " is outside the vocabulary [0, ", vocab, ")");
  }
  std::vector<Model<TBackend>> models;
  for (TBackend* backend : backends) models.emplace_back(*backend).reset();
  std::vector<AccuracyTrace> traces(backends.size());
  for (AccuracyTrace& trace : traces) trace.positions.resize(positions.size());
  std::vector<double> seconds(backends.size());
  detail::LogitRows base{vocab, {}}, test{vocab, {}};
  std::int64_t n_done = 0;
  detail::bring_all(models, start, [&] { on_chunk(n_done += start.position); });
  std::size_t first = 0;  // position of the chunk that is compared next
  for (std::int64_t begin = start.position; begin < n_position; begin += chunk) {
    const std::int64_t count = std::min(chunk, n_position - begin);
    std::vector<std::int64_t> rows;
    for (std::size_t i = first; i < positions.size() && positions[i] < begin + count; ++i) {
      rows.push_back(positions[i] - begin);
    }
    for (std::size_t b = 0; b < backends.size(); ++b) {
      const auto begun = Clock::now();
      detail::LogitRows& logits = b == 0 ? base : test;
      logits.values.resize(std::max(logits.values.size(), rows.size() * static_cast<std::size_t>(vocab)));
      detail::forward_pieces(models[b], ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)),
                             rows, logits);
      detail::require_finite(models[b], ids.first(static_cast<std::size_t>(begin + count)), b);
      seconds[b] += std::chrono::duration<double>(Clock::now() - begun).count();
      const auto n_row = static_cast<std::int64_t>(rows.size());
#if defined(_OPENMP)  // nothing below throws: the ids were looked at
#pragma omp parallel for schedule(static)
#endif
      for (std::int64_t r = 0; r < n_row; ++r) {
        const auto at = static_cast<std::size_t>(r);
        const auto target = static_cast<std::size_t>(begin + rows[at] + 1);
        traces[b].positions[first + at] = compare_logits(logits.row(at), base.row(at), ids[target]);
      }
      traces[b].forward_s.insert(traces[b].forward_s.end(), rows.size(), seconds[b]);
      on_chunk(n_done += count);
    }
    first += rows.size();
  }
  return traces;
}

/// The same at every position of ids[0 .. n_position).
template <Backend TBackend, class TOnChunk>
[[nodiscard]] std::vector<AccuracyTrace> measure_accuracy(std::span<TBackend* const> backends,
                                                          std::span<const std::int32_t> ids, std::int64_t n_position,
                                                          std::int64_t chunk, TOnChunk&& on_chunk) {
  require(n_position >= 1, "measure_accuracy: ", n_position, " positions, need at least 1");
  std::vector<std::int64_t> positions(static_cast<std::size_t>(n_position));
  std::iota(positions.begin(), positions.end(), 0);
  return measure_positions(backends, ids, positions, chunk, on_chunk);
}

/// The last `window` positions before each depth; a position that belongs to two of them is there once.
[[nodiscard]] inline std::vector<std::int64_t> positions_before(std::span<const std::int64_t> depths,
                                                                std::int64_t window) {
  std::set<std::int64_t> positions;
  for (const std::int64_t depth : depths) {
    require(window >= 1 && depth >= window, "positions_before: a window of ", window, " before depth ", depth);
    for (std::int64_t position = depth - window; position < depth; ++position) positions.insert(position);
  }
  return {positions.begin(), positions.end()};
}

/// Questions about keys planted far back in long documents. A question is answered when the model, given the document
/// so far, puts each of the answer's tokens first in turn.
struct RecallTask {
  struct Question {
    std::int64_t document = 0;
    std::int64_t position = 0;         ///< of the last token of the question
    std::vector<std::int32_t> answer;  ///< the tokens that must follow it
    std::int64_t distance = 0;         ///< from the key to the question, tokens
  };
  std::int64_t document_len = 0;
  std::vector<std::vector<std::int32_t>> documents;
  std::vector<Question> questions;
};

namespace detail {

/// The tokens of a row of `answer`, behind which padding of -1 may stand.
[[nodiscard]] inline std::vector<std::int32_t> recall_answer(const std::string& file, std::size_t question,
                                                             std::span<const std::int32_t> row, std::int64_t vocab) {
  std::size_t n_token = row.size();
  while (n_token > 0 && row[n_token - 1] == -1) --n_token;
  for (std::size_t column = 0; column < n_token; ++column) {
    const std::int32_t id = row[column];
    const auto where = [&] { return concat(file, ": question ", question, ", column ", column, " of 'answer': "); };
    if (id == -1) require_format(false, where(), "padding (-1) in front of a token, expected it behind the answer");
    if (id < 0 || id >= vocab) require_format(false, where(), "id ", id, " is outside the vocabulary [0, ", vocab, ")");
  }
  require_format(n_token > 0, file, ": question ", question, " of 'answer': nothing but padding, expected a token");
  return {row.begin(), row.begin() + static_cast<std::ptrdiff_t>(n_token)};
}

/// Refuses a document that the model could not read to its end.
inline void require_recall_document(const std::string& file, std::size_t document, std::span<const std::int32_t> ids,
                                    std::int64_t vocab) {
  const auto bad = std::ranges::find_if(ids, [&](std::int32_t id) { return id < 0 || id >= vocab; });
  if (bad == ids.end()) return;
  require_format(false, file, ": document ", document, ", column ", bad - ids.begin(), " of 'ids': id ", *bad,
                 " is outside the vocabulary [0, ", vocab, ")");
}

}  // namespace detail

/// A container with `ids` [n_document, document_len], `query_doc`, `query_position`, `distance` [n_question] and
/// `answer` [n_question, n] padded with -1 behind, all i32.
/// @param vocab of the model that is asked
/// @throws FormatError naming the tensor and the value that does not fit; of an answer, the question and the column
[[nodiscard]] inline RecallTask read_recall_task(const std::filesystem::path& path, std::int64_t vocab) {
  const GgufFile file = GgufFile::open(path);
  const auto matrix = [&](const char* name) {
    const GgufTensor& tensor = file.tensor(name);
    require_format(tensor.dims.size() == 2, path.string(), ": tensor '", name, "' has ", tensor.dims.size(),
                   " dimensions, expected 2");
    return data_as<std::int32_t>(tensor);
  };
  const auto ids = matrix("ids");
  const auto answers = matrix("answer");
  const auto documents = data_as<std::int32_t>(file.tensor("query_doc"));
  const auto positions = data_as<std::int32_t>(file.tensor("query_position"));
  const auto distances = data_as<std::int32_t>(file.tensor("distance"));
  RecallTask task;
  task.document_len = file.tensor("ids").dims[0];
  const std::int64_t answer_len = file.tensor("answer").dims[0];
  for (std::size_t at = 0; at < ids.size(); at += static_cast<std::size_t>(task.document_len)) {
    const auto document = ids.subspan(at, static_cast<std::size_t>(task.document_len));
    task.documents.emplace_back(document.begin(), document.end());
  }
  require_format(positions.size() == documents.size() && distances.size() == documents.size() &&
                     answers.size() == documents.size() * static_cast<std::size_t>(answer_len),
                 path.string(), ": tensors 'query_position', 'distance' and 'answer' need ", documents.size(),
                 " entries, as 'query_doc' has");
  for (std::size_t i = 0; i < documents.size(); ++i) {
    const auto row = answers.subspan(i * static_cast<std::size_t>(answer_len), static_cast<std::size_t>(answer_len));
    RecallTask::Question question{documents[i], positions[i], detail::recall_answer(path.string(), i, row, vocab),
                                  distances[i]};
    const auto n_answer = static_cast<std::int64_t>(question.answer.size());
    require_format(question.document >= 0 && question.document < static_cast<std::int64_t>(task.documents.size()),
                   path.string(), ": query_doc[", i, "] is ", question.document, ", expected 0 to ",
                   task.documents.size() - 1);
    require_format(question.position >= 0 && question.position + n_answer <= task.document_len, path.string(),
                   ": query_position[", i, "] is ", question.position, " with an answer of ", n_answer,
                   " tokens, expected them inside the document of ", task.document_len);
    task.questions.push_back(std::move(question));
  }
  for (std::size_t d = 0; d < task.documents.size(); ++d) {
    detail::require_recall_document(path.string(), d, task.documents[d], vocab);
  }
  return task;
}

struct RecallResult {
  std::int64_t correct = 0;
  std::int64_t total = 0;
};

/// Asks every question. The documents hold the answers, so one pass over each is enough. `on_chunk(n_done)` counts
/// tokens over all documents.
template <Backend TBackend, class TOnChunk>
[[nodiscard]] RecallResult measure_recall(TBackend& backend, const RecallTask& task, std::int64_t chunk,
                                          TOnChunk&& on_chunk) {
  Model<TBackend> model(backend);
  std::vector<float> logits(static_cast<std::size_t>(backend.config().vocab));
  std::vector<bool> answered(task.questions.size(), true);
  std::int64_t n_done = 0;
  for (std::size_t d = 0; d < task.documents.size(); ++d) {
    model.reset();
    const std::span<const std::int32_t> document = task.documents[d];
    while (model.position() < task.document_len) {
      const std::int64_t begin = model.position();
      const std::int64_t count = std::min(chunk, task.document_len - begin);
      std::vector<std::int64_t> rows;  // in the order of questions and answer tokens
      const auto for_each_wanted = [&](auto&& visit) {
        for (std::size_t i = 0; i < task.questions.size(); ++i) {
          const RecallTask::Question& question = task.questions[i];
          if (question.document != static_cast<std::int64_t>(d)) continue;
          for (std::size_t j = 0; j < question.answer.size(); ++j) {
            const std::int64_t row = question.position + static_cast<std::int64_t>(j) - begin;
            if (row >= 0 && row < count) visit(i, row, question.answer[j]);
          }
        }
      };
      for_each_wanted([&](std::size_t, std::int64_t row, std::int32_t) { rows.push_back(row); });
      model.forward(document.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)), rows);
      detail::require_finite(model, document.first(static_cast<std::size_t>(begin + count)));
      std::int64_t next = 0;
      for_each_wanted([&](std::size_t i, std::int64_t, std::int32_t token) {
        backend.copy_logits(next++, logits);
        if (argmax(logits) != token) answered[i] = false;
      });
      on_chunk(n_done += count);
    }
  }
  return {std::count(answered.begin(), answered.end(), true), static_cast<std::int64_t>(answered.size())};
}

}  // namespace gemma4
