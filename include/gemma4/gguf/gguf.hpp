// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/gguf/block_formats.hpp"

/// What a GGUF file is made of: numbers, names and sizes that the reader and the writer share.
/// Version 3, little endian. Source: the GGUF specification (docs/gguf.md of the ggml project).
///   header    "GGUF", u32 version, u64 tensor count, u64 key count
///   keys      each: string name, u32 value type, value; string = u64 length + bytes, array = u32 type, u64 count,
///   values tensors   each: string name, u32 n_dim, u64 dim[n_dim] (innermost first), u32 tensor type, u64 offset into
///   the data data      starts at, and each tensor's offset is, a multiple of general.alignment (32 unless the key says
///   other)
namespace gemma4 {

static_assert(std::endian::native == std::endian::little, "GGUF files are little endian, and are used as mapped");

inline constexpr std::string_view kGgufMagic = "GGUF";
inline constexpr std::uint32_t kGgufVersion = 3;
inline constexpr std::uint64_t kGgufDefaultAlignment = 32;
inline constexpr std::string_view kGgufAlignmentKey = "general.alignment";
inline constexpr std::uint64_t kGgufMaxKeyBytes = 65535;
inline constexpr std::uint64_t kGgufMaxTensorNameBytes = 64;
inline constexpr std::uint32_t kGgufMaxDims = 4;

/// Types of metadata values, with the numbers of the specification.
enum class GgufType : std::uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

inline constexpr std::array<std::string_view, 13> kGgufTypeNames = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                                                    "int32",  "float32", "bool",   "string", "array",
                                                                    "uint64", "int64",   "float64"};

/// The name of a value type, or "unknown" for a number that the specification does not have.
[[nodiscard]] constexpr std::string_view type_name(GgufType type) {
  const auto number = static_cast<std::size_t>(type);
  return number < kGgufTypeNames.size() ? kGgufTypeNames[number] : std::string_view("unknown");
}

/// Bytes of one value of a fixed-size type; 0 for strings, arrays and unknown numbers.
[[nodiscard]] constexpr std::uint64_t scalar_bytes(GgufType type) {
  constexpr std::array<std::uint64_t, 13> kBytes = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  const auto number = static_cast<std::size_t>(type);
  return number < kBytes.size() ? kBytes[number] : 0;
}

/// The value type that stores a C++ type: `gguf_type_of<std::int32_t>()` is kInt32.
template <class T>
[[nodiscard]] constexpr GgufType gguf_type_of() {
  if constexpr (std::is_same_v<T, bool>) return GgufType::kBool;
  if constexpr (std::is_same_v<T, float>) return GgufType::kFloat32;
  if constexpr (std::is_same_v<T, double>) return GgufType::kFloat64;
  if constexpr (std::is_convertible_v<T, std::string_view>) return GgufType::kString;
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    constexpr std::array kSigned = {GgufType::kInt8, GgufType::kInt16, GgufType::kInt32, GgufType::kInt64};
    constexpr std::array kUnsigned = {GgufType::kUint8, GgufType::kUint16, GgufType::kUint32, GgufType::kUint64};
    constexpr int kLog2Bytes = std::countr_zero(sizeof(T));
    return std::is_signed_v<T> ? kSigned[kLog2Bytes] : kUnsigned[kLog2Bytes];
  }
}

/// Types of tensor elements that this project reads, with ggml's numbers.
enum class TensorType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2K = 10,
  kQ3K = 11,
  kQ4K = 12,
  kQ5K = 13,
  kQ6K = 14,
  kIq4Nl = 20,
  kIq4Xs = 23,
  kI8 = 24,
  kI16 = 25,
  kI32 = 26,
  kI64 = 27,
  kF64 = 28,
  kBf16 = 30,
};

/// One line per tensor type: values per block and bytes per block; a plain type has blocks of one value.
struct TensorTypeInfo {
  TensorType type;
  std::string_view name;
  std::int64_t block_size;
  std::int64_t block_bytes;
};

