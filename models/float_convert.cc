#include "models/float_convert.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trireme {
namespace {

constexpr int64_t kPieceElements =
    1024;  // passes through a buffer of 4 KiB, which stays in the first-level cache

// Without these instructions every F16 costs a library call, about 5 ns.
#if defined(__x86_64__)
bool HasF16c() {
  // Not every compiler can ask for f16c by name; every processor with avx2 has it.
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
__attribute__((target("avx,f16c"))) int64_t WidenBy8(const F16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return i;
}
__attribute__((target("avx,f16c"))) int64_t NarrowBy8(const float* from, F16* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}
#else
bool HasF16c() { return false; }
int64_t WidenBy8(const F16*, float*, int64_t) { return 0; }
int64_t NarrowBy8(const float*, F16*, int64_t) { return 0; }
#endif

// Loops of a fixed length, which compilers vectorise at -O2 as well.
constexpr int64_t kBlock = 16;
int64_t WidenBlocks(const BF16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) to[i + j] = ToFloat(from[i + j]);
  }
  return i;
}
int64_t NarrowBlocks(const float* from, BF16* to, int64_t count) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) to[i + j] = FromFloat<BF16>(from[i + j]);
  }
  return i;
}

void Widen(DType type, const void* from, int64_t first, int64_t count, float* to) {
  if (type == DType::kF32) {
    std::memcpy(to, static_cast<const float*>(from) + first, count * sizeof(float));
  } else if (type == DType::kBF16) {
    const BF16* in = static_cast<const BF16*>(from) + first;
    for (int64_t i = WidenBlocks(in, to, count); i < count; ++i) to[i] = ToFloat(in[i]);
  } else {
    const F16* in = static_cast<const F16*>(from) + first;
    for (int64_t i = HasF16c() ? WidenBy8(in, to, count) : 0; i < count; ++i)
      to[i] = ToFloat(in[i]);
  }
}

void Narrow(const float* from, DType type, void* to, int64_t first, int64_t count) {
  if (type == DType::kF32) {
    std::memcpy(static_cast<float*>(to) + first, from, count * sizeof(float));
  } else if (type == DType::kBF16) {
    BF16* out = static_cast<BF16*>(to) + first;
    for (int64_t i = NarrowBlocks(from, out, count); i < count; ++i) {
      out[i] = FromFloat<BF16>(from[i]);
    }
  } else {
    F16* out = static_cast<F16*>(to) + first;
    for (int64_t i = HasF16c() ? NarrowBy8(from, out, count) : 0; i < count; ++i) {
      out[i] = FromFloat<F16>(from[i]);
    }
  }
}

}  // namespace

void ConvertFloats(DType from_type, const void* from, DType to_type, void* to, int64_t count) {
  CHECK(IsFloat(from_type) && IsFloat(to_type)) << Name(from_type) << " to " << Name(to_type);
  if (from_type == to_type) {
    std::memcpy(to, from, count * static_cast<int64_t>(SizeOf(to_type)));
    return;
  }
  float piece[kPieceElements];
  for (int64_t first = 0; first < count; first += kPieceElements) {
    const int64_t elements = std::min(kPieceElements, count - first);
    Widen(from_type, from, first, elements, piece);
    Narrow(piece, to_type, to, first, elements);
  }
}

}  // namespace trireme
