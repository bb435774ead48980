// Every op a model may call: contract, shapes, and what it costs. An op takes a stream, inputs,
// scalars, outputs; it enqueues and returns. Shapes and dtypes are checked here (ops.cc), once, for
// all backends; a violation is our fault (CHECK). Each op has a naive double-precision twin in
// tests/reference/reference.h that the tests compare it with.
//
// Dims: T tokens, S sequences, H hidden, I intermediate, V vocabulary (of this shard), Hq / Hkv
// query / key-value heads of this shard, D head_dim, K / N inputs / outputs of a linear layer.
// "act" is the activation dtype: f32, bf16 or f16, the same for all activations of a call. All
// arithmetic accumulates in fp32, in an order that depends only on the row's own length: a row's
// result does not depend on what else is in the batch or on the number of threads. The one
// exception is asked for: DeviceOptions.cublas_lt.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/norm.h"
#include "kernels/tensor.h"

namespace trireme {

// FLOPs and bytes an op must at least do and move; the roofline's two axes.
struct OpCost {
  double flops = 0;
  double bytes = 0;
};

// The op that a packed weight is for.
enum class LinearUse : uint8_t {
  kMatMul,        // MatMul, MatMulGelu or Embedding
  kMatMulSwiGlu,  // MatMulSwiGlu: N is 2 I, the gate's rows, then up's
};

// Weights of y = x W^T (or the rows of an embedding), packed once at load in whatever layout the
// backend likes best for their use. Made by PackLinear, owned by the model, never changed. A
// row-major [N, K] matrix goes in.
//
// Of dtype e4m3 (quantize.h) it is W = scale * q, a scale for each row: the matmuls below then
// compute y = (x . q) * scale + bias, the scale applied once, in fp32, to the finished sum. Such a
// weight takes activations of any type; it is no embedding. With `quantizes_activations` they
// multiply RoundActivations(x) in x's place, row by row.
class LinearWeight {
 public:
  virtual ~LinearWeight() = default;
  LinearUse use = LinearUse::kMatMul;
  int64_t n = 0;
  int64_t k = 0;
  DType dtype = DType::kF32;
  int64_t bytes = 0;  // memory held, scales included
  // Of e4m3: set by the owner before the weight is used. It then goes through ReserveMatMul first.
  bool quantizes_activations = false;
};

// One layer's share of the paged KV cache.
struct PagedKv {
  TensorView k;  // [pages, page_size, Hkv, D]
  TensorView v;  // [pages, page_size, Hkv, D]
  ConstTensorView
      page_tables;  // [S, max_pages] i32: page of each sequence's page_size-token stretch
};

struct AttentionShape {
  float scale = 1.0f;          // usually 1 / sqrt(D)
  int64_t sliding_window = 0;  // keys a query sees, itself included (key > pos - window); 0 = all
  // Hints for the choice of kernels; they change no bit of a result. 0 = unknown.
  int64_t min_q_len = 0, max_q_len = 0;  // of the batch's sequences
  // AttentionWorkspaceBytes of u8, zero before its first use and then left to this op; or empty.
  // Without it few queries over long caches are slow on a GPU.
  TensorView workspace{};
  int64_t decode_q_len = 1;  // as in the workspace's AttentionLimits
};

// What a workspace must serve.
struct AttentionLimits {
  DType dtype = DType::kBF16;
  int64_t sequences = 1, q_heads = 1, kv_heads = 1, head_dim = 64;
  int64_t max_kv_len = 0;    // positions in a sequence's page table
  int64_t decode_q_len = 1;  // queries of a sequence still counted as decode: 1 + drafts
};

struct RopeParams {
  ConstTensorView cos_sin;  // [max_positions, D] f32: cos of the D/2 angles, then sin of them
  ConstTensorView
      q_norm;  // [D] act or empty: RMSNorm of every query head before the rotation (Qwen3)
  ConstTensorView k_norm;  // [D] act or empty
  float norm_eps = 0.0f;
};

// out[t] = row id - vocab_begin of the table where the id lies in this shard's rows, else zeros
// (the sum over shards is the row). token_ids [T] i32, out [T, H] act. The table [V, H] act is a
// packed weight, so that a head tied to the embedding is the same memory.
void Embedding(Stream& stream, ConstTensorView token_ids, const LinearWeight& table,
               int64_t vocab_begin, TensorView out);

// out = the norm of each row of x. x, out [T, H]; out may be x. Rows may be strided. Of kLayer the
// mean is taken first, and the squares of what is left by it: nothing cancels.
void Norm(Stream& stream, ConstTensorView x, const NormParams& norm, TensorView out);

// residual [T, H] += delta [T, H]; out = Norm(residual). One pass instead of two. The norm uses
// the rounded sum.
void AddNorm(Stream& stream, TensorView residual, ConstTensorView delta, const NormParams& norm,
             TensorView out);
// What it asks of its tensors: for a communicator that fuses it with a sum over ranks.
void CheckAddNorm(ConstTensorView residual, ConstTensorView delta, const NormParams& norm,
                  ConstTensorView out);

// x [T, H] += delta [T, H].
void Add(Stream& stream, TensorView x, ConstTensorView delta);

// y [T, N] = x [T, K] w^T + bias. bias [N] act or empty. y is act, or f32 whatever act is (logits).
void MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
            TensorView y);

