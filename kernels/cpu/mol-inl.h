// Mixture-of-Logits: a block of 32 items against one query. An item is a lane and everything it
// needs happens in that lane, in the order of the inner dimension: its score's bits cannot depend
// on its neighbours, so tiles, compaction and padding are free to choose. Part of
// isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

// Vectors of 16 lanes and query components whose sums fit the registers: AVX-512 2 x 8 (16 of 32),
// AVX2 1 x 4 (8 of 16 halves), SSE 1 x 1 (4 of 16 quarters).
#if defined(__AVX512F__)
inline constexpr int kMolVectors = 2, kMolTile = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
inline constexpr int kMolVectors = 1, kMolTile = 4;
#else
inline constexpr int kMolVectors = 1, kMolTile = 2;
#endif
inline constexpr int kMolVectorsPerBlock = kMolLanes / kLanes;

template <typename F>
TRIREME_INLINE void DispatchMolElement(MolElement element, F&& f) {
  switch (element) {
    case MolElement::kBF16:
      return f(BF16{});
    case MolElement::kInt8:
      return f(int8_t{});
    default:
      return f(float{});
  }
}

// e^x for |x| <= 80, and that of the bound beyond; relative error below 5e-7, and 1 at 0. Two
// thirds of Exp's steps: beside its multiply-adds a pair is exponentials (192 of them at 8x4x64).
TRIREME_INLINE F32 GateExp(F32 x) {
  const F32 bounded = Smaller(Splat(80.0f), Larger(Splat(-80.0f), x));  // NaN stays
  const F32 magic = Splat(12582912.0f);                                 // as in Exp
  const F32 shifted = MulAdd(bounded, Splat(1.44269504088896341f), magic);
  const F32 r = MulAdd(shifted - magic, Splat(-0.693147180559945f), bounded);
  // The polynomial of least relative error for |r| <= ln2 / 2: 9e-8.
  F32 p = Splat(8.290272e-3f);
  p = MulAdd(p, r, Splat(4.189804e-2f));
  p = MulAdd(p, r, Splat(0.16667639f));
  p = MulAdd(p, r, Splat(0.49999148f));
  p = MulAdd(p, r, Splat(0.9999997f));
  p = MulAdd(p, r, Splat(1.0f));
  return (F32)((I32)p + ((I32)shifted << 23));
}

TRIREME_INLINE F32 SiluOf(F32 x) { return x / (GateExp(-x) + 1.0f); }

TRIREME_INLINE uint32_t NotBelow(Part<float> x, Part<float> floor) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)floor, _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)floor, _CMP_NLT_UQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kPartLanes; ++i) bits |= uint32_t{!(x[i] < floor[i])} << i;
  return bits;
#endif
}
// Bit i: lane i is not below `floor` (NaN counts as not below: it is sorted out with the score).
TRIREME_INLINE uint32_t NotBelow(F32 x, F32 floor) {
  uint32_t bits = 0;
  Unroll<kParts>([&](auto i) TRIREME_INLINE_LAMBDA {
    bits |= NotBelow(x.part[i], floor.part[i]) << (i * kPartLanes);
  });
  return bits;
}

// sums[q][v] = <query row q, item vector> in the lanes of vector v, one chain over the dimension.
template <int kQueries, int kVectors, typename T>
TRIREME_INLINE void Dots(const T* x, const float* query, int64_t dim,
                         F32 (&sums)[kQueries][kVectors]) {
  Unroll<kQueries>([&](auto q) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA { sums[q][v] = F32{}; });
  });
  for (int64_t k = 0; k < dim; ++k, x += kMolLanes) {
    F32 b[kVectors];
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA { b[v] = Load(x + v * kLanes); });
    Unroll<kQueries>([&](auto q) TRIREME_INLINE_LAMBDA {
      const F32 a = Splat(query[q * dim + k]);
      Unroll<kVectors>([&](auto v)
                           TRIREME_INLINE_LAMBDA { sums[q][v] = MulAdd(a, b[v], sums[q][v]); });
    });
  }
}

