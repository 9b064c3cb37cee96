// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Device code of cuda/ on the CPU: a GPU test compiled by GCC, this header forced in front of it, runs without a GPU
/// and without nvcc (the toolkit's headers are needed). `.ci/emulate PROGRAM` builds and runs tests/PROGRAM_test.cu.
///
/// How. Each thread of a block is a fiber of one host thread (fibers.hpp), blocks run one after another, those of a
/// cluster by turns, and a kernel has ended when its launch returns. Lanes meet in the operations of a warp, threads at
/// barriers (rendezvous.hpp); copies into shared memory land later than they were asked for (copies.hpp). The headers
/// of cuda/ptx/ that hold instructions have twins in twins/cuda/ptx/, which stand first on the include path: the same
/// functions in C++.
///
/// What it finds, beside wrong results: lanes of a warp in different operations, deadlocks (it says who waits where),
/// bytes written behind dynamic shared memory or behind a buffer, memory that was read before it was written (dynamic
/// shared memory begins as 0xFF, buffers as 0xCD, the target of a copy is 0xFF until it lands), copies that nobody
/// waited for or that are not aligned. All of these end the program with the kernel and the block.
///
/// How exact. Integers, conversions, sums and fused products are what the device computes, bit by bit. Products of
/// matrices are summed in double and rounded once: as good as the device's or better, not its bits. exp2, reciprocals
/// and square roots are the host's. Other expressions are contracted as GCC likes it, which is not as nvcc does.
///
/// What it does not show: speed, memory order (a missing fence is not seen), static shared memory out of bounds or
/// left over from the block before, blocks that wait for each other (they never end), programmatic dependent launch
/// (its waits do nothing), several host threads. Static shared memory is one for a cluster. Not there, and said by
/// name: wgmma, tensor copies, operations of part of a warp. A program that meets wgmma at GEMMA4_EMULATOR_ARCH=900 has
/// another path at 800.
///
/// Environment:
///   GEMMA4_EMULATOR_ARCH         of the build: __CUDA_ARCH__, 900 (default), 860 or 800; read by .ci/emulate
///   GEMMA4_EMULATOR_SMS          multiprocessors that the device claims, 132; fewer are quicker
///   GEMMA4_EMULATOR_SMEM_BYTES   dynamic shared memory that a block may ask for; by default that of the architecture
///   GEMMA4_EMULATOR_SEED         0 (default): threads in order; else a random order of this seed, which finds races
///   GEMMA4_EMULATOR_COPIES       late (default), early or random: when bulk copies land
/// Properties are as long as anywhere: RC_PARAMS="max_success=20" shortens them.
#include "tests/emulator/words.hpp"

#include "tests/emulator/atomics.hpp"
#include "tests/emulator/copies.hpp"
#include "tests/emulator/intrinsics.hpp"
#include "tests/emulator/launch.hpp"
#include "tests/emulator/number_formats.hpp"
#include "tests/emulator/shared_memory.hpp"
#include "tests/emulator/warp_operations.hpp"
