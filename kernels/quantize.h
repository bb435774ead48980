// Linear layers in 8 bits (e4m3), symmetric: weights with a scale for every row of W, that is for
// every output, and where it is asked for activations with a scale for every row of x, that is for
// every token. Host memory, any thread.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/dtype.h"

namespace trireme {

// What the linear layers of a decoder's blocks multiply.
enum class Quantization : uint8_t {
  kNone,        // weights and activations of the model's type
  kFp8,         // weights of e4m3; activations keep their type: y = (x . q) * scale + bias
  kFp8Dynamic,  // and activations of e4m3 too, each row's scale found at run time
};
constexpr const char* Name(Quantization quantization) {
  switch (quantization) {
    case Quantization::kNone:
      return "none";
    case Quantization::kFp8:
      return "fp8";
    case Quantization::kFp8Dynamic:
      return "fp8-dynamic";
  }
  return "?";
}

// None for another name. All of them: none, fp8 or fp8-dynamic.
constexpr std::optional<Quantization> QuantizationNamed(std::string_view name) {
  for (const Quantization known :
       {Quantization::kNone, Quantization::kFp8, Quantization::kFp8Dynamic}) {
    if (name == Name(known)) return known;
  }
  return std::nullopt;
}

// The largest magnitude of the row; infinity or NaN where an element is not finite.
float RowMaximum(const float* row, int64_t n);

// scale = maximum / 448, but at least 2^-118, so that neither it nor what kernels make of it is
// subnormal. `maximum` is at least the row's own; rows that are pieces of one have its maximum.
float ScaleOfRow(float maximum);

// codes[i] = row[i] / scale as an e4m3, both roundings to nearest even, saturating: never NaN.
// REQUIRES: row is finite.
void QuantizeRow(const float* row, int64_t n, float scale, E4M3* codes);

// The scale of a row of activations: the smallest power of two with maximum / scale <= 448, but at
// least 2^-112, so that no code times it is subnormal. Codes are floating-point numbers, so which
// power of two it is changes no code but those of a row's smallest elements: a piece of a row is
// rounded like the whole but for what is over 2^13 times smaller than its maximum. A code times it
// is exact in bf16 and fp32. NaN where the maximum is not finite, or rounds to 2^128, which is not:
// the products of such a row are then NaN, all of them, and not what 448 would make of it.
// REQUIRES: maximum is RowMaximum's.
constexpr float ActivationScale(float maximum) {
  constexpr uint32_t kRoundsToInfinity = 0x7f780000u;        // (2 - 2^-4) * 2^127
  constexpr uint32_t kUpTo448 = 0x1fffffu, kSmallest = 15u;  // carries beyond 1.75 * 2^n; 2^-112
  const uint32_t bits = std::bit_cast<uint32_t>(maximum);
  if (bits >= kRoundsToInfinity) return std::bit_cast<float>(0x7fc00000u);
  const uint32_t exponent = (bits + kUpTo448) >> 23;
  return std::bit_cast<float>((exponent < kSmallest + 8 ? kSmallest : exponent - 8) << 23);
}

// row[i] = scale * (row[i] / scale as an e4m3, rounded to nearest even): the activations that are
// multiplied, with the row's ActivationScale.
void RoundActivations(float* row, int64_t n);

// Kernels multiply with q / 256: with 7 of e4m3's 8 bits shifted to where a 16-bit float has them,
// subnormal or not, that is what the half-precision number is, exactly. What they multiply the sum
// with is 256 times the scale.
inline constexpr float kKernelScale = 256.0f;

}  // namespace trireme
