// Loads, stores and elementary functions of sixteen lanes (vector-inl.h). Part of
// isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

#if defined(__AVX512BF16__)
inline constexpr bool kNativeBf16 = true;
#else
inline constexpr bool kNativeBf16 = false;
#endif

TRIREME_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
TRIREME_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// Row i of a view, without instantiating the view's own members for this instruction set.
template <typename T>
TRIREME_INLINE T* Row(const TensorView& view, int64_t i) {
  return static_cast<T*>(view.data) + i * view.stride0;
}
template <typename T>
TRIREME_INLINE const T* Row(const ConstTensorView& view, int64_t i) {
  return static_cast<const T*>(view.data) + i * view.stride0;
}

// One register of floats from memory of any type.
typedef uint16_t HalfPart __attribute__((vector_size(kPartLanes * 2)));

TRIREME_INLINE Part<float> LoadPart(const float* p) {
  Part<float> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TRIREME_INLINE Part<float> LoadPart(const BF16* p) {
  HalfPart h;
  __builtin_memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
  return (Part<float>)((Part<uint32_t>)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined(__AVX2__)
  return (Part<float>)((Part<uint32_t>)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return (Part<float>)(__builtin_convertvector(h, Part<uint32_t>) << 16);
#endif
}
TRIREME_INLINE Part<float> LoadPart(const F16* p) {
#if defined(__AVX512F__)
  return (Part<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Part<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Part<float> v;
  for (int i = 0; i < kPartLanes; ++i) v[i] = ToFloat(p[i]);
  return v;
#endif
}
TRIREME_INLINE Part<float> LoadPart(const int8_t* p) {
#if defined(__AVX512F__)
  return (Part<float>)_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Part<float>)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Part<float> v;
  for (int i = 0; i < kPartLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

TRIREME_INLINE void StorePart(float* p, Part<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
// Round to nearest even, NaN stays NaN: the same bits as FromFloat<BF16>.
TRIREME_INLINE void StorePart(BF16* p, Part<float> v) {
  const Part<uint32_t> u = (Part<uint32_t>)v;
  const Part<uint32_t> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Part<uint32_t> nan = (u >> 16) | 0x40u;
  const Part<uint32_t> bits = (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
#if defined(__AVX512F__)
  const HalfPart h = (HalfPart)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  const HalfPart h = __builtin_convertvector(bits, HalfPart);
#endif
  __builtin_memcpy(p, &h, sizeof(h));
}
TRIREME_INLINE void StorePart(F16* p, Part<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kPartLanes; ++i) p[i] = FromFloat<F16>(v[i]);
#endif
}

template <typename T>
TRIREME_INLINE F32 Load(const T* p) {
  F32 v;
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { v.part[i] = LoadPart(p + i * kPartLanes); });
  return v;
}
template <typename T>
TRIREME_INLINE void Store(T* p, F32 v) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { StorePart(p + i * kPartLanes, v.part[i]); });
}
// Sixteen words as they lie.
TRIREME_INLINE U32 LoadBits(const void* p) { return (U32)Load(static_cast<const float*>(p)); }
// 0, 1, 2, ..., 15.
TRIREME_INLINE F32 Lanes() {
  static constexpr float kLane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Load(kLane);
}
TRIREME_INLINE float FirstLane(F32 v) { return v.part[0][0]; }

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
  const F32 clamped = Select(x > large, large, Select(x < small, small, x));
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
  return Select(x < small, F32{}, result);
}

}  // namespace trireme::cpu::TRIREME_ISA
