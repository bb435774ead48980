// Causal attention over the paged cache, one warp for a query row and head: the softmax streams
// over 32 keys at a time (Milakov & Gimelshein 2018). Takes every dtype and head_dim up to 256; it
// reads keys and values once per query head. Where the kernels for tensor cores apply, they run
// instead.
#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {
namespace {

constexpr int kWarps = 4, kPieces = kMaxHeadDim / 32;

template <typename T>
__device__ float Dot(const float* q, const T* k, int d) {
  float sum = 0.0f;
  for (int i = 0; i < d; ++i) sum += q[i] * Float(k[i]);
  return sum;
}

template <typename T>
__global__ void AttentionRows(AttentionArguments<T> a) {
  gpu::WaitForPrevious();
  GPU_SHARED(queries, float[kWarps][kMaxHeadDim]);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t t = blockIdx.x;
  const int head = blockIdx.y * kWarps + warp;
  if (head >= a.q_heads) return;  // a whole warp; no block barrier follows
  const int kv_head = head / (a.q_heads / a.kv_heads);
  const RowGroup g = GroupOf(a, LastNotAbove(a.cu_q_lens, a.sequences, t), kv_head);
  const int last = g.kv_len - g.q_len + static_cast<int>(t) - g.first_token;
  const int first = FirstKey(a, last);

  float* query = queries[warp];
  const T* q_row = a.q + t * a.q_stride + head * a.head_dim;
  for (int i = lane; i < a.head_dim; i += 32) query[i] = Float(q_row[i]) * a.scale;
  __syncwarp();

  float top = -INFINITY, total = 0.0f, sums[kPieces] = {};
  for (int begin = first; begin <= last; begin += 32) {
    const int count = min(32, last + 1 - begin);
    const float score =
        lane < count ? Dot(query, a.k + CacheRow(a, g.pages, begin + lane, kv_head), a.head_dim)
                     : -INFINITY;
    const float new_top = fmaxf(top, gpu::WarpMax(score));
    const float weight = lane < count ? expf(score - new_top) : 0.0f;
    const float fade = expf(top - new_top);
    total = total * fade + gpu::WarpSum(weight);
    top = new_top;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) sums[p] *= fade;
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(0xffffffffu, weight, j);
      const T* row = a.v + CacheRow(a, g.pages, begin + j, kv_head);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int i = p * 32 + lane;
        if (i < a.head_dim) sums[p] += w * Float(row[i]);
      }
    }
  }
  T* out_row = a.out + t * a.out_stride + head * a.head_dim;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int i = p * 32 + lane;
    if (i < a.head_dim) out_row[i] = Rounded<T>(sums[p] / total);
  }
}

bool PairsAligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 4 == 0 && stride % 2 == 0;
}

template <typename T>
void LaunchAttentionRows(gpu::StreamHandle handle, const AttentionArguments<T>& a, int64_t rows) {
  const dim3 grid(static_cast<unsigned>(rows),
                  static_cast<unsigned>((a.q_heads + kWarps - 1) / kWarps));
  gpu::LaunchDependent({grid, dim3(32, kWarps), 0, handle}, AttentionRows<T>, a);
}

}  // namespace

int64_t AttentionWorkspaceBytes(const AttentionLimits& limits) { return WorkspaceBytes(limits); }

void PagedAttention(Stream& stream, ConstTensorView q, const PagedKv& kv, ConstTensorView cu_q_lens,
                    ConstTensorView kv_lens, const AttentionShape& shape, TensorView out) {
  if (q.dim(0) == 0) return;
  const int64_t d = kv.k.dim(3), sequences = kv_lens.dim(0), kv_heads = kv.k.dim(2);
  CHECK_LE(d, kMaxHeadDim) << "head_dim";
  const auto page_size = static_cast<uint64_t>(kv.k.dim(1));
  CHECK_LE(kv.page_tables.dim(1) * kv.k.dim(1) * kv.k.dim(1), kMaxPageReach) << "page size";
  CHECK_LE(kv.k.dim(0) * kv.k.dim(1) * kv.k.dim(2), kMaxCacheRows) << "rows of the cache";
  const AttentionDesc desc{
      .dtype = q.dtype,
      .head_dim = d,
      .heads_per_group = q.dim(1) / d / kv_heads,
      .max_kv_len = kv.page_tables.dim(1) * kv.k.dim(1),
      .min_q_len = shape.min_q_len,
      .max_q_len = shape.max_q_len,
      .decode_q_len = shape.workspace ? shape.decode_q_len : 0,
      .aligned = PairsAligned(q.data, q.stride0) && PairsAligned(out.data, out.stride0)};
  const AttentionChoice choice = SelectAttention(desc);
  constexpr float kLog2E = 1.44269504f;
  DispatchFloat(q.dtype, [&](auto zero) {
    using T = decltype(zero);
    const AttentionArguments<T> arguments{
        .q = static_cast<const T*>(q.data),
        .k = static_cast<const T*>(kv.k.data),
        .v = static_cast<const T*>(kv.v.data),
        .page_tables = static_cast<const int32_t*>(kv.page_tables.data),
        .cu_q_lens = static_cast<const int32_t*>(cu_q_lens.data),
        .kv_lens = static_cast<const int32_t*>(kv_lens.data),
        .out = static_cast<T*>(out.data),
        .q_stride = q.stride0,
        .out_stride = out.stride0,
        .table_stride = kv.page_tables.stride0,
        .scale = choice.plain ? shape.scale : shape.scale * kLog2E,
        .sliding_window = static_cast<int>(shape.sliding_window),
        .sequences = static_cast<int>(sequences),
        .q_heads = static_cast<int>(q.dim(1) / d),
        .kv_heads = static_cast<int>(kv_heads),
        .head_dim = static_cast<int>(d),
        .page_size = static_cast<int>(kv.k.dim(1)),
        .decode_q_len = static_cast<int>(choice.decode ? choice.decode_q_len : 0),
        .page_reciprocal = ((uint64_t{1} << 32) + page_size - 1) / page_size};
    if (choice.plain) return LaunchAttentionRows(NativeHandle(stream), arguments, q.dim(0));
    if constexpr (!std::is_same_v<T, float>) {
      if (choice.decode) {
        const DecodeWorkspace workspace = WorkspaceOf(desc, choice, sequences, kv_heads);
        CHECK_LE(workspace.bytes(), shape.workspace.bytes()) << "attention workspace";
        char* const memory = shape.workspace.as<char>();
        LaunchAttentionDecode(NativeHandle(stream), arguments, workspace, memory,
                              memory + shape.workspace.bytes(),
                              stream.device().spec().multiprocessors);
      }
      if (choice.prefill) LaunchAttentionPrefill(NativeHandle(stream), arguments, q.dim(0));
    }
  });
}

}  // namespace trireme::cuda
