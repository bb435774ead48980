#include "kernels/ops.h"

#include <algorithm>

#include "kernels/check_tensor.h"
#include "kernels/op_table.h"

// One place for the shape and dtype rules of every op, and for what each must at least do and move.
namespace trireme {
namespace {

void CheckMatrix(const ConstTensorView& view, const char* what) {
  CHECK_EQ(view.shape.rank, 2) << what << " must be a matrix";
  CHECK(IsFloat(view.dtype)) << what << " is " << Name(view.dtype);
  CHECK(view.dim(0) <= 1 || view.stride0 >= view.dim(1)) << what << " has overlapping rows";
}

// A contiguous vector; for those that may be empty, `view` is then not there at all.
void CheckVector(const ConstTensorView& view, int64_t length, DType dtype, const char* what) {
  CheckShape(view, Shape{length}, dtype, what);
  CHECK(length <= 1 || view.stride0 == 1) << what << " must be contiguous";
}

void CheckNorm(const ConstTensorView& x, const char* what, const NormParams& norm,
               const ConstTensorView& out) {
  CheckMatrix(x, what);
  CheckMatrix(out, "out");
  CheckShape(out, x.shape, x.dtype, "out");
  CheckVector(norm.weight, x.dim(1), x.dtype, "norm weight");
  CHECK(!norm.bias || norm.kind == NormKind::kLayer) << "an RMSNorm has no bias";
  if (norm.bias) CheckVector(norm.bias, x.dim(1), x.dtype, "norm bias");
}

void CheckKv(const PagedKv& kv, DType dtype) {
  CHECK_EQ(kv.k.shape.rank, 4) << "the k cache must be [pages, page_size, Hkv, D]";
  CHECK_GT(kv.k.elements(), 0) << "the k cache is empty";
  CheckShape(kv.k, kv.k.shape, dtype, "k cache");
  CheckShape(kv.v, kv.k.shape, dtype, "v cache");
}

const char* Name(LinearUse use) {
  return use == LinearUse::kMatMul ? "matmul" : "matmul with SwiGLU";
}

void CheckUse(const LinearWeight& w, LinearUse use) {
  CHECK(w.use == use) << "the weight was packed for " << Name(w.use) << ", not for " << Name(use);
}

// What both matmuls ask of their inputs.
void CheckLinear(const ConstTensorView& x, const LinearWeight& w, const ConstTensorView& bias) {
  CheckMatrix(x, "x");
  CHECK(x.dtype == w.dtype || w.dtype == DType::kE4M3)
      << "x is " << Name(x.dtype) << ", the weight " << Name(w.dtype);
  CHECK(w.dtype == DType::kE4M3 || !w.quantizes_activations)
      << "activations are quantised for weights of e4m3, this one is " << Name(w.dtype);
  CHECK_EQ(x.dim(1), w.k) << "x has another K than the weight";
  if (bias) CheckVector(bias, w.n, x.dtype, "bias");
}

float GetFloat(const ConstTensorView& x, int64_t row, int64_t column) {
  if (x.dtype == DType::kBF16) return ToFloat(x.row<BF16>(row)[column]);
  if (x.dtype == DType::kF16) return ToFloat(x.row<F16>(row)[column]);
  return x.row<float>(row)[column];
}
void SetFloat(const TensorView& x, int64_t row, int64_t column, float value) {
  if (x.dtype == DType::kBF16) {
    x.row<BF16>(row)[column] = FromFloat<BF16>(value);
  } else if (x.dtype == DType::kF16) {
    x.row<F16>(row)[column] = FromFloat<F16>(value);
  } else {
    x.row<float>(row)[column] = value;
  }
}

}  // namespace

void Embedding(Stream& stream, ConstTensorView token_ids, const LinearWeight& table,
               int64_t vocab_begin, TensorView out) {
  CHECK_EQ(token_ids.shape.rank, 1) << "token_ids";
  CheckVector(token_ids, token_ids.dim(0), DType::kI32, "token_ids");
  CheckMatrix(out, "out");
  CheckShape(out, {token_ids.dim(0), table.k}, table.dtype, "out");
  CheckUse(table, LinearUse::kMatMul);
  stream.ops().embedding(stream, token_ids, table, vocab_begin, out);
}

void Norm(Stream& stream, ConstTensorView x, const NormParams& norm, TensorView out) {
  CheckNorm(x, "x", norm, out);
  stream.ops().norm(stream, x, norm, out);
}

void CheckAddNorm(ConstTensorView residual, ConstTensorView delta, const NormParams& norm,
                  ConstTensorView out) {
  CheckNorm(residual, "residual", norm, out);
  CheckMatrix(delta, "delta");
  CheckShape(delta, residual.shape, residual.dtype, "delta");
}

void AddNorm(Stream& stream, TensorView residual, ConstTensorView delta, const NormParams& norm,
             TensorView out) {
  CheckAddNorm(residual, delta, norm, out);
  stream.ops().add_norm(stream, residual, delta, norm, out);
}

void Add(Stream& stream, TensorView x, ConstTensorView delta) {
  CheckMatrix(x, "x");
  CheckMatrix(delta, "delta");
  CheckShape(delta, x.shape, x.dtype, "delta");
  stream.ops().add(stream, x, delta);
}

void MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
            TensorView y) {
  CheckLinear(x, w, bias);
  CheckUse(w, LinearUse::kMatMul);
  CheckMatrix(y, "y");
  CheckShape(y, {x.dim(0), w.n}, y.dtype == DType::kF32 ? DType::kF32 : x.dtype, "y");
  stream.ops().matmul(stream, x, w, bias, y);
}

