#include "parallel/rank_sum.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/check.h"

namespace trireme {
namespace {

// Elements summed at a time: the accumulator, 512 x 4 B = 2 KiB, stays in L1 beside one stretch of
// an input.
constexpr int64_t kBlock = 512;

using Inputs = std::span<const void* const>;

template <typename T>
void Load(const T* in, int64_t n, float* acc) {
  for (int64_t i = 0; i < n; ++i) acc[i] = ToFloat(in[i]);
}
template <typename T>
void Add(const T* in, int64_t n, float* acc) {
  for (int64_t i = 0; i < n; ++i) acc[i] += ToFloat(in[i]);
}
template <typename T>
void Store(const float* acc, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = FromFloat<T>(acc[i]);
}

#if defined(__x86_64__)
// The baseline instruction set converts f16 with a library call per element; nearly every machine
// has F16C.
__attribute__((target("avx2,f16c"))) void ExtendF16C(const F16* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
}
__attribute__((target("avx2,f16c"))) void RoundF16C(const float* in, int64_t n, F16* out) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
}
const bool kHasF16C = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");

void Extend(const F16* in, int64_t n, float* out) {
  const int64_t whole = kHasF16C ? n / 8 * 8 : 0;
  if (whole > 0) ExtendF16C(in, whole, out);
  for (int64_t i = whole; i < n; ++i) out[i] = ToFloat(in[i]);
}
template <>
void Load<F16>(const F16* in, int64_t n, float* acc) {
  Extend(in, n, acc);
}
template <>
void Add<F16>(const F16* in, int64_t n, float* acc) {
  float wide[kBlock];
  Extend(in, n, wide);
  for (int64_t i = 0; i < n; ++i) acc[i] += wide[i];
}
template <>
void Store<F16>(const float* acc, int64_t n, F16* out) {
  const int64_t whole = kHasF16C ? n / 8 * 8 : 0;
  if (whole > 0) RoundF16C(acc, whole, out);
  for (int64_t i = whole; i < n; ++i) out[i] = FromFloat<F16>(acc[i]);
}
#endif

template <typename T>
void Sum(Inputs inputs, int64_t n, void* out) {
  float acc[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    Load(static_cast<const T*>(inputs[0]) + begin, count, acc);
    for (size_t r = 1; r < inputs.size(); ++r) {
      Add(static_cast<const T*>(inputs[r]) + begin, count, acc);
    }
    Store(acc, count, static_cast<T*>(out) + begin);
  }
}

}  // namespace

void SumInOrder(DType dtype, Inputs inputs, int64_t n, void* out) {
  CHECK(!inputs.empty());
  switch (dtype) {
    case DType::kF32:
      return Sum<float>(inputs, n, out);
    case DType::kBF16:
      return Sum<BF16>(inputs, n, out);
    case DType::kF16:
      return Sum<F16>(inputs, n, out);
    default:
      CHECK(false) << "no sum of " << Name(dtype);
  }
}

}  // namespace trireme
