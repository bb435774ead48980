// The naive double-precision twin of every op in kernels/ops.h: written to be read, not to be fast.
// Row-major, shapes as in ops.h. Tests compare every backend with these.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme::reference {

using Doubles = std::vector<double>;

// [T, H] from table [V, H]; rows of ids outside [vocab_begin, vocab_begin + V) are zero.
Doubles Embedding(const std::vector<int32_t>& ids, const Doubles& table, int64_t hidden,
                  int64_t vocab_begin);

// x [T, H], weight [H].
Doubles RmsNorm(const Doubles& x, const Doubles& weight, double eps);

// bias [H] or empty.
Doubles LayerNorm(const Doubles& x, const Doubles& weight, const Doubles& bias, double eps);

// Elementwise.
Doubles Add(const Doubles& x, const Doubles& delta);

// x [T, K], w [N, K], bias [N] or empty -> [T, N].
Doubles MatMul(const Doubles& x, const Doubles& w, const Doubles& bias, int64_t k);

// x [T, K]: each row as e4m3 with the smallest power of two as its scale, of those from 2^-112 on,
// that leaves nothing above 448. Finite x.
Doubles RoundActivations(const Doubles& x, int64_t k);

// Elementwise, by the hyperbolic tangent.
Doubles Gelu(const Doubles& x);

// gate_up [T, 2 I] -> [T, I].
Doubles SiluAndMul(const Doubles& gate_up, int64_t intermediate);

// x [T, K], w [2 I, K] (gate rows, then up), bias [2 I] or empty -> [T, I]. Nothing is rounded in
// between.
Doubles MatMulSwiGlu(const Doubles& x, const Doubles& w, const Doubles& bias, int64_t k);

// x [T, H] -> [S, H].
Doubles GatherRows(const Doubles& x, const std::vector<int32_t>& indices, int64_t hidden);

struct Heads {
  int64_t q_heads = 1;
  int64_t kv_heads = 1;
  int64_t head_dim = 2;
};

// One head x [D]: rotated by the angles of row `cos_sin` [D] (cosines, then sines), after RMSNorm
// if `norm` [D] is there.
Doubles RotateHead(const Doubles& x, const Doubles& norm, double eps, const Doubles& cos_sin);

struct Cache {
  int64_t page_size = 1;
  Doubles k;  // [pages, page_size, Hkv, D]
  Doubles v;
};

// qkv [T, (Hq + 2 Hkv) D]: rotates q in place, stores k and v; the k and v columns of qkv stay as
// they are.
void RopeAndStoreKv(const Heads& heads, const std::vector<int32_t>& positions,
                    const std::vector<int64_t>& slots, const Doubles& cos_sin,
                    const Doubles& q_norm, const Doubles& k_norm, double eps, Doubles* qkv,
                    Cache* cache);

struct RaggedBatch {
  std::vector<int32_t> cu_q_lens;                 // [S + 1]
  std::vector<int32_t> kv_lens;                   // [S]
  std::vector<std::vector<int32_t>> page_tables;  // [S][pages]
};

// q [T, Hq D] -> [T, Hq D]. window 0: all keys.
Doubles PagedAttention(const Heads& heads, const Doubles& q, const Cache& cache,
                       const RaggedBatch& batch, double scale, int64_t window);

}  // namespace trireme::reference
