// SPDX-License-Identifier: Apache-2.0
#include "gemma4/session/block_pipe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "gemma4/session/block_hash.hpp"
#include "gemma4/session/session_reader.hpp"
#include "gemma4/session/session_writer.hpp"
#include "gemma4/session/stored_part.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/temp_dir.hpp"

/// What a session file is made of: checksums of blocks, rows of caches, and the threads that blocks go through.
namespace {

using namespace gemma4;
using testkit::TempDir;
using Bytes = std::vector<std::byte>;

// ---- the checksum

Bytes pattern(std::size_t size) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7 + 1);
  return bytes;
}

/// Files live longer than this program: the numbers of version 1.
TEST(BlockHash, IsThatOfTheFormat) {
  EXPECT_EQ(block_hash({}, 0), 0xD0C68E44EB9D538Bu);
  EXPECT_EQ(block_hash(pattern(64), 0), 0xE621FFB28719B18Bu);
  EXPECT_EQ(block_hash(pattern(201), 5), 0xFC305F95AEA3CD45u);
}

TEST(BlockHash, EveryByteTheLengthAndTheSeedCount) {
  for (const std::size_t size : {1, 7, 8, 63, 64, 65, 130}) {
    Bytes bytes = pattern(size);
    const std::uint64_t whole = block_hash(bytes, 3);
    EXPECT_NE(block_hash(bytes, 4), whole);
    for (std::size_t i = 0; i < size; ++i) {
      for (int bit = 0; bit < 8; ++bit) {
        bytes[i] ^= std::byte{1} << bit;
        EXPECT_NE(block_hash(bytes, 3), whole) << "byte " << i << " of " << size << ", bit " << bit;
        bytes[i] ^= std::byte{1} << bit;
      }
    }
    bytes.push_back(std::byte{0});
    EXPECT_NE(block_hash(bytes, 3), whole) << "a zero more than " << size;
  }
}

/// Words that change places, within a lane and between lanes.
TEST(BlockHash, TheOrderCounts) {
  const Bytes bytes = pattern(256);
  for (std::size_t a = 0; a < 32; ++a) {
    for (std::size_t b = a + 1; b < 32; ++b) {
      Bytes other = bytes;
      std::swap_ranges(other.begin() + static_cast<std::ptrdiff_t>(8 * a),
                       other.begin() + static_cast<std::ptrdiff_t>(8 * a + 8),
                       other.begin() + static_cast<std::ptrdiff_t>(8 * b));
      EXPECT_EQ(other == bytes, block_hash(other, 0) == block_hash(bytes, 0)) << a << " and " << b;
    }
  }
}

// ---- rows

RC_GTEST_PROP(PartRows, PiecesAreTheRowsInOrder, ()) {
  const bool is_ring = *rc::gen::arbitrary<bool>();
  const auto n_head = *rc::gen::inRange<std::int64_t>(1, 4), n_row = *rc::gen::inRange<std::int64_t>(1, 12);
  const auto row_bytes = *rc::gen::inRange<std::int64_t>(1, 6);
  const auto first = *rc::gen::inRange<std::int64_t>(0, is_ring ? 40 : n_row + 1);
  const auto count = *rc::gen::inRange<std::int64_t>(0, is_ring ? n_row + 1 : n_row - first + 1);
  Bytes memory = pattern(static_cast<std::size_t>(n_head * n_row * row_bytes));
  const PartRows rows({"part", memory.data(), n_head, n_row, row_bytes}, is_ring, first, count);
  Bytes expected;
  for (std::int64_t h = 0; h < n_head; ++h) {
    for (std::int64_t r = first; r < first + count; ++r) {
      for (std::int64_t i = 0; i < row_bytes; ++i) {
        expected.push_back(memory[static_cast<std::size_t>((h * n_row + (is_ring ? r % n_row : r)) * row_bytes + i)]);
      }
    }
  }
  RC_ASSERT(rows.bytes() == expected.size());
  const auto offset = *rc::gen::inRange<std::size_t>(0, expected.size() + 1);
  const auto length = *rc::gen::inRange<std::size_t>(0, expected.size() - offset + 1);
  Bytes found;
  rows.pieces(offset, length, [&](const std::byte* from, std::size_t n) { found.insert(found.end(), from, from + n); });
  RC_ASSERT(found == Bytes(expected.begin() + static_cast<std::ptrdiff_t>(offset),
                           expected.begin() + static_cast<std::ptrdiff_t>(offset + length)));
}

