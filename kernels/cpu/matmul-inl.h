// One panel of columns against a block of rows. Every element of y is one chain of multiply-adds in
// the order of k, in every instruction set and for every number of rows: that is what makes a row's
// result independent of the batch. Part of isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

// Rows and 16-column vectors of sums that fit the registers: AVX-512 and Arm 6 x 4 (24 of 32, in
// 16-float units on AVX-512); AVX2 6 x 1 (12 of 16 halves); SSE 2 x 1 (8 of 16 quarters).
#if defined(__AVX512F__)
inline constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
inline constexpr int kTileRows = 6, kTileVectors = 1;
#else
inline constexpr int kTileRows = 2, kTileVectors = 1;
#endif
inline constexpr int64_t kPanelVectors = kPanelColumns / kLanes;

// Two k's of a column side by side.
template <typename W>
inline constexpr bool kInPairs = kDTypeOf<W> == DType::kBF16 || kDTypeOf<W> == DType::kE4M3;

// sums[r][v] += x[r][k] * w[k][v] for k in [0, count). w walks kPanelColumns elements a k.
template <typename W, int kRows, int kVectors>
TRIREME_INLINE void Multiply(const float* x, int64_t x_stride, const W* w, int64_t count,
                             F32 (&sums)[kRows][kVectors]) {
  for (int64_t k = 0; k < count; ++k, w += kPanelColumns) {
    F32 b[kVectors];
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA { b[v] = Load(w + v * kLanes); });
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      const F32 a = Splat(x[r * x_stride + k]);
      Unroll<kVectors>([&](auto v)
                           TRIREME_INLINE_LAMBDA { sums[r][v] = MulAdd(a, b[v], sums[r][v]); });
    });
  }
}

// The same over pairs of bf16: [k / 2][column][2].
template <int kRows, int kVectors>
TRIREME_INLINE void Multiply(const float* x, int64_t x_stride, const BF16* w, int64_t count,
                             F32 (&sums)[kRows][kVectors]) {
  const auto half = [&](int64_t k, auto odd) TRIREME_INLINE_LAMBDA {
    F32 b[kVectors];
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
      const U32 both = LoadBits(w + v * 2 * kLanes);
      b[v] = odd ? (F32)(both & 0xffff0000u) : (F32)(both << 16);
    });
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      const F32 a = Splat(x[r * x_stride + k]);
      Unroll<kVectors>([&](auto v)
                           TRIREME_INLINE_LAMBDA { sums[r][v] = MulAdd(a, b[v], sums[r][v]); });
    });
  };
  int64_t k = 0;
  for (; k + 1 < count; k += 2, w += 2 * kPanelColumns) {
    half(k, Index<0>{});
    half(k + 1, Index<1>{});
  }
  if (k < count) half(k, Index<0>{});
}

// Pairs of e4m3 [k / 2][column][2] of 16 columns: q / 256 of the even k and of the odd one. Shifted
// into a 16-bit float the code is that, and the conversion takes its subnormal numbers as fast as
// others and whatever the processor is told to do with them in arithmetic.
TRIREME_INLINE void LoadPairs(const E4M3* p, F32& even, F32& odd) {
#if defined(__AVX512F__)
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
  const __m256i low = _mm256_slli_epi16(both, 8);
  even.part[0] = (Part<float>)_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(low, 1), kept));
  odd.part[0] = (Part<float>)_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(both, 1), kept));
#elif defined(__AVX2__)
  const __m128i kept = _mm_set1_epi16(static_cast<int16_t>(0xbf80));
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * 2 * kPartLanes));
    const __m128i low = _mm_slli_epi16(both, 8);
    even.part[i] = (Part<float>)_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(low, 1), kept));
    odd.part[i] = (Part<float>)_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(both, 1), kept));
  });
#else
  // Subnormal codes: with the exponent of the smallest normal one and an implicit one, which is
  // then subtracted.
  const auto value = [](Part<uint32_t> magnitude, Part<uint32_t> sign) TRIREME_INLINE_LAMBDA {
    magnitude &= 0x07f00000u;
    const Part<uint32_t> normal = magnitude + (112u << 23);
    const Part<float> small = (Part<float>)(magnitude + (113u << 23)) - 0x1p-14f;
    const Part<uint32_t> bits = magnitude < (1u << 23) ? (Part<uint32_t>)small : normal;
    return (Part<float>)(bits | (sign & 0x80000000u));
  };
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA {
    HalfPart h;
    __builtin_memcpy(&h, p + i * 2 * kPartLanes, sizeof(h));
    const Part<uint32_t> both = __builtin_convertvector(h, Part<uint32_t>);
    even.part[i] = value(both << 20, both << 24);
    odd.part[i] = value(both << 12, both << 16);
  });
#endif
}

