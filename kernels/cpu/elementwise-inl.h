// Norms, sums, SiLU and rotary embedding over rows. Part of isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

// The sum of f(i) over vectors of lanes from 0 on: f gives zeros beyond n.
template <typename F>
TRIREME_INLINE float SumOver(int64_t n, F&& f) {
  F32 even = {}, odd = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    even = f(i, even);
    if (i + kLanes < n) odd = f(i + kLanes, odd);
  }
  return Sum(even + odd);
}

template <typename T>
TRIREME_INLINE float InverseRms(const T* x, int64_t n, float eps) {
  const float squares = SumOver(n, [&](int64_t i, F32 sum) TRIREME_INLINE_LAMBDA {
    const F32 a = Load(x + i, n - i);
    return MulAdd(a, a, sum);
  });
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
}

// The first n lanes of x less the mean; the others are zero.
template <typename T>
TRIREME_INLINE F32 Deviation(const T* x, F32 mean, int64_t n) {
  const F32 d = Load(x, n) - mean;
  return n >= kLanes ? d : Select(Lanes() < Splat(static_cast<float>(n)), d, F32{});
}

template <typename T>
TRIREME_INLINE void RmsNormRow(const T* x, const T* weight, int64_t n, float eps, T* out) {
  const F32 scale = Splat(InverseRms(x, n, eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    Store(out + i, Load(x + i, n - i) * scale * Load(weight + i, n - i), n - i);
  }
}

// bias may be null.
template <typename T>
TRIREME_INLINE void LayerNormRow(const T* x, const T* weight, const T* bias, int64_t n, float eps,
                                 T* out) {
  const float sum = SumOver(
      n, [&](int64_t i, F32 part) TRIREME_INLINE_LAMBDA { return part + Load(x + i, n - i); });
  const F32 mean = Splat(sum / static_cast<float>(n));
  const float squares = SumOver(n, [&](int64_t i, F32 part) TRIREME_INLINE_LAMBDA {
    const F32 d = Deviation(x + i, mean, n - i);
    return MulAdd(d, d, part);
  });
  const F32 scale = Splat(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 shift = bias != nullptr ? Load(bias + i, n - i) : F32{};
    const F32 unit = (Load(x + i, n - i) - mean) * scale;
    Store(out + i, MulAdd(unit, Load(weight + i, n - i), shift), n - i);
  }
}

template <typename T>
TRIREME_INLINE void NormRow(const T* x, const NormParams& norm, int64_t n, T* out) {
  const T* weight = static_cast<const T*>(norm.weight.data);
  if (norm.kind == NormKind::kRms) {
    RmsNormRow(x, weight, n, norm.eps, out);
  } else {
    LayerNormRow(x, weight, static_cast<const T*>(norm.bias.data), n, norm.eps, out);
  }
}

template <typename T>
TRIREME_INLINE void AddRow(T* x, const T* delta, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Store(x + i, Load(x + i, n - i) + Load(delta + i, n - i), n - i);
  }
}

inline void NormRows(ConstTensorView x, const NormParams& norm, TensorView out, int64_t begin,
                     int64_t end) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t)
      NormRow(Row<T>(x, t), norm, x.shape.dims[1], Row<T>(out, t));
  });
}

inline void AddNormRows(TensorView residual, ConstTensorView delta, const NormParams& norm,
                        TensorView out, int64_t begin, int64_t end) {
  const int64_t n = residual.shape.dims[1];
  DispatchFloat(residual.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      AddRow(Row<T>(residual, t), Row<T>(delta, t), n);
      NormRow(static_cast<const T*>(Row<T>(residual, t)), norm, n, Row<T>(out, t));
    }
  });
}

inline void AddRows(TensorView x, ConstTensorView delta, int64_t begin, int64_t end) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) AddRow(Row<T>(x, t), Row<T>(delta, t), x.shape.dims[1]);
  });
}