TEST(PartRows, RefusesWhatIsNotThere) {
  Bytes memory(24);
  const StoredPart part{"k", memory.data(), 2, 3, 4};
  EXPECT_TRUE(testkit::refuses([&] { PartRows(part, false, 1, 3); }, {"'k'", "1 to 4", "has 3"}));
  EXPECT_TRUE(testkit::refuses([&] { PartRows(part, true, -1, 3); }, {"'k'"}));
  EXPECT_TRUE(testkit::refuses([&] { PartRows(part, false, 0, 3).pieces(20, 5, [](auto*, std::size_t) {}); },
                               {"20 to 25", "there are 24"}));
}

// ---- the way of a block

constexpr PipeFirst kEither[] = {PipeFirst::kCaller, PipeFirst::kThreads};

/// What a test wants of either side.
struct Sides final : BlockSides {
  using Side = std::function<void(std::size_t, std::span<std::byte>)>;
  Sides(Side of_turn, Side of_work) : of_turn(std::move(of_turn)), of_work(std::move(of_work)) {}
  void turn(std::size_t index, std::span<std::byte> room) override { of_turn(index, room); }
  void work(std::size_t index, std::span<std::byte> room) override { of_work(index, room); }
  Side of_turn, of_work;
};

/// Each block is taken by both sides, by the right one first, the caller's in order and on its own thread; what the
/// first leaves in the room the second finds.
TEST(BlockPipe, EveryBlockGoesItsWay) {
  for (const PipeFirst first : kEither) {
    for (const int n_thread : {0, 1, 3}) {
      for (const std::size_t n_block : {0, 1, 2, 7, 40}) {
        std::vector<std::size_t> turns;
        std::atomic<std::size_t> n_work = 0, n_wrong = 0;
        const auto side = [&](bool is_first, std::size_t index, std::span<std::byte> room) {
          const auto mark = static_cast<std::byte>(index + 1);
          n_wrong += room.size() != kSessionBlock;
          if (is_first) room.front() = room.back() = mark;
          n_wrong += room.front() != mark || room.back() != mark;
        };
        Sides sides(
            [&, caller = std::this_thread::get_id()](std::size_t index, std::span<std::byte> room) {
              n_wrong += std::this_thread::get_id() != caller;
              turns.push_back(index);
              side(first == PipeFirst::kCaller, index, room);
            },
            [&](std::size_t index, std::span<std::byte> room) {
              ++n_work;
              side(first == PipeFirst::kThreads, index, room);
            });
        pipe_blocks(n_block, first, n_thread, sides);
        std::vector<std::size_t> in_order(n_block);
        for (std::size_t i = 0; i < n_block; ++i) in_order[i] = i;
        EXPECT_EQ(turns, in_order) << n_thread << " threads";
        EXPECT_EQ(n_work, n_block) << n_thread << " threads";
        EXPECT_EQ(n_wrong, 0u) << n_thread << " threads, " << n_block << " blocks";
      }
    }
  }
}

/// Whatever side fails, at whatever blocks: the earliest one's error comes out, and the threads are gone.
TEST(BlockPipe, TheEarliestFailureIsThrown) {
  constexpr std::size_t kBlocks = 30;
  for (const PipeFirst first : kEither) {
    for (const int n_thread : {0, 1, 4}) {
      for (const std::size_t bad : {std::size_t{0}, std::size_t{3}, std::size_t{17}, kBlocks - 1}) {
        for (const bool is_turn : {true, false}) {
          const auto side = [&](std::size_t index, std::span<std::byte>) {
            if (index >= bad) throw std::runtime_error(std::to_string(index));
          };
          const auto none = [](std::size_t, std::span<std::byte>) {};
          try {
            Sides sides = is_turn ? Sides(side, none) : Sides(none, side);
            pipe_blocks(kBlocks, first, n_thread, sides);
            ADD_FAILURE() << "nothing was thrown";
          } catch (const std::runtime_error& error) {
            EXPECT_EQ(error.what(), std::to_string(bad)) << n_thread << " threads, the caller's side: " << is_turn;
          }
        }
      }
    }
  }
}

TEST(BlockPipe, FewBytesTakeNoThread) {
  EXPECT_EQ(n_pipe_thread(0), 0);
  EXPECT_EQ(n_pipe_thread(8 * kSessionBlock - 1), 0);
  EXPECT_GE(n_pipe_thread(8 * kSessionBlock), 1);
  EXPECT_LE(n_pipe_thread(std::size_t{1} << 40), 4);
}