void MatMulSwiGlu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                  TensorView y) {
  CheckLinear(x, w, bias);
  CheckUse(w, LinearUse::kMatMulSwiGlu);
  CheckMatrix(y, "y");
  CheckShape(y, {x.dim(0), w.n / 2}, x.dtype, "y");
  stream.ops().matmul_swiglu(stream, x, w, bias, y);
}

absl::StatusOr<int64_t> ReserveMatMul(Stream& stream, int64_t rows,
                                      const std::vector<const LinearWeight*>& weights) {
  const auto reserve = stream.ops().reserve_matmul;
  if (reserve == nullptr) return 0;
  return reserve(stream, rows, weights);
}

void RopeAndStoreKv(Stream& stream, TensorView qkv, ConstTensorView positions,
                    ConstTensorView slot_mapping, const RopeParams& rope, int64_t q_heads,
                    const PagedKv& kv) {
  CheckMatrix(qkv, "qkv");
  CheckKv(kv, qkv.dtype);
  const int64_t kv_heads = kv.k.dim(2), head_dim = kv.k.dim(3);
  CHECK_EQ(qkv.dim(1), (q_heads + 2 * kv_heads) * head_dim)
      << "qkv has another width than the heads";
  CHECK_EQ(head_dim % 2, 0) << "rotation needs pairs";
  CheckVector(positions, qkv.dim(0), DType::kI32, "positions");
  CheckVector(slot_mapping, qkv.dim(0), DType::kI64, "slot_mapping");
  CheckMatrix(rope.cos_sin, "cos_sin");
  CheckShape(rope.cos_sin, {rope.cos_sin.dim(0), head_dim}, DType::kF32, "cos_sin");
  if (rope.q_norm) CheckVector(rope.q_norm, head_dim, qkv.dtype, "q_norm");
  if (rope.k_norm) CheckVector(rope.k_norm, head_dim, qkv.dtype, "k_norm");
  stream.ops().rope_and_store_kv(stream, qkv, positions, slot_mapping, rope, q_heads, kv);
}

