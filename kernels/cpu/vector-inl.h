// Sixteen lanes, on any instruction set, as a struct of as many registers as they take: GCC keeps
// vector types that are longer than a register in memory. The same lanes and the same order of sums
// everywhere. Part of isa_kernels-inl.h; uses no standard-library templates, since those would be
// compiled for this instruction set and might be linked into code for an older one.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace trireme::cpu::TRIREME_ISA {

#define TRIREME_INLINE [[gnu::always_inline]] inline
#define TRIREME_INLINE_LAMBDA __attribute__((always_inline))

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

inline constexpr int64_t kLanes = 16;
#if defined(__AVX512F__)
inline constexpr int kPartLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kPartLanes = 8;
#else
inline constexpr int kPartLanes = 4;
#endif
inline constexpr int kParts = kLanes / kPartLanes;

// The lanes of one register, of a 32-bit type.
template <typename E>
struct PartOf {
  typedef E type __attribute__((vector_size(kPartLanes * 4)));
};
template <typename E>
using Part = typename PartOf<E>::type;

template <typename E>
struct Vector {
  using Element = E;
  Part<E> part[kParts];

  // The same bits.
  template <typename To>
  [[gnu::always_inline]] explicit operator Vector<To>() const {
    Vector<To> to;
    Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { to.part[i] = (Part<To>)part[i]; });
    return to;
  }
};
using F32 = Vector<float>;
using I32 = Vector<int32_t>;
using U32 = Vector<uint32_t>;

template <typename E, int... kLane>
TRIREME_INLINE Part<E> SplatPart(E x, std::integer_sequence<int, kLane...>) {
  return Part<E>{((void)kLane, x)...};
}
template <typename E>
TRIREME_INLINE Vector<E> Splat(E x) {
  Vector<E> v;
  const Part<E> part = SplatPart(x, std::make_integer_sequence<int, kPartLanes>{});
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { v.part[i] = part; });
  return v;
}

#define TRIREME_VECTOR_OPERATOR(op)                                                            \
  template <typename E>                                                                        \
  TRIREME_INLINE Vector<E> operator op(Vector<E> a, Vector<E> b) {                             \
    Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { a.part[i] = a.part[i] op b.part[i]; }); \
    return a;                                                                                  \
  }                                                                                            \
  template <typename E>                                                                        \
  TRIREME_INLINE Vector<E> operator op(Vector<E> a, typename Vector<E>::Element b) {           \
    return a op Splat<E>(b);                                                                   \
  }
TRIREME_VECTOR_OPERATOR(+)
TRIREME_VECTOR_OPERATOR(-)
TRIREME_VECTOR_OPERATOR(*)
TRIREME_VECTOR_OPERATOR(/)
TRIREME_VECTOR_OPERATOR(&)
TRIREME_VECTOR_OPERATOR(|)
#undef TRIREME_VECTOR_OPERATOR

template <typename E>
TRIREME_INLINE Vector<E> operator-(Vector<E> a) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { a.part[i] = -a.part[i]; });
  return a;
}
template <typename E>
TRIREME_INLINE Vector<E>& operator+=(Vector<E>& a, Vector<E> b) {
  return a = a + b;
}
template <typename E>
TRIREME_INLINE Vector<E>& operator*=(Vector<E>& a, Vector<E> b) {
  return a = a * b;
}
template <typename E>
TRIREME_INLINE Vector<E> operator<<(Vector<E> a, int bits) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { a.part[i] = a.part[i] << bits; });
  return a;
}
template <typename E>
TRIREME_INLINE Vector<E> operator>>(Vector<E> a, int bits) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { a.part[i] = a.part[i] >> bits; });
  return a;
}

// Lanes of ones where the comparison holds, of zeros elsewhere, and the choice by them.
#define TRIREME_VECTOR_COMPARISON(op)                        \
  template <typename E>                                      \
  TRIREME_INLINE I32 operator op(Vector<E> a, Vector<E> b) { \
    I32 v;                                                   \
    Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA {       \
      v.part[i] = (Part<int32_t>)(a.part[i] op b.part[i]);   \
    });                                                      \
    return v;                                                \
  }
