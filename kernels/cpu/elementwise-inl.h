// Norms, sums, SiLU and rotary embedding over rows. Part of isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

template <typename T>
TRIREME_INLINE float InverseRms(const T* x, int64_t n, float eps) {
  F32 even = {}, odd = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const F32 a = Load(x + i, n - i);
    even = MulAdd(a, a, even);
    if (i + kLanes < n) {
      const F32 b = Load(x + i + kLanes, n - i - kLanes);
      odd = MulAdd(b, b, odd);
    }
  }
  return 1.0f / __builtin_sqrtf(Sum(even + odd) / static_cast<float>(n) + eps);
}

template <typename T>
TRIREME_INLINE void NormRow(const T* x, const T* weight, int64_t n, float eps, T* out) {
  const F32 scale = Splat(InverseRms(x, n, eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    Store(out + i, Load(x + i, n - i) * scale * Load(weight + i, n - i), n - i);
  }
}

template <typename T>
TRIREME_INLINE void AddRow(T* x, const T* delta, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Store(x + i, Load(x + i, n - i) + Load(delta + i, n - i), n - i);
  }
}

inline void RmsNormRows(ConstTensorView x, ConstTensorView weight, float eps, TensorView out,
                        int64_t begin, int64_t end) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      NormRow(Row<T>(x, t), Row<T>(weight, 0), x.shape.dims[1], eps, Row<T>(out, t));
    }
  });
}

inline void AddRmsNormRows(TensorView residual, ConstTensorView delta, ConstTensorView weight,
                           float eps, TensorView out, int64_t begin, int64_t end) {
  const int64_t n = residual.shape.dims[1];
  DispatchFloat(residual.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) {
      AddRow(Row<T>(residual, t), Row<T>(delta, t), n);
      NormRow(static_cast<const T*>(Row<T>(residual, t)), Row<T>(weight, 0), n, eps,
              Row<T>(out, t));
    }
  });
}

inline void AddRows(TensorView x, ConstTensorView delta, int64_t begin, int64_t end) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = begin; t < end; ++t) AddRow(Row<T>(x, t), Row<T>(delta, t), x.shape.dims[1]);
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
