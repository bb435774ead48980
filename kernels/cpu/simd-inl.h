// Sixteen floats at a time, on any instruction set: GCC vectors, which the compiler splits where
// registers are shorter. The same lanes and the same order of sums everywhere. Part of
// isa_kernels-inl.h; uses no standard-library templates, since those would be compiled for this
// instruction set and might be linked into code for an older one.
namespace trireme::cpu::TRIREME_ISA {

#define TRIREME_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512BF16__)
inline constexpr bool kNativeBf16 = true;
#else
inline constexpr bool kNativeBf16 = false;
#endif

inline constexpr int64_t kLanes = 16;
typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));

TRIREME_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
TRIREME_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
TRIREME_INLINE F32 Splat(float x) { return F32{} + x; }

// a * b + c, rounded once where the instruction set can. Explicit, because a compiler that fuses as
// it sees fit does so differently in each inlined copy, and two ops that share a loop would differ
// in the last bit.
TRIREME_INLINE F32 MulAdd(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  __m256 x[2], y[2], z[2];
  __builtin_memcpy(x, &a, sizeof(a));
  __builtin_memcpy(y, &b, sizeof(b));
  __builtin_memcpy(z, &c, sizeof(c));
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  __builtin_memcpy(&c, z, sizeof(c));
  return c;
#elif defined(__aarch64__)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
TRIREME_INLINE F32 Lanes() { return F32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// f(0), f(1), ..., f(kCount - 1) with constants for arguments. The compiler keeps a small array of
// vectors in registers only when all indices are constants before its loop passes run, which an
// unroll pragma does not give.
template <int kValue>
struct Index {
  [[gnu::always_inline]] constexpr operator int() const { return kValue; }
};
template <typename F, int... kValues>
TRIREME_INLINE void UnrollOver(F&& f, std::integer_sequence<int, kValues...>) {
  (f(Index<kValues>{}), ...);
}
template <int kCount, typename F>
TRIREME_INLINE void Unroll(F&& f) {
  UnrollOver(f, std::make_integer_sequence<int, kCount>{});
}
#define TRIREME_INLINE_LAMBDA __attribute__((always_inline))

// Row i of a view, without instantiating the view's own members for this instruction set.
template <typename T>
TRIREME_INLINE T* Row(const TensorView& view, int64_t i) {
  return static_cast<T*>(view.data) + i * view.stride0;
}
template <typename T>
TRIREME_INLINE const T* Row(const ConstTensorView& view, int64_t i) {
  return static_cast<const T*>(view.data) + i * view.stride0;
}

TRIREME_INLINE F32 Load(const float* p) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TRIREME_INLINE F32 Load(const BF16* p) {
  U16 h;
  __builtin_memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
  return (F32)((U32)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
  return (F32)(__builtin_convertvector(h, U32) << 16);
#endif
}
TRIREME_INLINE F32 Load(const F16* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  const __m256 half[2] = {
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  F32 v;
  __builtin_memcpy(&v, half, sizeof(v));
  return v;
#else
  F32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = ToFloat(p[i]);
  return v;
#endif
}

TRIREME_INLINE void Store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof(v)); }
// Round to nearest even, NaN stays NaN: the same bits as FromFloat<BF16>.
TRIREME_INLINE void Store(BF16* p, F32 v) {
  const U32 u = (U32)v;
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32 nan = (u >> 16) | 0x40u;
  const U32 bits = (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
#if defined(__AVX512F__)
  const U16 h = (U16)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  const U16 h = __builtin_convertvector(bits, U16);
#endif
  __builtin_memcpy(p, &h, sizeof(h));
}
TRIREME_INLINE void Store(F16* p, F32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = FromFloat<F16>(v[i]);
#endif
}

// The first n lanes, n >= 1; the others read as zero and are not written.
template <typename T>
TRIREME_INLINE F32 Load(const T* p, int64_t n) {
  if (n >= kLanes) [[likely]]
    return Load(p);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return Load(lanes);
}
template <typename T>
TRIREME_INLINE void Store(T* p, F32 v, int64_t n) {
  if (n >= kLanes) [[likely]]
    return Store(p, v);
  T lanes[kLanes];
  Store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Sum and maximum of the lanes, as a tree: 8 + 8, 4 + 4, ...
TRIREME_INLINE float Sum(F32 v) {
  float a[kLanes];
  Store(a, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  }
  return a[0];
}
TRIREME_INLINE float MaxLane(F32 v) {
  float a[kLanes];
  Store(a, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  }
  return a[0];
}

// e^x, relative error below 2e-7 for -87 <= x <= 88 (Cephes' expf polynomial on |r| <= ln2 / 2); 0
// below, e^88 above. Exp(0) is exactly 1, which attention relies on.
TRIREME_INLINE F32 Exp(F32 x) {
  const F32 small = Splat(-87.0f), large = Splat(88.0f);
  const F32 clamped = x > large ? large : (x < small ? small : x);
  const F32 magic =
      Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const F32 shifted = MulAdd(clamped, Splat(1.44269504088896341f), magic);
  const F32 n = shifted - magic;
  F32 r = MulAdd(n, Splat(-0.693359375f), clamped);
  r = MulAdd(n, Splat(2.12194440e-4f), r);
  F32 p = Splat(1.9875691500e-4f);
  p = MulAdd(p, r, Splat(1.3981999507e-3f));
  p = MulAdd(p, r, Splat(8.3334519073e-3f));
  p = MulAdd(p, r, Splat(4.1665795894e-2f));
  p = MulAdd(p, r, Splat(1.6666665459e-1f));
  p = MulAdd(p, r, Splat(5.0000001201e-1f));
  p = MulAdd(p, r * r, r + 1.0f);
  const I32 exponent = ((I32)shifted - (I32)magic + 127) << 23;
  const F32 result = p * (F32)exponent;
  return x < small ? F32{} : result;
}

}  // namespace trireme::cpu::TRIREME_ISA
