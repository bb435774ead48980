// Streaming-softmax attention of one query block over the paged cache. Keys come in blocks of 32
// that start at multiples of 32 of the sequence, whatever the page size, the chunk of queries or
// the batch; a key that a row must not see gets weight exactly 0, and a block of such keys changes
// nothing (e^0 is 1). So a row's result depends on its own sequence only. Part of
// isa_kernels-inl.h.
namespace trireme::cpu::TRIREME_ISA {

inline constexpr int64_t kKeys = 32;      // two vectors of scores a row
inline constexpr float kMasked = -1e30f;  // finite, so that differences never are NaN

// Working memory of one query block; see AttentionScratchFloats.
struct AttentionState {
  int64_t d = 0;           // head_dim filled up to a multiple of kLanes
  float* q = nullptr;      // [rows, d], scaled
  float* out = nullptr;    // [rows, d], not yet divided by `total`
  float* k = nullptr;      // [d, kKeys]
  float* v = nullptr;      // [kKeys, d]
  float* max = nullptr;    // [rows]
  float* total = nullptr;  // [rows]
  float* p = nullptr;      // [4, kKeys]
};

// Where the keys and values of a block lie.
template <typename T>
struct KeyRows {
  const T* k[kKeys];
  const T* v[kKeys];
  int64_t count = 0;
};
template <typename T>
TRIREME_INLINE void FindKeys(const AttentionBlock& block, int64_t first, int64_t end,
                             KeyRows<T>& keys) {
  const int64_t page_size = block.k.shape.dims[1], head_dim = block.k.shape.dims[3];
  const int64_t token_stride = block.k.shape.dims[2] * head_dim;
  const int32_t* pages = Row<int32_t>(block.page_tables, block.sequence);
  int64_t page = first / page_size, offset = first % page_size;
  keys.count = Max(0, Min(kKeys, end - first));
  for (int64_t i = 0; i < keys.count; ++i) {
    const int64_t at = offset * token_stride + block.kv_head * head_dim;
    keys.k[i] = Row<T>(block.k, pages[page]) + at;
    keys.v[i] = Row<T>(block.v, pages[page]) + at;
    // A head's row is a few cache lines in a far larger stride, which no hardware prefetcher
    // follows.
    for (int64_t c = 0; c < head_dim; c += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(keys.k[i] + c);
      __builtin_prefetch(keys.v[i] + c);
    }
    if (++offset == page_size) offset = 0, ++page;
  }
}

// Columns [c, c + kLanes) of 16 keys into state.k.
template <typename T>
TRIREME_INLINE void TransposeKeys(const KeyRows<T>& keys, int64_t first, int64_t c,
                                  int64_t head_dim, AttentionState& state) {
  F32 rows[kLanes];
  if (first + kLanes <= keys.count && c + kLanes <= head_dim) [[likely]] {
    Unroll<kLanes>([&](auto i) TRIREME_INLINE_LAMBDA { rows[i] = Load(keys.k[first + i] + c); });
  } else {
    for (int64_t i = 0; i < kLanes; ++i) {
      rows[i] = first + i < keys.count ? Load(keys.k[first + i] + c, head_dim - c) : F32{};
    }
  }
  Transpose(rows);
  float* out = state.k + c * kKeys + first;
  Unroll<kLanes>([&](auto i) TRIREME_INLINE_LAMBDA { Store(out + i * kKeys, rows[i]); });
}

// Columns [c, c + 2 kLanes) of 16 keys of bf16, transposed as pairs: half the shuffles.
TRIREME_INLINE void TransposePairs(const KeyRows<BF16>& keys, int64_t first, int64_t c,
                                   AttentionState& state) {
  F32 rows[kLanes];
  Unroll<kLanes>([&](auto i)
                     TRIREME_INLINE_LAMBDA { rows[i] = (F32)LoadBits(keys.k[first + i] + c); });
  Transpose(rows);
  float* out = state.k + c * kKeys + first;
  Unroll<kLanes>([&](auto i) TRIREME_INLINE_LAMBDA {
    Store(out + 2 * i * kKeys, (F32)((U32)rows[i] << 16));
    Store(out + (2 * i + 1) * kKeys, (F32)((U32)rows[i] & 0xffff0000u));
  });
}

// A block into state.k (transposed) and state.v; what is missing of it reads as zero.
template <typename T>
TRIREME_INLINE void LoadKeys(const KeyRows<T>& keys, int64_t head_dim, AttentionState& state) {
  for (int64_t first = 0; first < kKeys; first += kLanes) {
    int64_t c = 0;
    if constexpr (kDTypeOf<T> == DType::kBF16) {
      if (first + kLanes <= keys.count) {
        for (; c + 2 * kLanes <= head_dim; c += 2 * kLanes) TransposePairs(keys, first, c, state);
      }
    }
    for (; c < head_dim; c += kLanes) TransposeKeys(keys, first, c, head_dim, state);
  }
  for (int64_t i = 0; i < kKeys; ++i) {
    float* out = state.v + i * state.d;
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      Store(out + c, i < keys.count ? Load(keys.v[i] + c, head_dim - c) : F32{});
    }
  }
}