// Two k's of a panel, some thousand cycles ahead. Where codes are expanded, so few loads fit into
// the processor's window that they alone do not keep memory busy.
TRIREME_INLINE void Prefetch(const E4M3* w) {
  constexpr int64_t kAhead = 4096;
  __builtin_prefetch(w + kAhead);
  __builtin_prefetch(w + kAhead + 64);
}

template <int kRows, int kVectors>
TRIREME_INLINE void Multiply(const float* x, int64_t x_stride, const E4M3* w, int64_t count,
                             F32 (&sums)[kRows][kVectors]) {
  const auto step = [&](int64_t k, auto pair) TRIREME_INLINE_LAMBDA {
    Prefetch(w);
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
      F32 even, odd;
      LoadPairs(w + v * 2 * kLanes, even, odd);
      Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
        const float* at = x + r * x_stride + k;
        sums[r][v] = MulAdd(Splat(at[0]), even, sums[r][v]);
        if constexpr (pair == 2) sums[r][v] = MulAdd(Splat(at[1]), odd, sums[r][v]);
      });
    });
  };
  int64_t k = 0;
  for (; k + 1 < count; k += 2, w += 2 * kPanelColumns) step(k, Index<2>{});
  if (k < count) step(k, Index<1>{});
}

#if defined(__AVX512BF16__)
TRIREME_INLINE __m512i PairsOf(const BF16* p) { return _mm512_loadu_si512(p); }
// Shifted into a bf16, whose exponent takes 112 more: bits that a code's exponent has not. Those
// without an exponent from a table, for the dot product reads subnormal numbers as zero.
TRIREME_INLINE __m512i PairsOf(const E4M3* p) {
  const __m512i code =
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i shifted = _mm512_slli_epi16(code, 4);
  constexpr int kAAndBOrC = 0xea, kAOrBAndC = 0xf8;
  const __m512i normal = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(0x07f0),
                                                   _mm512_set1_epi16(112 << 7), kAAndBOrC);
  const __m512i small = _mm512_zextsi128_si512(
      _mm_setr_epi16(0, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860));
  const __mmask32 without = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
  const __m512i magnitude = _mm512_mask_permutexvar_epi16(normal, without, code, small);
  return _mm512_ternarylogic_epi32(magnitude, shifted,
                                   _mm512_set1_epi16(static_cast<int16_t>(0x8000)), kAOrBAndC);
}

template <typename W, int kRows, int kVectors>
TRIREME_INLINE void Multiply(const BF16* x, int64_t x_stride, const W* w, int64_t count,
                             F32 (&sums)[kRows][kVectors]) {
  const auto step = [&](int64_t k, auto load_pair) TRIREME_INLINE_LAMBDA {
    __m512bh b[kVectors];
    if constexpr (kDTypeOf<W> == DType::kE4M3) Prefetch(w);
    Unroll<kVectors>([&](auto v)
                         TRIREME_INLINE_LAMBDA { b[v] = (__m512bh)PairsOf(w + v * 2 * kLanes); });
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(load_pair(x + r * x_stride + k));
      Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
        Part<float>& sum = sums[r][v].part[0];
        sum = (Part<float>)_mm512_dpbf16_ps((__m512)sum, b[v], a);
      });
    });
  };
  int64_t k = 0;
  for (; k + 1 < count; k += 2, w += 2 * kPanelColumns) {
    step(k, [](const BF16* p) TRIREME_INLINE_LAMBDA {
      int32_t pair;
      __builtin_memcpy(&pair, p, sizeof(pair));
      return pair;
    });
  }
  if (k < count) step(k, [](const BF16* p) TRIREME_INLINE_LAMBDA { return int32_t{p->bits}; });
}
#endif

// Adds one stretch of k to the sums [kRows, kPanelColumns] in memory.
template <int kRows, typename X, typename W>
[[gnu::noinline]] void Tile(const X* x, int64_t x_stride, const W* w, int64_t count, float* sums) {
  constexpr int kVectors = kRows == 1 ? kPanelVectors : kTileVectors;
  constexpr int kInterleave = kInPairs<W> ? 2 : 1;
  for (int64_t first = 0; first < kPanelVectors; first += kVectors) {
    F32 tile[kRows][kVectors];
    float* at = sums + first * kLanes;
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
        tile[r][v] = Load(at + r * kPanelColumns + v * kLanes);
      });
    });
    Multiply(x, x_stride, w + first * kLanes * kInterleave, count, tile);
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
        Store(at + r * kPanelColumns + v * kLanes, tile[r][v]);
      });
    });
  }
}

