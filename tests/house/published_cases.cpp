// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "tests/support/gguf_edit.hpp"
#include "tests/support/micro_file.hpp"

/// Writes the micro model as files of other people have it, a file a case, for drivers to be run on.
/// Usage: published_cases FOLDER
namespace {

using namespace gemma4;
using namespace gemma4::testkit;

void write_split(const GgufEdit& model, const std::filesystem::path& folder) {
  GgufEdit first = model, second = model;
  const auto half = static_cast<std::ptrdiff_t>(first.tensors().size() / 2);
  const auto n_tensor = static_cast<std::int32_t>(first.tensors().size());
  second.drop_keys();
  first.tensors().erase(first.tensors().begin() + half, first.tensors().end());
  second.tensors().erase(second.tensors().begin(), second.tensors().begin() + half);
  std::uint16_t no = 0;
  for (GgufEdit* part : {&first, &second}) {
    part->set("split.no", no++).set("split.count", std::uint16_t{2}).set("split.tensors.count", n_tensor);
  }
  first.write(folder / "split-00001-of-00002.gguf");
  second.write(folder / "split-00002-of-00002.gguf");
  first.write(folder / "alone-00001-of-00002.gguf");
  second.write(folder / "swapped-00001-of-00002.gguf");
  first.write(folder / "swapped-00002-of-00002.gguf");
}

void write_recall(const std::filesystem::path& path, const std::vector<std::int32_t>& answer) {
  GgufEdit edit;
  const auto add = [&](const char* name, std::vector<std::int64_t> dims, const std::vector<std::int32_t>& values) {
    const auto bytes = std::as_bytes(std::span(values));
    edit.tensors().push_back({name, 26, std::move(dims), std::vector<std::byte>(bytes.begin(), bytes.end())});
  };
  add("ids", {16, 1}, std::vector<std::int32_t>(16, 7));
  add("query_doc", {1}, {0}), add("query_position", {1}, {3}), add("distance", {1}, {2});
  add("answer", {static_cast<std::int64_t>(answer.size()), 1}, answer);
  edit.set("general.architecture", std::string("golden")).write(path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::filesystem::path folder = argv[1];
  const GgufEdit model = micro_model();
  const auto write = [&](const char* name, const Change& change) {
    GgufEdit edit = model;
    change(edit);
    edit.write(folder / name);
  };
  write("micro.gguf", [](GgufEdit&) {});
  write("micro.bin", [](GgufEdit&) {});
  write("add_bos_false.gguf", [](GgufEdit& edit) { edit.set("tokenizer.ggml.add_bos_token", false); });
  write("only_embedding.gguf", [](GgufEdit& edit) {
    std::erase_if(edit.tensors(), [](const auto& tensor) {
      return tensor.name != "token_embd.weight" && tensor.name != "rope_freqs.weight";
    });
  });
  write("vision_tensors.gguf", [](GgufEdit& edit) {
    edit.add("v.blk.0.attn_k.weight", {4, 4}, std::vector<float>(16, 1.0f));
  });
  write("output_untied.gguf", with_output(true));
  write("vocab_shorter.gguf", with_tokens(300));
  const auto kind = [&](const char* name, const char* architecture, const char* type) {
    write(name, [=](GgufEdit& edit) {
      edit.drop_keys().set("general.architecture", std::string(architecture));
      edit.set("general.type", std::string(type));
    });
  };
  kind("mmproj.gguf", "clip", "mmproj");
  kind("adapter.gguf", "gemma4", "adapter");
  kind("imatrix.gguf", "gemma4", "imatrix");
  write_split(model, folder);
  write_recall(folder / "recall.gguf", {7, 7, -1});
  write_recall(folder / "recall_pad_first.gguf", {-1, 7, 7});
  write_recall(folder / "recall_outside.gguf", {7, 320, -1});
  return 0;
}
