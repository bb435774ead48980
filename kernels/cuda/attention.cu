// Causal attention over the paged cache, one warp for a query row and head: the softmax streams
// over 32 keys at a time (Milakov & Gimelshein 2018). Takes every dtype and head_dim up to 256; it
// reads keys and values once per query head, so it is what the kernels for tensor cores are
// compared with, not what they replace where those apply.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {
namespace {

constexpr int kWarps = 4, kMaxHeadDim = 256, kPieces = kMaxHeadDim / 32;

struct AttentionArguments {
  int64_t q_stride, out_stride, table_stride;
  float scale;
  int sliding_window, sequences, q_heads, kv_heads, head_dim, page_size;
};

// The sequence that holds row t: the last s with cu_q_lens[s] <= t.
__device__ inline int SequenceOf(const int32_t* cu_q_lens, int sequences, int64_t t) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu_q_lens[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Element offset of key `position`'s row of the head in the cache.
__device__ inline int64_t RowOf(const int32_t* pages, int position, int kv_head,
                                const AttentionArguments& a) {
  const int64_t slot =
      int64_t{pages[position / a.page_size]} * a.page_size + position % a.page_size;
  return (slot * a.kv_heads + kv_head) * a.head_dim;
}

template <typename T>
__device__ float Dot(const float* q, const T* k, int d) {
  float sum = 0.0f;
  for (int i = 0; i < d; ++i) sum += q[i] * Float(k[i]);
  return sum;
}

template <typename T>
__global__ void AttentionRows(const T* q, const T* k, const T* v, const int32_t* page_tables,
                              const int32_t* cu_q_lens, const int32_t* kv_lens, T* out,
                              AttentionArguments a) {
  GPU_SHARED(queries, float[kWarps][kMaxHeadDim]);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t t = blockIdx.x;
  const int head = blockIdx.y * kWarps + warp;
  if (head >= a.q_heads) return;  // a whole warp; no block barrier follows
  const int s = SequenceOf(cu_q_lens, a.sequences, t);
  const int last = kv_lens[s] - (cu_q_lens[s + 1] - static_cast<int>(t));  // the row's position
  const int first = a.sliding_window > 0 ? max(0, last - a.sliding_window + 1) : 0;
  const int32_t* pages = page_tables + s * a.table_stride;
  const int kv_head = head / (a.q_heads / a.kv_heads);

  float* query = queries[warp];
  const T* q_row = q + t * a.q_stride + head * a.head_dim;
  for (int i = lane; i < a.head_dim; i += 32) query[i] = Float(q_row[i]) * a.scale;
  __syncwarp();

  float top = -INFINITY, total = 0.0f, sums[kPieces] = {};
  for (int begin = first; begin <= last; begin += 32) {
    const int count = min(32, last + 1 - begin);
    const float score = lane < count
                            ? Dot(query, k + RowOf(pages, begin + lane, kv_head, a), a.head_dim)
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
      const T* row = v + RowOf(pages, begin + j, kv_head, a);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int i = p * 32 + lane;
        if (i < a.head_dim) sums[p] += w * Float(row[i]);
      }
    }
  }
  T* out_row = out + t * a.out_stride + head * a.head_dim;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int i = p * 32 + lane;
    if (i < a.head_dim) out_row[i] = Rounded<T>(sums[p] / total);
  }
}

}  // namespace

void PagedAttention(Stream& stream, ConstTensorView q, const PagedKv& kv, ConstTensorView cu_q_lens,
                    ConstTensorView kv_lens, const AttentionShape& shape, TensorView out) {
  if (q.dim(0) == 0) return;
  const int64_t d = kv.k.dim(3);
  CHECK_LE(d, kMaxHeadDim) << "head_dim";
  const AttentionArguments arguments{.q_stride = q.stride0,
                                     .out_stride = out.stride0,
                                     .table_stride = kv.page_tables.stride0,
                                     .scale = shape.scale,
                                     .sliding_window = static_cast<int>(shape.sliding_window),
                                     .sequences = static_cast<int>(kv_lens.dim(0)),
                                     .q_heads = static_cast<int>(q.dim(1) / d),
                                     .kv_heads = static_cast<int>(kv.k.dim(2)),
                                     .head_dim = static_cast<int>(d),
                                     .page_size = static_cast<int>(kv.k.dim(1))};
  const dim3 grid(static_cast<unsigned>(q.dim(0)),
                  static_cast<unsigned>((arguments.q_heads + kWarps - 1) / kWarps));
  DispatchFloat(q.dtype, [&](auto zero) {
    using T = decltype(zero);
    gpu::Launch({grid, dim3(32, kWarps), 0, NativeHandle(stream)}, AttentionRows<T>,
                static_cast<const T*>(q.data), static_cast<const T*>(kv.k.data),
                static_cast<const T*>(kv.v.data), static_cast<const int32_t*>(kv.page_tables.data),
                static_cast<const int32_t*>(cu_q_lens.data),
                static_cast<const int32_t*>(kv_lens.data), static_cast<T*>(out.data), arguments);
  });
}

}  // namespace trireme::cuda