TRIREME_VECTOR_COMPARISON(<)
TRIREME_VECTOR_COMPARISON(>)
TRIREME_VECTOR_COMPARISON(>=)
#undef TRIREME_VECTOR_COMPARISON

template <typename E>
TRIREME_INLINE Vector<E> Select(I32 mask, Vector<E> yes, Vector<E> no) {
  Unroll<kParts>(
      [&](auto i) TRIREME_INLINE_LAMBDA { no.part[i] = mask.part[i] ? yes.part[i] : no.part[i]; });
  return no;
}

// a > b ? a : b, and a < b ? a : b: where one of them is NaN, b.
TRIREME_INLINE Part<float> Larger(Part<float> a, Part<float> b) {
#if defined(__AVX512F__)
  return (Part<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Part<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
TRIREME_INLINE Part<float> Smaller(Part<float> a, Part<float> b) {
#if defined(__AVX512F__)
  return (Part<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Part<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
TRIREME_INLINE F32 Larger(F32 a, F32 b) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { b.part[i] = Larger(a.part[i], b.part[i]); });
  return b;
}
TRIREME_INLINE F32 Smaller(F32 a, F32 b) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA { b.part[i] = Smaller(a.part[i], b.part[i]); });
  return b;
}

TRIREME_INLINE Part<float> MulAdd(Part<float> a, Part<float> b, Part<float> c) {
#if defined(__AVX512F__)
  return (Part<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Part<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Part<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
// a * b + c, rounded once where the instruction set can. Explicit, because a compiler that fuses as
// it sees fit does so differently in each inlined copy, and two ops that share a loop would differ
// in the last bit.
TRIREME_INLINE F32 MulAdd(F32 a, F32 b, F32 c) {
  Unroll<kParts>(
      [&](auto i) TRIREME_INLINE_LAMBDA { c.part[i] = MulAdd(a.part[i], b.part[i], c.part[i]); });
  return c;
}

// Rows i and i + kWidth of a matrix that is being transposed: lanes with bit kWidth of the first
// change places with lanes without it of the second.
template <int kWidth, int... kLane>
TRIREME_INLINE void ExchangeInPart(Part<float>& a, Part<float>& b,
                                   std::integer_sequence<int, kLane...>) {
  const Part<float> low = __builtin_shufflevector(
      a, b, ((kLane & kWidth) == 0 ? kLane : kLane - kWidth + kPartLanes)...);
  b = __builtin_shufflevector(a, b,
                              ((kLane & kWidth) == 0 ? kLane + kWidth : kLane + kPartLanes)...);
  a = low;
}
template <int kWidth>
TRIREME_INLINE void Exchange(F32& a, F32& b) {
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA {
    if constexpr (kWidth < kPartLanes) {
      ExchangeInPart<kWidth>(a.part[i], b.part[i], std::make_integer_sequence<int, kPartLanes>{});
    } else if constexpr ((i & (kWidth / kPartLanes)) == 0) {
      const Part<float> part = a.part[i + kWidth / kPartLanes];
      a.part[i + kWidth / kPartLanes] = b.part[i];
      b.part[i] = part;
    }
  });
}
// Lane j of row i becomes lane i of row j.
TRIREME_INLINE void Transpose(F32 (&rows)[kLanes]) {
  Unroll<4>([&](auto step) TRIREME_INLINE_LAMBDA {
    constexpr int kWidth = 8 >> step;
    Unroll<kLanes>([&](auto i) TRIREME_INLINE_LAMBDA {
      if constexpr ((i & kWidth) == 0) Exchange<kWidth>(rows[i], rows[i + kWidth]);
    });
  });
}

}  // namespace trireme::cpu::TRIREME_ISA