// Logits of kQueries query components with item component m, from vector `first` on.
template <int kQueries, int kVectors, typename T>
[[gnu::noinline]] void LogitTile(const MolLogitsArgs& args, int64_t n, int64_t m, int64_t first,
                                 F32* largest) {
  const T* x = static_cast<const T*>(args.components) + m * args.dim * kMolLanes + first * kLanes;
  F32 sums[kQueries][kVectors];
  Dots(x, args.query + n * args.dim, args.dim, sums);
  F32 scale[kVectors];
  Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
    scale[v] = Splat(args.inverse_temperature);
    if constexpr (sizeof(T) == 1)
      scale[v] *= Load(args.scales + m * kMolLanes + (first + v) * kLanes);
  });
  Unroll<kQueries>([&](auto q) TRIREME_INLINE_LAMBDA {
    const int64_t l = (n + q) * args.item_components + m;
    float* out = args.logits + l * kMolLanes + first * kLanes;
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
      const F32 logit = sums[q][v] * scale[v];
      largest[first + v] = Larger(logit, largest[first + v]);
      Store(out + v * kLanes, logit);
    });
  });
}

template <int kQueries, typename T>
TRIREME_INLINE void LogitTiles(const MolLogitsArgs& args, int64_t n, int64_t m, F32* largest) {
  for (int64_t v = 0; v < kMolVectorsPerBlock; v += kMolVectors) {
    LogitTile<kQueries, kMolVectors, T>(args, n, m, v, largest);
  }
}

// The same for paired components [m, m + kPairs), each with vectors of its own: several chains at a
// time, as above, to hide the latency of multiply-add.
template <int kPairs, int kVectors, typename T>
[[gnu::noinline]] void PairedTile(const MolLogitsArgs& args, int64_t m, int64_t first,
                                  F32* largest) {
  const T* x = static_cast<const T*>(args.components) + m * args.dim * kMolLanes + first * kLanes;
  const float* query = args.query + m * args.dim;
  F32 sums[kPairs][kVectors];
  Unroll<kPairs>([&](auto p) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA { sums[p][v] = F32{}; });
  });
  for (int64_t k = 0; k < args.dim; ++k) {
    Unroll<kPairs>([&](auto p) TRIREME_INLINE_LAMBDA {
      const F32 a = Splat(query[p * args.dim + k]);
      const T* at = x + (p * args.dim + k) * kMolLanes;
      Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
        sums[p][v] = MulAdd(a, Load(at + v * kLanes), sums[p][v]);
      });
    });
  }
  Unroll<kPairs>([&](auto p) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA {
      const int64_t lane = (first + v) * kLanes;
      F32 scale = Splat(args.inverse_temperature);
      if constexpr (sizeof(T) == 1) scale *= Load(args.scales + (m + p) * kMolLanes + lane);
      const F32 logit = sums[p][v] * scale;
      largest[first + v] = Larger(logit, largest[first + v]);
      Store(args.logits + (m + p) * kMolLanes + lane, logit);
    });
  });
}

template <int kPairs, typename T>
TRIREME_INLINE void PairedTiles(const MolLogitsArgs& args, int64_t m, F32* largest) {
  for (int64_t v = 0; v < kMolVectorsPerBlock; v += kMolVectors) {
    PairedTile<kPairs, kMolVectors, T>(args, m, v, largest);
  }
}