inline void GeluRows(TensorView x, int64_t begin, int64_t end) {
  constexpr float kScale = -1.5957691216057308f, kCubic = 0.044715f;  // -2 sqrt(2 / pi)
  const int64_t n = x.shape.dims[1];
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      T* row = Row<T>(x, t);
      for (int64_t i = 0; i < n; i += kLanes) {
        const F32 a = Load(row + i, n - i);
        const F32 power = Exp(MulAdd(a * a * a, Splat(kCubic), a) * kScale);
        // Exp has an upper bound, which x below it would show.
        const F32 divisor = Select(a < Splat(-16.0f), Splat(__builtin_inff()), power + 1.0f);
        Store(row + i, a / divisor, n - i);
      }
    }
  });
}

inline void SiluAndMulRows(ConstTensorView gate_up, TensorView out, int64_t begin, int64_t end) {
  const int64_t n = out.shape.dims[1];
  DispatchFloat(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      const T* gate = Row<T>(gate_up, t);
      const T* up = gate + n;
      T* y = Row<T>(out, t);
      for (int64_t i = 0; i < n; i += kLanes) {
        const F32 g = Load(gate + i, n - i);
        Store(y + i, g / (Exp(-g) + 1.0f) * Load(up + i, n - i), n - i);
      }
    }
  });
}

// One head: RMSNorm if `norm` is there, rotation of element i with i + d / 2, into `out` (which may
// be x).
template <typename T>
TRIREME_INLINE void RotateHead(const T* x, const T* norm, float eps, const float* cos_sin,
                               int64_t d, T* out) {
  const int64_t half = d / 2;
  const F32 scale = Splat(norm != nullptr ? InverseRms(x, d, eps) : 1.0f);
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    F32 low = Load(x + i, n), high = Load(x + half + i, n);
    if (norm != nullptr) {
      low = low * scale * Load(norm + i, n);
      high = high * scale * Load(norm + half + i, n);
    }
    const F32 cos = Load(cos_sin + i, n), sin = Load(cos_sin + half + i, n);
    Store(out + i, low * cos - high * sin, n);
    Store(out + half + i, high * cos + low * sin, n);
  }
}

inline void RopeAndStoreKvRows(const RopeRows& rope, int64_t begin, int64_t end) {
  const int64_t page_size = rope.k.shape.dims[1], kv_heads = rope.k.shape.dims[2];
  const int64_t d = rope.k.shape.dims[3];
  DispatchFloat(rope.qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* q_norm = static_cast<const T*>(rope.q_norm.data);
    const T* k_norm = static_cast<const T*>(rope.k_norm.data);
    for (int64_t t = begin; t < end; ++t) {
      T* row = Row<T>(rope.qkv, t);
      const float* angles =
          Row<float>(rope.cos_sin, static_cast<const int32_t*>(rope.positions.data)[t]);
      for (int64_t h = 0; h < rope.q_heads; ++h) {
        RotateHead(row + h * d, q_norm, rope.norm_eps, angles, d, row + h * d);
      }
      const int64_t slot = static_cast<const int64_t*>(rope.slot_mapping.data)[t];
      if (slot < 0) continue;
      const int64_t offset = slot % page_size * kv_heads * d;
      T* k = Row<T>(rope.k, slot / page_size) + offset;
      T* v = Row<T>(rope.v, slot / page_size) + offset;
      const T* k_in = row + rope.q_heads * d;
      for (int64_t h = 0; h < kv_heads; ++h) {
        RotateHead(k_in + h * d, k_norm, rope.norm_eps, angles, d, k + h * d);
      }
      __builtin_memcpy(v, k_in + kv_heads * d, kv_heads * d * sizeof(T));
    }
  });
}

inline void ToFloatRows(ConstTensorView x, float* out, int64_t begin, int64_t end) {
  const int64_t n = x.shape.dims[1];
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < n; i += kLanes)
        Store(out + t * n + i, Load(Row<T>(x, t) + i, n - i), n - i);
    }
  });
}

}  // namespace trireme::cpu::TRIREME_ISA
