// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes are refused, or are a session that a backend takes, holds and goes on from without
// leaving what it has. Bytes are tried as they are, and with their checksums set right, which chance does not come by.
// Build it with the `fuzz` preset; a seed is in tests/fuzz/session_seeds/.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/session/session_reader.hpp"
#include "gemma4/text/dialogue_note.hpp"
#include "tests/support/toy_session.hpp"

namespace {

using namespace gemma4;
using testkit::ToySession;

/// Of tests/fuzz/session_seeds/: what tests/session_file_test.cpp calls small().
testkit::ToyOptions options() {
  return {.context = 64, .window = 6, .spare = 2, .n_head = 2, .tail = 3};
}

void try_to_restore(std::span<const std::byte> bytes) {
  ToySession session(options());
  try {
    const SessionFile file = SessionFile::parse(bytes, "fuzz");
    (void)session.restore(file);
    if (session.model.position() != file.info().position) __builtin_trap();
    const auto to = session.model.position() / 2;
    if (session.model.position() < 64) (void)session.go_on(testkit::toy_tokens(1));
    session.rewind(to);
    (void)session.go_on(testkit::toy_tokens(3));
    (void)parse_dialogue_note(file.info().note, "fuzz", file.info().position);
  } catch (const FormatError&) {
  } catch (const std::invalid_argument&) {  // of another model, format or context
  }
}

/// Every checksum of the file is that of its bytes; false where they are no GGUF file with room for them.
bool reseal(std::span<std::byte> bytes) {
  try {
    const GgufFile file = GgufFile::parse(bytes, "fuzz");
    if (file.tensors().empty() || file.tensors().back().name != kChecksumsTensor) return false;
    std::vector<std::uint64_t> hashes = {block_hash(bytes.first(file.tensors().front().file_offset), 0)};
    for (const GgufTensor& tensor : file.tensors().first(file.tensors().size() - 1)) {
      for (std::size_t at = 0; at < tensor.data.size(); at += kSessionBlock) {
        hashes.push_back(
            block_hash(tensor.data.subspan(at, std::min(kSessionBlock, tensor.data.size() - at)), hashes.size()));
      }
    }
    const auto sealed = std::as_bytes(std::span(hashes));
    const GgufTensor& room = file.tensors().back();
    std::ranges::copy(sealed.first(std::min(sealed.size(), room.data.size())),
                      bytes.begin() + static_cast<std::ptrdiff_t>(room.file_offset));
    return true;
  } catch (const FormatError&) {
    return false;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::uint64_t> aligned(size / sizeof(std::uint64_t) + 1);  // as a mapped file would be
  if (size != 0) std::memcpy(aligned.data(), data, size);
  const auto bytes = std::as_writable_bytes(std::span(aligned)).first(size);
  try_to_restore(bytes);
  if (reseal(bytes)) try_to_restore(bytes);
  return 0;
}