template <typename X, typename W>
TRIREME_INLINE void TileOf(int64_t rows, const X* x, int64_t x_stride, const W* w, int64_t count,
                           float* sums) {
  switch (rows) {
    case 1:
      return Tile<1>(x, x_stride, w, count, sums);
    case 2:
      return Tile<2>(x, x_stride, w, count, sums);
    case 3:
      return Tile<3>(x, x_stride, w, count, sums);
    case 4:
      return Tile<4>(x, x_stride, w, count, sums);
    case 5:
      return Tile<5>(x, x_stride, w, count, sums);
    default:
      return Tile<6>(x, x_stride, w, count, sums);
  }
}

// weights(k, count) gives those of `count` k's from k on.
template <typename X, typename W, typename F>
TRIREME_INLINE void SumStretches(const MatMulPanel& panel, float* sums, F&& weights) {
  const X* x = static_cast<const X*>(panel.x);
  __builtin_memset(sums, 0, panel.rows * kPanelColumns * sizeof(float));
  constexpr int64_t kStretch = kStretchBytes / (kPanelColumns * static_cast<int64_t>(sizeof(W)));
  for (int64_t k = 0; k < panel.k; k += kStretch) {
    const int64_t count = Min(kStretch, panel.k - k);
    const W* w = weights(k, count);
    for (int64_t r = 0; r < panel.rows; r += kTileRows) {
      TileOf(Min(kTileRows, panel.rows - r), x + r * panel.x_stride + k, panel.x_stride, w, count,
             sums + r * kPanelColumns);
    }
  }
}

template <typename X, typename W>
inline void PanelSums(const MatMulPanel& panel, float* sums) {
  SumStretches<X, W>(panel, sums, [&](int64_t k, int64_t) TRIREME_INLINE_LAMBDA {
    return static_cast<const W*>(panel.weights) + k * kPanelColumns;
  });
}

// Weights [pairs][kPanelColumns][2] as bf16.
inline void Expand(const E4M3* from, int64_t pairs, BF16* to) {
  for (int64_t i = 0; i < pairs * 2 * kPanelColumns; i += 2 * kLanes) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to + i, PairsOf(from + i));
#else
    F32 even, odd;
    LoadPairs(from + i, even, odd);
    const U32 both = ((U32)even >> 16) | (U32)odd;
    Store(reinterpret_cast<float*>(to + i), (F32)both);
#endif
  }
}

// Rows that expand the weights as they go, in each pass of kTileRows over them: as cheap as storing
// and loading them expanded.
inline constexpr int64_t kExpandingRows = 6 * kTileRows;

// More rows pass over a stretch that has been expanded behind the sums: the same numbers in the
// same order.
template <typename X>
inline void PanelSumsE4M3(const MatMulPanel& panel, float* sums) {
  if (panel.rows <= kExpandingRows) return PanelSums<X, E4M3>(panel, sums);
  BF16* expanded = reinterpret_cast<BF16*>(sums + panel.rows * kPanelColumns);
  SumStretches<X, BF16>(panel, sums, [&](int64_t k, int64_t count) TRIREME_INLINE_LAMBDA {
    Expand(static_cast<const E4M3*>(panel.weights) + k * kPanelColumns, (count + 1) / 2, expanded);
    return static_cast<const BF16*>(expanded);
  });
}

template <typename Y, typename B>
TRIREME_INLINE void FinishRows(const MatMulPanel& panel, const B* bias, const float* sums) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    Y* y = Row<Y>(panel.y, r);
    for (int64_t c = 0; c < panel.columns; c += kLanes) {
      const int64_t n = panel.columns - c;
      F32 value = Load(sums + r * kPanelColumns + c);
      if (panel.scales != nullptr) value *= Load(panel.scales + c);
      if (bias != nullptr) value += Load(bias + c, n);
      Store(y + c, value, n);
    }
  }
}

inline void MatMulPanelRows(const MatMulPanel& panel, float* sums) {
  if (panel.weight_type == DType::kF32) {
    PanelSums<float, float>(panel, sums);
  } else if (panel.weight_type == DType::kF16) {
    PanelSums<float, F16>(panel, sums);
#if defined(__AVX512BF16__)
  } else if (panel.weight_type == DType::kBF16) {
    PanelSums<BF16, BF16>(panel, sums);
  } else if (panel.x_type == DType::kBF16) {
    PanelSumsE4M3<BF16>(panel, sums);
#else
  } else if (panel.weight_type == DType::kBF16) {
    PanelSums<float, BF16>(panel, sums);
#endif
  } else {
    PanelSumsE4M3<float>(panel, sums);
  }
  DispatchFloat(panel.bias.data != nullptr ? panel.bias.dtype : panel.y.dtype, [&](auto b) {
    using B = decltype(b);
    const B* bias = static_cast<const B*>(panel.bias.data);
    if (panel.y.dtype == DType::kF32) {
      FinishRows<float>(panel, bias, sums);
    } else {
      FinishRows<B>(panel, bias, sums);
    }
  });
}

}  // namespace trireme::cpu::TRIREME_ISA