void PagedAttention(Stream& stream, ConstTensorView q, const PagedKv& kv, ConstTensorView cu_q_lens,
                    ConstTensorView kv_lens, const AttentionShape& shape, TensorView out) {
  CheckMatrix(q, "q");
  CheckMatrix(out, "out");
  CheckShape(out, q.shape, q.dtype, "out");
  CheckKv(kv, q.dtype);
  CHECK_EQ(kv_lens.shape.rank, 1) << "kv_lens";
  const int64_t sequences = kv_lens.dim(0);
  CheckVector(kv_lens, sequences, DType::kI32, "kv_lens");
  CheckVector(cu_q_lens, sequences + 1, DType::kI32, "cu_q_lens");
  CHECK_EQ(kv.page_tables.shape.rank, 2) << "page_tables";
  CheckShape(kv.page_tables, {sequences, kv.page_tables.dim(1)}, DType::kI32, "page_tables");
  const int64_t kv_width = kv.k.dim(2) * kv.k.dim(3);
  CHECK(q.dim(1) > 0 && q.dim(1) % kv_width == 0)
      << "q has " << q.dim(1) << " columns, no multiple of the kv heads' " << kv_width;
  CHECK_GE(shape.sliding_window, 0);
  CHECK_GT(shape.scale, 0.0f);
  stream.ops().paged_attention(stream, q, kv, cu_q_lens, kv_lens, shape, out);
}

int64_t AttentionWorkspaceBytes(const Stream& stream, const AttentionLimits& limits) {
  const auto bytes = stream.ops().attention_workspace_bytes;
  return bytes == nullptr ? 0 : bytes(limits);
}

void MatMulGelu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                TensorView y) {
  CheckLinear(x, w, bias);
  CheckUse(w, LinearUse::kMatMul);
  CheckMatrix(y, "y");
  CheckShape(y, {x.dim(0), w.n}, x.dtype, "y");
  stream.ops().matmul_gelu(stream, x, w, bias, y);
}

void Gelu(Stream& stream, TensorView x) {
  CheckMatrix(x, "x");
  stream.ops().gelu(stream, x);
}

void SiluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out) {
  CheckMatrix(gate_up, "gate_up");
  CheckMatrix(out, "out");
  CheckShape(gate_up, {out.dim(0), 2 * out.dim(1)}, out.dtype, "gate_up");
  stream.ops().silu_and_mul(stream, gate_up, out);
}

void GatherRows(Stream& stream, ConstTensorView x, ConstTensorView indices, TensorView out) {
  CheckMatrix(x, "x");
  CheckMatrix(out, "out");
  CHECK_EQ(indices.shape.rank, 1) << "indices";
  CheckVector(indices, indices.dim(0), DType::kI32, "indices");
  CheckShape(out, {indices.dim(0), x.dim(1)}, x.dtype, "out");
  stream.ops().gather_rows(stream, x, indices, out);
}

absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream& stream, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source,
                                                             LinearUse use,
                                                             const float* row_maxima) {
  CHECK(n > 0 && k > 0) << "weight is [" << n << ", " << k << "]";
  CHECK(IsFloat(dtype) || dtype == DType::kE4M3) << "weights cannot be packed to " << Name(dtype);
  CHECK(row_maxima == nullptr || dtype == DType::kE4M3) << "maxima of rows are for e4m3";
  CHECK(use == LinearUse::kMatMul || n % 2 == 0) << "gate and up have " << n << " rows together";
  return stream.ops().pack_linear(stream, n, k, dtype, source, use, row_maxima);
}

absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinear(Stream& stream, ConstTensorView weight,
                                                         DType dtype, LinearUse use) {
  CheckMatrix(weight, "weight");
  CHECK(IsFloat(weight.dtype)) << "the weight is " << Name(weight.dtype);
  const auto source = [&weight](int64_t first_row, TensorView rows) {
    for (int64_t r = 0; r < rows.dim(0); ++r) {
      for (int64_t c = 0; c < rows.dim(1); ++c) {
        SetFloat(rows, r, c, GetFloat(weight, first_row + r, c));
      }
    }
    return absl::OkStatus();
  };
  return PackLinearFrom(stream, weight.dim(0), weight.dim(1), dtype, source, use);
}

namespace {
OpCost Cost(double flops, double bytes) { return {flops, bytes}; }
double Bytes(DType dtype) { return static_cast<double>(SizeOf(dtype)); }
// A matrix of a linear layer, with the scales of its rows where it has them.
double WeightBytes(int64_t n, int64_t k, DType dtype) {
  return 1.0 * n * k * Bytes(dtype) + (dtype == DType::kE4M3 ? sizeof(float) * n : 0.0);
}
}  // namespace

