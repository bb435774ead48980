// Element types and the conversions between them. Abseil-free, usable from every backend.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace trireme {

// kF64 holds sums and keys; no op takes it for activations. kE4M3 holds the weights of linear
// layers (quantize.h).
enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kI64, kU8, kF64, kE4M3 };

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI64:
    case DType::kF64:
      return 8;
    case DType::kU8:
    case DType::kE4M3:
      return 1;
  }
  return 0;
}

constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kU8:
      return "u8";
    case DType::kF64:
      return "f64";
    case DType::kE4M3:
      return "e4m3";
  }
  return "?";
}

// A type of activations, and of a checkpoint's weights.
constexpr bool IsFloat(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

// 16-bit floats as storage: arithmetic is always done in float.
struct BF16 {
  uint16_t bits;
};
#if defined(__aarch64__) && !defined(__clang__) && __GNUC__ < 13
using F16 = __fp16;  // the same format; these compilers lack the other name in C++
#else
using F16 = _Float16;
#endif

// The 8-bit float of the Open Compute Project's OFP8: sign, 4 bits of exponent (bias 7), 3 of
// mantissa. No infinity; the largest magnitude is 448, and all ones behind the sign is NaN.
struct E4M3 {
  uint8_t bits;
};

inline float ToFloat(float x) { return x; }
inline float ToFloat(BF16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float ToFloat(F16 x) { return static_cast<float>(x); }
inline float ToFloat(E4M3 x) {
  const uint32_t sign = uint32_t{x.bits & 0x80u} << 24, magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  // With the smallest exponent of normal numbers and an implicit one, which is then subtracted: no
  // subnormal float on the way.
  const float value = magnitude >= 8 ? std::bit_cast<float>((magnitude << 20) + (120u << 23))
                                     : std::bit_cast<float>((magnitude << 20) + (121u << 23)) -
                                           std::bit_cast<float>(121u << 23);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

// Round to nearest even; NaN stays NaN (quiet).
template <typename T>
T FromFloat(float x);
template <>
inline float FromFloat<float>(float x) {
  return x;
}
template <>
inline BF16 FromFloat<BF16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BF16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return BF16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline F16 FromFloat<F16>(float x) {
  return static_cast<F16>(x);
}
// What is larger than 448 becomes 448. A constant expression, so that CUDA's kernels may call it.
template <>
constexpr E4M3 FromFloat<E4M3>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), magnitude = u & 0x7fffffffu;
  // Rounds to a multiple of 2^-9, the distance of subnormal codes: that of floats from 2^14 on.
  constexpr uint32_t kMagic = 141u << 23;
  const uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(kMagic)) -
      kMagic;
  const uint32_t large = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t rounded = magnitude < (121u << 23) ? small : large;
  const uint32_t finite = rounded < 0x7eu ? rounded : 0x7eu;
  const uint32_t code = magnitude > 0x7f800000u ? 0x7fu : finite;
  return E4M3{static_cast<uint8_t>(code | (u >> 24 & 0x80u))};
}

// The DType of a C++ element type.
template <typename T>
inline constexpr DType kDTypeOf = DType::kU8;
template <>
inline constexpr DType kDTypeOf<float> = DType::kF32;
template <>
inline constexpr DType kDTypeOf<BF16> = DType::kBF16;
template <>
inline constexpr DType kDTypeOf<F16> = DType::kF16;
template <>
inline constexpr DType kDTypeOf<int32_t> = DType::kI32;
template <>
inline constexpr DType kDTypeOf<int64_t> = DType::kI64;
template <>
inline constexpr DType kDTypeOf<uint64_t> = DType::kI64;  // moved, never computed with
template <>
inline constexpr DType kDTypeOf<double> = DType::kF64;
template <>
inline constexpr DType kDTypeOf<E4M3> = DType::kE4M3;

}  // namespace trireme
