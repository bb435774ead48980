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

// Bytes of a panel that stay in the second-level cache while all row blocks pass over them: a
// quarter of 1 MiB. Sums are kept in float between such stretches of k, which changes no bit.
inline constexpr int64_t kStretchBytes = 256 * 1024;

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

#if defined(__AVX512BF16__)
template <int kRows, int kVectors>
TRIREME_INLINE void Multiply(const BF16* x, int64_t x_stride, const BF16* w, int64_t count,
                             F32 (&sums)[kRows][kVectors]) {
  const auto step = [&](int64_t k, auto load_pair) TRIREME_INLINE_LAMBDA {
    __m512bh b[kVectors];
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
      b[v] = (__m512bh)_mm512_loadu_si512(w + v * 2 * kLanes);
    });
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
  constexpr int kInterleave = kDTypeOf<W> == DType::kBF16 ? 2 : 1;
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

template <typename X, typename W>
inline void PanelSums(const MatMulPanel& panel, float* sums) {
  const X* x = static_cast<const X*>(panel.x);
  const W* w = static_cast<const W*>(panel.weights);
  __builtin_memset(sums, 0, panel.rows * kPanelColumns * sizeof(float));
  constexpr int64_t kStretch = kStretchBytes / (kPanelColumns * static_cast<int64_t>(sizeof(W)));
  for (int64_t k = 0; k < panel.k; k += kStretch) {
    const int64_t count = Min(kStretch, panel.k - k);
    for (int64_t r = 0; r < panel.rows; r += kTileRows) {
      TileOf(Min(kTileRows, panel.rows - r), x + r * panel.x_stride + k, panel.x_stride,
             w + k * kPanelColumns, count, sums + r * kPanelColumns);
    }
  }
}

template <typename Y, typename B>
TRIREME_INLINE void FinishRows(const MatMulPanel& panel, const B* bias, const float* sums) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    Y* y = Row<Y>(panel.y, r);
    for (int64_t c = 0; c < panel.columns; c += kLanes) {
      const int64_t n = panel.columns - c;
      F32 value = Load(sums + r * kPanelColumns + c);
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
  } else {
#if defined(__AVX512BF16__)
    PanelSums<BF16, BF16>(panel, sums);
#else
    PanelSums<float, BF16>(panel, sums);
#endif
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