OpCost EmbeddingCost(int64_t tokens, int64_t hidden, DType act) {
  return Cost(0, 2.0 * tokens * hidden * Bytes(act) + 4.0 * tokens);
}

OpCost NormCost(NormKind kind, int64_t tokens, int64_t hidden, DType act) {
  // Square, sum, scale by the root and by the weight; centred besides: sum, subtract, add the bias.
  const bool layer = kind == NormKind::kLayer;
  return Cost((layer ? 7.0 : 4.0) * tokens * hidden,
              (2.0 * tokens + (layer ? 2.0 : 1.0)) * hidden * Bytes(act));
}

OpCost AddNormCost(NormKind kind, int64_t tokens, int64_t hidden, DType act) {
  // residual is read and written, delta read, out written; the norm does not read the sum again.
  const OpCost norm = NormCost(kind, tokens, hidden, act);
  return Cost(norm.flops + 1.0 * tokens * hidden, norm.bytes + 2.0 * tokens * hidden * Bytes(act));
}

OpCost AddCost(int64_t tokens, int64_t hidden, DType act) {
  return Cost(1.0 * tokens * hidden, 3.0 * tokens * hidden * Bytes(act));
}

OpCost MatMulCost(int64_t tokens, int64_t n, int64_t k, DType act, DType weight) {
  return Cost(2.0 * tokens * n * k,
              WeightBytes(n, k, weight) + 1.0 * tokens * (n + k) * Bytes(act));
}

OpCost MatMulSwiGluCost(int64_t tokens, int64_t intermediate, int64_t k, DType act, DType weight) {
  // The product's 2 I columns are never stored: I are.
  const double products = 2.0 * intermediate * k;
  return Cost(
      2.0 * tokens * products + 5.0 * tokens * intermediate,
      WeightBytes(2 * intermediate, k, weight) + 1.0 * tokens * (intermediate + k) * Bytes(act));
}

OpCost MatMulGeluCost(int64_t tokens, int64_t n, int64_t k, DType act, DType weight) {
  const OpCost product = MatMulCost(tokens, n, k, act, weight);
  return Cost(product.flops + GeluCost(tokens, n, act).flops, product.bytes);
}

OpCost GeluCost(int64_t tokens, int64_t n, DType act) {
  // The cubic is 5, exponential, sum and quotient 3.
  return Cost(8.0 * tokens * n, 2.0 * tokens * n * Bytes(act));
}

OpCost SiluAndMulCost(int64_t tokens, int64_t intermediate, DType act) {
  return Cost(5.0 * tokens * intermediate, 3.0 * tokens * intermediate * Bytes(act));
}

OpCost RopeAndStoreKvCost(int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                          DType act) {
  // q, k and v are read and written once; of the table D floats a token.
  return Cost(3.0 * tokens * (q_heads + kv_heads) * head_dim,
              2.0 * tokens * (q_heads + 2 * kv_heads) * head_dim * Bytes(act) +
                  tokens * (4.0 * head_dim + 12.0));
}

OpCost PagedAttentionCost(int64_t q_len, int64_t kv_len, int64_t q_heads, int64_t kv_heads,
                          int64_t head_dim, DType act, int64_t sliding_window) {
  // Query i of q_len sees the keys up to its own position, at most `window` of them.
  const int64_t window = sliding_window > 0 ? sliding_window : kv_len;
  const int64_t first = kv_len - q_len + 1;  // keys up to the first query
  const int64_t growing = std::clamp<int64_t>(window - first, 0, q_len);
  const double pairs = static_cast<double>(growing) * first + 0.5 * growing * (growing - 1.0) +
                       static_cast<double>(q_len - growing) * std::min(window, kv_len);
  const double keys_read = std::min<double>(kv_len, window + q_len - 1.0);
  return Cost(4.0 * pairs * q_heads * head_dim, 2.0 * keys_read * kv_heads * head_dim * Bytes(act) +
                                                    2.0 * q_len * q_heads * head_dim * Bytes(act));
}

OpCost GatherRowsCost(int64_t rows, int64_t hidden, DType act) {
  return Cost(0, 2.0 * rows * hidden * Bytes(act) + 4.0 * rows);
}

}  // namespace trireme