template <typename T>
TRIREME_INLINE void AllLogits(const MolLogitsArgs& args, F32* largest) {
  const int64_t components = args.query_components;
  if (args.diagonal) {
    int64_t m = 0;
    for (; m + kMolTile <= components; m += kMolTile) PairedTiles<kMolTile, T>(args, m, largest);
    for (; m < components; ++m) PairedTiles<1, T>(args, m, largest);
    return;
  }
  for (int64_t m = 0; m < args.item_components; ++m) {
    int64_t n = 0;
    for (; n + kMolTile <= components; n += kMolTile) LogitTiles<kMolTile, T>(args, n, m, largest);
    if constexpr (kMolTile > 4) {
      for (; n + 4 <= components; n += 4) LogitTiles<4, T>(args, n, m, largest);
    }
    if constexpr (kMolTile > 2) {
      for (; n + 2 <= components; n += 2) LogitTiles<2, T>(args, n, m, largest);
    }
    for (; n < components; ++n) LogitTiles<1, T>(args, n, m, largest);
  }
}

// The bits of the lanes that survive the floor.
inline uint32_t MolLogits(const MolLogitsArgs& args) {
  F32 largest[kMolVectorsPerBlock];
  for (F32& v : largest) v = Splat(-__builtin_inff());
  DispatchMolElement(args.element, [&](auto zero) { AllLogits<decltype(zero)>(args, largest); });
  uint32_t survivors = 0;
  for (int v = 0; v < kMolVectorsPerBlock; ++v) {
    survivors |= NotBelow(largest[v], Splat(args.floor)) << (v * kLanes);
  }
  return survivors;
}

// masks[l], bit i: logit l of lane i is not below floors[l].
inline void MolAbove(const float* logits, const float* floors, int64_t count, uint32_t* masks) {
  for (int64_t l = 0; l < count; ++l) {
    masks[l] = 0;
    for (int v = 0; v < kMolVectorsPerBlock; ++v) {
      masks[l] |= NotBelow(Load(logits + l * kMolLanes + v * kLanes), Splat(floors[l]))
                  << (v * kLanes);
    }
  }
}

// kOutputs neighbouring outputs of a layer for kVectors vectors of lanes; finish(output, v, sum).
template <int kOutputs, int kVectors, typename F>
TRIREME_INLINE void LayerTile(const MolGateLayer& layer, const float* in, int64_t output,
                              int64_t first, F&& finish) {
  const float* w =
      layer.weights + output / kMolGateTile * kMolGateTile * layer.inputs + output % kMolGateTile;
  F32 sums[kOutputs][kVectors];
  Unroll<kOutputs>([&](auto o) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto v)
                         TRIREME_INLINE_LAMBDA { sums[o][v] = Splat(layer.bias[output + o]); });
  });
  const float* x = in + first * kLanes;
  for (int64_t i = 0; i < layer.inputs; ++i, w += kMolGateTile, x += kMolLanes) {
    F32 b[kVectors];
    Unroll<kVectors>([&](auto v) TRIREME_INLINE_LAMBDA { b[v] = Load(x + v * kLanes); });
    Unroll<kOutputs>([&](auto o) TRIREME_INLINE_LAMBDA {
      const F32 a = Splat(w[o]);
      Unroll<kVectors>([&](auto v)
                           TRIREME_INLINE_LAMBDA { sums[o][v] = MulAdd(a, b[v], sums[o][v]); });
    });
  }
  Unroll<kOutputs>([&](auto o) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto v)
                         TRIREME_INLINE_LAMBDA { finish(output + o, first + v, sums[o][v]); });
  });
}

// All outputs, the padding up to a multiple of kMolGateTile included.
template <typename F>
TRIREME_INLINE void Layer(const MolGateLayer& layer, const float* in, F&& finish) {
  for (int64_t o = 0; o < layer.outputs; o += kMolTile) {
    for (int64_t v = 0; v < kMolVectorsPerBlock; v += kMolVectors) {
      LayerTile<kMolTile, kMolVectors>(layer, in, o, v, finish);
    }
  }
}

// Gate value g of the items in the lanes of vector v, held as G.
template <typename G>
TRIREME_INLINE F32 ItemGate(const MolGateArgs& args, int64_t g, int64_t v) {
  F32 x = Load(static_cast<const G*>(args.item_gate) + g * kMolLanes + v * kLanes);
  if constexpr (sizeof(G) == 1) x *= Load(args.item_gate_scales + v * kLanes);
  return x;
}

