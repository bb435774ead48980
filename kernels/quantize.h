// Weights of linear layers in 8 bits (e4m3), symmetric, a scale for every row of W, that is for
// every output. Activations keep their type: y = (x . q) * scale + bias. Host memory, any thread.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace trireme {

// How a model's weights are stored.
enum class Quantization : uint8_t {
  kNone,  // as activations
  kFp8,   // the linear layers of the decoder's blocks as e4m3
};
constexpr const char* Name(Quantization quantization) {
  return quantization == Quantization::kFp8 ? "fp8" : "none";
}

// The largest magnitude of the row; infinity or NaN where an element is not finite.
float RowMaximum(const float* row, int64_t n);

// scale = maximum / 448, but at least 2^-118, so that neither it nor what kernels make of it is
// subnormal. `maximum` is at least the row's own; rows that are pieces of one have its maximum.
float ScaleOfRow(float maximum);

// codes[i] = row[i] / scale as an e4m3, both roundings to nearest even, saturating: never NaN.
// REQUIRES: row is finite.
void QuantizeRow(const float* row, int64_t n, float scale, E4M3* codes);

// Kernels multiply with q / 256: with 7 of e4m3's 8 bits shifted to where a 16-bit float has them,
// subnormal or not, that is what the half-precision number is, exactly. What they multiply the sum
// with is 256 times the scale.
inline constexpr float kKernelScale = 256.0f;

}  // namespace trireme