inline constexpr std::array kTensorTypes = {
    TensorTypeInfo{TensorType::kF32, "F32", 1, 4},
    TensorTypeInfo{TensorType::kF16, "F16", 1, 2},
    TensorTypeInfo{TensorType::kQ4_0, "Q4_0", Q40Block::kSize, sizeof(Q40Block)},
    TensorTypeInfo{TensorType::kQ4_1, "Q4_1", Q41Block::kSize, sizeof(Q41Block)},
    TensorTypeInfo{TensorType::kQ5_0, "Q5_0", Q50Block::kSize, sizeof(Q50Block)},
    TensorTypeInfo{TensorType::kQ5_1, "Q5_1", Q51Block::kSize, sizeof(Q51Block)},
    TensorTypeInfo{TensorType::kQ8_0, "Q8_0", Q80Block::kSize, sizeof(Q80Block)},
    TensorTypeInfo{TensorType::kQ2K, "Q2_K", Q2KBlock::kSize, sizeof(Q2KBlock)},
    TensorTypeInfo{TensorType::kQ3K, "Q3_K", Q3KBlock::kSize, sizeof(Q3KBlock)},
    TensorTypeInfo{TensorType::kQ4K, "Q4_K", Q4KBlock::kSize, sizeof(Q4KBlock)},
    TensorTypeInfo{TensorType::kQ5K, "Q5_K", Q5KBlock::kSize, sizeof(Q5KBlock)},
    TensorTypeInfo{TensorType::kQ6K, "Q6_K", Q6KBlock::kSize, sizeof(Q6KBlock)},
    TensorTypeInfo{TensorType::kIq4Nl, "IQ4_NL", Iq4NlBlock::kSize, sizeof(Iq4NlBlock)},
    TensorTypeInfo{TensorType::kIq4Xs, "IQ4_XS", Iq4XsBlock::kSize, sizeof(Iq4XsBlock)},
    TensorTypeInfo{TensorType::kI8, "I8", 1, 1},
    TensorTypeInfo{TensorType::kI16, "I16", 1, 2},
    TensorTypeInfo{TensorType::kI32, "I32", 1, 4},
    TensorTypeInfo{TensorType::kI64, "I64", 1, 8},
    TensorTypeInfo{TensorType::kF64, "F64", 1, 8},
    TensorTypeInfo{TensorType::kBf16, "BF16", 1, 2},
};

/// ggml's other types, those that it has given up included: a file that has them is read, so that messages can name
/// them, but nothing here decodes their blocks.
inline constexpr std::array kForeignTensorTypes = {
    TensorTypeInfo{TensorType{4}, "Q4_2", 16, 10},        TensorTypeInfo{TensorType{5}, "Q4_3", 16, 12},
    TensorTypeInfo{TensorType{9}, "Q8_1", 32, 36},        TensorTypeInfo{TensorType{15}, "Q8_K", 256, 292},
    TensorTypeInfo{TensorType{16}, "IQ2_XXS", 256, 66},   TensorTypeInfo{TensorType{17}, "IQ2_XS", 256, 74},
    TensorTypeInfo{TensorType{18}, "IQ3_XXS", 256, 98},   TensorTypeInfo{TensorType{19}, "IQ1_S", 256, 50},
    TensorTypeInfo{TensorType{21}, "IQ3_S", 256, 110},    TensorTypeInfo{TensorType{22}, "IQ2_S", 256, 82},
    TensorTypeInfo{TensorType{29}, "IQ1_M", 256, 56},     TensorTypeInfo{TensorType{31}, "Q4_0_4_4", 32, 18},
    TensorTypeInfo{TensorType{32}, "Q4_0_4_8", 32, 18},   TensorTypeInfo{TensorType{33}, "Q4_0_8_8", 32, 18},
    TensorTypeInfo{TensorType{34}, "TQ1_0", 256, 54},     TensorTypeInfo{TensorType{35}, "TQ2_0", 256, 66},
    TensorTypeInfo{TensorType{36}, "IQ4_NL_4_4", 32, 18}, TensorTypeInfo{TensorType{37}, "IQ4_NL_4_8", 32, 18},
    TensorTypeInfo{TensorType{38}, "IQ4_NL_8_8", 32, 18}, TensorTypeInfo{TensorType{39}, "MXFP4", 32, 17},
    TensorTypeInfo{TensorType{40}, "NVFP4", 64, 36},      TensorTypeInfo{TensorType{41}, "Q1_0", 128, 18},
    TensorTypeInfo{TensorType{42}, "Q2_0", 64, 18},
};

/// The entry of `type`, or nothing for a number that ggml has not given out.
[[nodiscard]] constexpr std::optional<TensorTypeInfo> find_tensor_type(TensorType type) {
  for (const TensorTypeInfo& info : kTensorTypes) {
    if (info.type == type) return info;
  }
  for (const TensorTypeInfo& info : kForeignTensorTypes) {
    if (info.type == type) return info;
  }
  return std::nullopt;
}