/// Tensors of many blocks, of which the last is not full, from the host's memory and from elsewhere.
struct BigFile {
  BigFile() {
    std::uint64_t state = 1;
    for (Bytes* part : {&rows, &host}) {
      for (std::byte& byte : *part) byte = static_cast<std::byte>((state = state * 6364136223846793005u + 1) >> 56);
    }
  }
  void write(const std::filesystem::path& path, int n_thread) const {
    const auto read = [this](std::size_t at, std::span<std::byte> room) {
      std::ranges::copy(std::span(rows).subspan(at, room.size()), room.begin());
    };
    write_session(path, {.context = 1},
                  {{.name = "layer.0.rows", .dims = {static_cast<std::int64_t>(rows.size())}, .read = read},
                   {.name = "checkpoint.1", .dims = {static_cast<std::int64_t>(host.size())}, .host = host}},
                  n_thread);
  }
  Bytes rows = Bytes(9 * kSessionBlock + 77), host = Bytes(5 * kSessionBlock + 1);
};

TEST(BlockPipe, AFileHasTheSameBytesThroughAnyNumberOfThreads) {
  const BigFile big;
  const TempDir folder;
  big.write(folder.file("0"), 0);
  for (const int n_thread : {1, 4}) {
    big.write(folder.file("n"), n_thread);
    EXPECT_TRUE(std::ranges::equal(MappedFile(folder.file("0")).bytes(), MappedFile(folder.file("n")).bytes()))
        << n_thread;
  }
  const SessionFile file = SessionFile::open(folder.file("0"));
  const GgufTensor& rows = file.tensor("layer.0.rows", {static_cast<std::int64_t>(big.rows.size())});
  const GgufTensor& host = file.tensor("checkpoint.1", {static_cast<std::int64_t>(big.host.size())});
  for (const int n_thread : {0, 1, 4}) {
    Bytes visited, placed(big.host.size());
    const auto visit = [&](std::size_t offset, std::span<const std::byte> bytes) {
      EXPECT_EQ(offset, visited.size());
      visited.insert(visited.end(), bytes.begin(), bytes.end());
    };
    file.read(std::vector<SessionTarget>{{.tensor = &rows, .visit = visit}, {.tensor = &host, .host = placed}},
              n_thread);
    EXPECT_TRUE(visited == big.rows) << n_thread;
    EXPECT_TRUE(placed == big.host) << n_thread;
  }
  Bytes small(7);
  EXPECT_TRUE(testkit::refuses([&] { file.read(std::vector<SessionTarget>{{.tensor = &host, .host = small}}); },
                               {"room of 7 B", "'checkpoint.1'"}));
}

/// Of two damaged blocks the first is named, and nothing behind it is visited; a file that shrank is no crash.
TEST(BlockPipe, DamageIsFoundThroughAnyNumberOfThreads) {
  const BigFile big;
  const TempDir folder;
  big.write(folder.file("a"), 0);
  const SessionFile file = SessionFile::open(folder.file("a"));
  const GgufTensor& rows = file.tensor("layer.0.rows", {static_cast<std::int64_t>(big.rows.size())});
  const auto read_with = [&](int n_thread, std::size_t& n_visit) {
    const auto visit = [&](std::size_t, std::span<const std::byte>) { ++n_visit; };
    file.read(std::vector<SessionTarget>{{.tensor = &rows, .visit = visit}}, n_thread);
  };
  std::fstream edit(folder.file("a"), std::ios::in | std::ios::out | std::ios::binary);
  for (const std::size_t block : {8, 6}) {
    edit.seekp(static_cast<std::streamoff>(rows.file_offset + block * kSessionBlock + 5));
    edit.put(static_cast<char>(~std::to_integer<int>(big.rows[block * kSessionBlock + 5])));
  }
  edit.close();
  for (const int n_thread : {0, 1, 4}) {
    std::size_t n_visit = 0;
    EXPECT_TRUE(
        testkit::refuses<FormatError>([&] { read_with(n_thread, n_visit); }, {"bytes 6291456 to 7340032", "checksum"}));
    EXPECT_EQ(n_visit, 6u) << n_thread;
  }
  std::filesystem::resize_file(folder.file("a"), rows.file_offset + 2 * kSessionBlock + 9);
  for (const int n_thread : {0, 4}) {
    std::size_t n_visit = 0;
    EXPECT_TRUE(testkit::refuses<FormatError>([&] { read_with(n_thread, n_visit); }, {"ends at byte"}));
    EXPECT_EQ(n_visit, 2u) << n_thread;
  }
}

}  // namespace
