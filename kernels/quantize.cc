#include "kernels/quantize.h"

#include <algorithm>

namespace trireme {
namespace {

// Loops of a fixed length, which compilers vectorise at -O2 as well.
constexpr int64_t kBlock = 16;

constexpr float kSmallestScale = 0x1p-118f;

uint32_t Magnitude(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffffu; }

}  // namespace

float RowMaximum(const float* row, int64_t n) {
  // Magnitudes are ordered as their bits are; NaN is above infinity.
  uint32_t largest[kBlock] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) {
      // Below 2^31, so that the comparison may be the signed one, which every instruction set has.
      const auto bits = static_cast<int32_t>(Magnitude(row[i + j]));
      largest[j] = static_cast<uint32_t>(std::max(static_cast<int32_t>(largest[j]), bits));
    }
  }
  for (; i < n; ++i) largest[0] = std::max(largest[0], Magnitude(row[i]));
  return std::bit_cast<float>(*std::max_element(largest, largest + kBlock));
}

float ScaleOfRow(float maximum) { return std::max(maximum / 448.0f, kSmallestScale); }

void QuantizeRow(const float* row, int64_t n, float scale, E4M3* codes) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) codes[i + j] = FromFloat<E4M3>(row[i + j] / scale);
  }
  for (; i < n; ++i) codes[i] = FromFloat<E4M3>(row[i] / scale);
}

void RoundActivations(float* row, int64_t n) {
  const float scale = ActivationScale(RowMaximum(row, n)), inverse = 1.0f / scale;
  const auto round = [=](float& x) { x = ToFloat(FromFloat<E4M3>(x * inverse)) * scale; };
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) round(row[i + j]);
  }
  for (; i < n; ++i) round(row[i]);
}

}  // namespace trireme