/// @throws std::invalid_argument for a number that ggml has not given out
[[nodiscard]] constexpr TensorTypeInfo tensor_type_info(TensorType type) {
  const std::optional<TensorTypeInfo> info = find_tensor_type(type);
  if (!info) require(false, "tensor type ", static_cast<std::uint32_t>(type), " is none of ggml's");
  return *info;
}

[[nodiscard]] constexpr std::string_view type_name(TensorType type) {
  return tensor_type_info(type).name;
}
[[nodiscard]] constexpr std::int64_t block_size(TensorType type) {
  return tensor_type_info(type).block_size;
}
[[nodiscard]] constexpr std::int64_t block_bytes(TensorType type) {
  return tensor_type_info(type).block_bytes;
}

/// Bytes of a row of `row_len` values.
/// @throws std::invalid_argument when it is negative, not a multiple of the block, or too long for 64 bits
[[nodiscard]] constexpr std::int64_t row_bytes(TensorType type, std::int64_t row_len) {
  const TensorTypeInfo info = tensor_type_info(type);
  std::int64_t bytes = 0;
  if (row_len < 0 || row_len % info.block_size != 0 ||
      __builtin_mul_overflow(row_len / info.block_size, info.block_bytes, &bytes)) {
    require(false, "row of ", row_len, " values in ", info.name, ": expected a multiple of ", info.block_size,
            " whose bytes fit in 64 bits");
  }
  return bytes;
}

/// A tensor in a file: `dims` in GGUF order, innermost first, so a row-major [a, b, c] array has dims {c, b, a}.
/// `data` borrows from the file that gave it.
struct GgufTensor {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<std::int64_t> dims;
  std::uint64_t file_offset = 0;  ///< of the first data byte
  std::span<const std::byte> data;

  [[nodiscard]] std::int64_t row_len() const { return dims.front(); }
  [[nodiscard]] std::int64_t rows() const {
    std::int64_t count = 1;
    for (std::size_t axis = 1; axis < dims.size(); ++axis) count *= dims[axis];
    return count;
  }
  [[nodiscard]] std::int64_t size() const { return row_len() * rows(); }

  /// Bytes of row `index`, counting over all outer axes.
  /// @throws std::invalid_argument when there is no such row
  [[nodiscard]] std::span<const std::byte> row(std::int64_t index) const {
    require(index >= 0 && index < rows(), "tensor '", name, "': row ", index, ", expected 0 to ", rows() - 1);
    const auto bytes = static_cast<std::size_t>(row_bytes(type, row_len()));
    return data.subspan(static_cast<std::size_t>(index) * bytes, bytes);
  }
};

/// The plain tensor type with the layout of T, if there is one. Unsigned integers are read from signed tensors of the
/// same width, because the format has no unsigned ones.
template <class T>
[[nodiscard]] constexpr std::optional<TensorType> plain_tensor_type() {
  if constexpr (std::is_same_v<T, float>) return TensorType::kF32;
  if constexpr (std::is_same_v<T, double>) return TensorType::kF64;
  if constexpr (std::is_same_v<T, F16>) return TensorType::kF16;
  if constexpr (std::is_same_v<T, Bf16>) return TensorType::kBf16;
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    constexpr std::array kTypes = {TensorType::kI8, TensorType::kI16, TensorType::kI32, TensorType::kI64};
    return kTypes[std::countr_zero(sizeof(T))];
  }
  return std::nullopt;
}

/// The values of a plain tensor, where they lie.
/// @throws FormatError when the tensor has another type
/// @throws std::invalid_argument when the memory is not aligned for T; a mapped file always is
template <class T>
[[nodiscard]] std::span<const T> data_as(const GgufTensor& tensor) {
  constexpr std::optional<TensorType> kWanted = plain_tensor_type<T>();
  static_assert(kWanted.has_value(), "no tensor type stores this C++ type");
  require_format(tensor.type == *kWanted, "tensor '", tensor.name, "' at byte ", tensor.file_offset, ": expected type ",
                 type_name(*kWanted), ", found ", type_name(tensor.type));
  require(reinterpret_cast<std::uintptr_t>(tensor.data.data()) % alignof(T) == 0, "tensor '", tensor.name,
          "': its memory is not aligned to ", alignof(T), " bytes; parse from an aligned buffer");
  return {reinterpret_cast<const T*>(tensor.data.data()), tensor.data.size() / sizeof(T)};
}

}  // namespace gemma4