struct KeyRange {
  int64_t begin;  // the keys a row sees
  int64_t end;
};

// Scores of kRows rows against the block, their new maxima and weights, and the rescaled sums so
// far.
template <int kRows>
TRIREME_INLINE void Weigh(const AttentionState& state, int64_t row, const KeyRange* ranges,
                          int64_t first) {
  F32 s[kRows][2] = {};
  const float* q = state.q + row * state.d;
  const int64_t d = state.d;
  for (int64_t i = 0; i < d; ++i) {
    const F32 k0 = Load(state.k + i * kKeys), k1 = Load(state.k + i * kKeys + kLanes);
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      const F32 a = Splat(q[r * d + i]);
      s[r][0] = MulAdd(a, k0, s[r][0]);
      s[r][1] = MulAdd(a, k1, s[r][1]);
    });
  }
  Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
    const F32 begin = Splat(static_cast<float>(Max(ranges[r].begin - first, 0)));
    const F32 end = Splat(static_cast<float>(Max(Min(ranges[r].end - first, kKeys), 0)));
    const F32 low = Lanes(), high = Lanes() + static_cast<float>(kLanes);
    const I32 seen0 = (low >= begin) & (low < end), seen1 = (high >= begin) & (high < end);
    const F32 masked = Splat(kMasked);
    const F32 s0 = Select(seen0, s[r][0], masked), s1 = Select(seen1, s[r][1], masked);
    const float old = state.max[row + r];
    const float block_max = MaxLane(Larger(s0, s1));
    const float max = old > block_max ? old : block_max;
    const F32 p0 = Select(seen0, Exp(s0 - max), F32{});
    const F32 p1 = Select(seen1, Exp(s1 - max), F32{});
    Store(state.p + r * kKeys, p0);
    Store(state.p + r * kKeys + kLanes, p1);
    const F32 shrink = Exp(Splat(old - max));
    state.max[row + r] = max;
    state.total[row + r] = state.total[row + r] * FirstLane(shrink) + Sum(p0 + p1);
    if (old != max) {
      float* out = state.out + (row + r) * state.d;
      for (int64_t i = 0; i < d; i += kLanes) Store(out + i, Load(out + i) * shrink);
    }
  });
}

// out += p v, kVectors vectors of head_dim at a time.
template <int kRows, int kVectors>
TRIREME_INLINE void Accumulate(const AttentionState& state, int64_t row, int64_t column) {
  F32 sums[kRows][kVectors];
  const int64_t d = state.d;
  float* out = state.out + row * d + column;
  const float* v = state.v + column;
  const float* p = state.p;
  Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto c)
                         TRIREME_INLINE_LAMBDA { sums[r][c] = Load(out + r * d + c * kLanes); });
  });
  for (int64_t i = 0; i < kKeys; ++i, v += d) {
    F32 values[kVectors];
    Unroll<kVectors>([&](auto c) TRIREME_INLINE_LAMBDA { values[c] = Load(v + c * kLanes); });
    Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
      const F32 weight = Splat(p[r * kKeys + i]);
      Unroll<kVectors>([&](auto c) TRIREME_INLINE_LAMBDA {
        sums[r][c] = MulAdd(weight, values[c], sums[r][c]);
      });
    });
  }
  Unroll<kRows>([&](auto r) TRIREME_INLINE_LAMBDA {
    Unroll<kVectors>([&](auto c)
                         TRIREME_INLINE_LAMBDA { Store(out + r * d + c * kLanes, sums[r][c]); });
  });
}