// y [T, I] = SiluAndMul(MatMul(x [T, K], w [2 I, K], bias)) in one pass: the [T, 2 I] in between is
// never stored. bias [2 I] act or empty, y is act. Gate and up are rounded to act before the SiLU,
// as MatMul would have stored them, so that the bits are those of the two ops on every backend.
void MatMulSwiGlu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                  TensorView y);

// y = Gelu(MatMul(x, w, bias)) in one pass, y act. The product is rounded to act before the GELU,
// as MatMul would have stored it, so that the bits are those of the two ops on every backend.
void MatMulGelu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                TensorView y);

// Makes room on the stream for matmuls of up to `rows` rows with these weights, and
// gives the bytes that the stream then holds for it until its end; 0 where nothing is needed. GPUs
// need it for the codes of activations: more rows go through in pieces, and without any it is our
// fault; and for parts of sums whose k several blocks share, which without it they do not. Where
// the device was opened with DeviceOptions.cublas_lt cuBLASLt does as well; what there is no room
// for the backend's own kernels compute. At load; a later call may make more room.
absl::StatusOr<int64_t> ReserveMatMul(Stream& stream, int64_t rows,
                                      const std::vector<const LinearWeight*>& weights);

// In: qkv [T, (Hq + 2 Hkv) * D], rows of q heads, k heads, v heads. Normalises (if asked) and
// rotates q and k: element i with i + D/2 (the Hugging Face layout), q in place; writes k and v to
// cache slot slot_mapping[t] = page * page_size + offset. positions [T] i32, slot_mapping [T] i64;
// a slot of -1 is not written. kv.page_tables is not used.
void RopeAndStoreKv(Stream& stream, TensorView qkv, ConstTensorView positions,
                    ConstTensorView slot_mapping, const RopeParams& rope, int64_t q_heads,
                    const PagedKv& kv);

// Causal attention of a packed ragged batch over the paged cache, prefill chunks and decodes alike.
// Sequence s has the query rows [cu_q_lens[s], cu_q_lens[s+1]) which are the last ones of its
// kv_lens[s] positions (already in the cache). q [T, Hq * D] (rows may be strided), cu_q_lens [S+1]
// i32, kv_lens [S] i32, out [T, Hq * D]. Query head h reads kv head h / (Hq / Hkv). Softmax streams
// over pages (Milakov & Gimelshein 2018; FlashAttention, Dao 2022): no score matrix. cu_q_lens,
// kv_lens and page_tables must be readable by the host on the CPU backend.
void PagedAttention(Stream& stream, ConstTensorView q, const PagedKv& kv, ConstTensorView cu_q_lens,
                    ConstTensorView kv_lens, const AttentionShape& shape, TensorView out);

// Bytes for AttentionShape.workspace; 0 on a device that needs none.
int64_t AttentionWorkspaceBytes(const Stream& stream, const AttentionLimits& limits);

// x [T, I] = x * Phi(x), Phi approximated by the logistic function of 2 sqrt(2 / pi)
// (x + 0.044715 x^3): GELU in what others call its tanh form (Hendrycks and Gimpel 2016).
void Gelu(Stream& stream, TensorView x);

// gate_up [T, 2 I] (gate columns, then up columns), out [T, I] = silu(gate) * up.
void SiluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out);

// out[i] = x[indices[i]]. x [T, H], indices [S] i32, out [S, H].
void GatherRows(Stream& stream, ConstTensorView x, ConstTensorView indices, TensorView out);

// Fills rows [R, K], contiguous host memory, with a weight's rows from first_row on. Called from
// several threads at once.
using RowSource = std::function<absl::Status(int64_t first_row, TensorView rows)>;

// Packs the weight [n, k] whose rows, of type `dtype`, come from `source`: each once, a few at a
// time, so that nothing but the packed weight takes memory; as much of it whatever the use. Gives
// the source's first error. Load time only. For e4m3 the source gives f32, all of it finite, which
// is quantised here, by the rows' own maxima or, where they are pieces of longer rows, by those:
// row_maxima [n], or null.
absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream& stream, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source,
                                                             LinearUse use = LinearUse::kMatMul,
                                                             const float* row_maxima = nullptr);
// The same from weight [N, K] in host memory, any float dtype, finite where it becomes e4m3.
absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinear(Stream& stream, ConstTensorView weight,
                                                         DType dtype,
                                                         LinearUse use = LinearUse::kMatMul);

OpCost EmbeddingCost(int64_t tokens, int64_t hidden, DType act);
OpCost NormCost(NormKind kind, int64_t tokens, int64_t hidden, DType act);
OpCost AddNormCost(NormKind kind, int64_t tokens, int64_t hidden, DType act);
OpCost AddCost(int64_t tokens, int64_t hidden, DType act);
OpCost MatMulCost(int64_t tokens, int64_t n, int64_t k, DType act, DType weight);
OpCost MatMulSwiGluCost(int64_t tokens, int64_t intermediate, int64_t k, DType act, DType weight);
OpCost MatMulGeluCost(int64_t tokens, int64_t n, int64_t k, DType act, DType weight);
OpCost GeluCost(int64_t tokens, int64_t n, DType act);
OpCost SiluAndMulCost(int64_t tokens, int64_t intermediate, DType act);
OpCost RopeAndStoreKvCost(int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                          DType act);
// One sequence: q_len queries that end at position kv_len - 1.
OpCost PagedAttentionCost(int64_t q_len, int64_t kv_len, int64_t q_heads, int64_t kv_heads,
                          int64_t head_dim, DType act, int64_t sliding_window = 0);
OpCost GatherRowsCost(int64_t rows, int64_t hidden, DType act);

}  // namespace trireme