// hidden [H, 32]: what the output layer works on.
template <typename G>
TRIREME_INLINE const float* HiddenUnits(const MolGateArgs& args, float* hidden) {
  if (args.concat) {
    for (int64_t h = 0; h < args.output.inputs; ++h) {
      for (int v = 0; v < kMolVectorsPerBlock; ++v) {
        const int64_t at = h * kMolLanes + v * kLanes;
        Store(hidden + at, Larger(ItemGate<G>(args, h, v) + args.query_gate[h], F32{}));
      }
    }
    return hidden;
  }
  if (args.hidden.outputs == 0) return args.logits;
  Layer(args.hidden, args.logits, [&](int64_t h, int64_t v, F32 sum) TRIREME_INLINE_LAMBDA {
    Store(hidden + h * kMolLanes + v * kLanes, SiluOf(sum));
  });
  return hidden;
}

// weights [L, 32]: what the softmax is taken of.
template <typename G>
[[gnu::noinline]] void GateWeights(const MolGateArgs& args, float* hidden, float* weights) {
  const float* in = HiddenUnits<G>(args, hidden);
  const int64_t logits = args.output.outputs;
  Layer(args.output, in, [&](int64_t l, int64_t v, F32 sum) TRIREME_INLINE_LAMBDA {
    const int64_t at = l * kMolLanes + v * kLanes;
    if (!args.concat && l < logits) {
      sum = SiluOf(MulAdd(Splat(args.query_gate[l]), ItemGate<G>(args, l, v), sum));
    }
    Store(weights + at, sum);
  });
}

inline void MolGate(const MolGateArgs& args) {
  const int64_t logits = args.output.outputs;
  float* weights = args.scratch;
  float* hidden = weights + (logits + kMolGateTile) * kMolLanes;
  DispatchMolElement(args.item_gate_element,
                     [&](auto zero) { GateWeights<decltype(zero)>(args, hidden, weights); });
  for (int v = 0; v < kMolVectorsPerBlock; ++v) {
    const float* w = weights + v * kLanes;
    const float* s = args.logits + v * kLanes;
    F32 top = Load(w);
    for (int64_t l = 1; l < logits; ++l) top = Larger(Load(w + l * kMolLanes), top);
    F32 total = {}, score = {};
    for (int64_t l = 0; l < logits; ++l) {
      const F32 e = GateExp(Load(w + l * kMolLanes) - top);
      total += e;
      score = MulAdd(e, Load(s + l * kMolLanes), score);
    }
    Store(args.scores + v * kLanes, score / total);
  }
}

inline void MolDot(const MolDotArgs& args) {
  DispatchMolElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(args.vectors);
    F32 sums[1][kMolVectorsPerBlock];
    Dots(x, args.query, args.dim, sums);
    for (int v = 0; v < kMolVectorsPerBlock; ++v) {
      F32 sum = sums[0][v];
      if constexpr (sizeof(T) == 1) sum *= Load(args.scales + v * kLanes);
      float* out = args.sums + v * kLanes;
      Store(out, Load(out) + sum);
    }
  });
}

inline void SiluRow(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) Store(x + i, SiluOf(Load(x + i, n - i)), n - i);
}

inline void L2NormalizeVector(float* x, int64_t n, float eps) {
  F32 squares = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = Load(x + i, n - i);
    squares = MulAdd(v, v, squares);
  }
  const float norm = __builtin_sqrtf(Sum(squares));
  const float bounded = norm > eps ? norm : eps;
  const F32 divisor = Splat(bounded <= __FLT_MAX__ ? bounded : __builtin_nanf(""));
  for (int64_t i = 0; i < n; i += kLanes) Store(x + i, Load(x + i, n - i) / divisor, n - i);
}

}  // namespace trireme::cpu::TRIREME_ISA