template <int kRows>
[[gnu::noinline]] void RowsOverBlock(const AttentionState& state, int64_t row,
                                     const KeyRange* ranges, int64_t first) {
  Weigh<kRows>(state, row, ranges, first);
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 4 * kLanes <= state.d; c += 4 * kLanes) Accumulate<kRows, 4>(state, row, c);
#endif
  for (; c < state.d; c += kLanes) Accumulate<kRows, 1>(state, row, c);
}

template <typename T>
TRIREME_INLINE void LoadQueries(const AttentionBlock& block, AttentionState& state) {
  const int64_t head_dim = block.k.shape.dims[3];
  float* q = state.q;
  for (int64_t t = block.row_begin; t < block.row_end; ++t) {
    const T* in = Row<T>(block.q, t) + block.kv_head * block.group * head_dim;
    for (int64_t g = 0; g < block.group; ++g, q += state.d) {
      for (int64_t c = 0; c < state.d; c += kLanes) {
        Store(q + c, Load(in + g * head_dim + c, head_dim - c) * block.scale);
      }
    }
  }
}

template <typename T>
TRIREME_INLINE void StoreRows(const AttentionBlock& block, const AttentionState& state) {
  const int64_t head_dim = block.k.shape.dims[3];
  int64_t row = 0;
  for (int64_t t = block.row_begin; t < block.row_end; ++t) {
    T* out = Row<T>(block.out, t) + block.kv_head * block.group * head_dim;
    for (int64_t g = 0; g < block.group; ++g, ++row) {
      const float inverse = 1.0f / state.total[row];
      for (int64_t c = 0; c < head_dim; c += kLanes) {
        Store(out + g * head_dim + c, Load(state.out + row * state.d + c) * inverse, head_dim - c);
      }
    }
  }
}

TRIREME_INLINE KeyRange RangeOf(const AttentionBlock& block, int64_t row) {
  const int64_t position = block.first_position + row / block.group;
  const int64_t window = block.sliding_window;
  return {window > 0 ? Max(0, position - window + 1) : 0, position + 1};
}

TRIREME_INLINE void AllRowsOverBlock(const AttentionBlock& block, const AttentionState& state,
                                     int64_t rows, int64_t first) {
  for (int64_t row = 0; row < rows;) {
    const int64_t n = rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
    KeyRange ranges[4];
    for (int64_t r = 0; r < n; ++r) ranges[r] = RangeOf(block, row + r);
    if (n == 4) {
      RowsOverBlock<4>(state, row, ranges, first);
    } else if (n == 2) {
      RowsOverBlock<2>(state, row, ranges, first);
    } else {
      RowsOverBlock<1>(state, row, ranges, first);
    }
    row += n;
  }
}

inline void AttentionRows(const AttentionBlock& block, float* scratch) {
  const int64_t rows = (block.row_end - block.row_begin) * block.group;
  AttentionState state;
  state.d = (block.k.shape.dims[3] + kLanes - 1) / kLanes * kLanes;
  const int64_t padded_rows = (rows + kLanes - 1) / kLanes * kLanes;
  state.q = scratch;
  state.out = state.q + rows * state.d;
  state.k = state.out + rows * state.d;
  state.v = state.k + kKeys * state.d;
  state.max = state.v + kKeys * state.d;
  state.total = state.max + padded_rows;
  state.p = state.total + padded_rows;
  __builtin_memset(state.out, 0, rows * state.d * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    state.max[r] = kMasked;
    state.total[r] = 0.0f;
  }
  DispatchFloat(block.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    LoadQueries<T>(block, state);
    const int64_t end = RangeOf(block, rows - 1).end;
    int64_t first = RangeOf(block, 0).begin / kKeys * kKeys;
    KeyRows<T> keys, next;
    FindKeys(block, first, end, keys);
    for (; first < end; first += kKeys, keys = next) {
      FindKeys(block, first + kKeys, end, next);  // fetched while this block is computed
      LoadKeys(keys, block.k.shape.dims[3], state);
      AllRowsOverBlock(block, state, rows, first);
    }
    StoreRows<T>(block, state);
  });
}

}  // namespace trireme::cpu::TRIREME_ISA
