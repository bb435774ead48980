// q/k norm, rotation and the store to the paged cache in one pass: q, k and v are read once and
// written once. A warp takes one head of one token.
#include <algorithm>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {
namespace {

constexpr int kWarps = 8;

struct RopeArguments {
  int64_t qkv_stride, cos_sin_stride;
  float norm_eps;
  int q_heads, kv_heads, head_dim;
};

// Element i turns with i + D/2; both after the norm where there is one. in and out may be the same.
template <typename T>
__device__ void RotateHead(const T* in, const T* norm, float eps, const float* cos_sin, int d,
                           T* out) {
  const int lane = threadIdx.x, half = d / 2;
  float scale = 1.0f;
  if (norm != nullptr) {
    float sum = 0.0f;
    for (int i = lane; i < d; i += 32) {
      const float x = Float(in[i]);
      sum += x * x;
    }
    scale = rsqrtf(gpu::WarpSum(sum) / static_cast<float>(d) + eps);
    __syncwarp();  // in may be out: all lanes have read before one writes
  }
  for (int i = lane; i < half; i += 32) {
    float a = Float(in[i]), b = Float(in[i + half]);
    if (norm != nullptr) a = a * scale * Float(norm[i]), b = b * scale * Float(norm[i + half]);
    const float c = cos_sin[i], s = cos_sin[half + i];
    out[i] = Rounded<T>(a * c - b * s);
    out[i + half] = Rounded<T>(b * c + a * s);
  }
}

// Block (32, kWarps) a token: its warps share out the q heads, the k heads and the v heads.
template <typename T>
__global__ void RopeAndStore(T* qkv, const int32_t* positions, const int64_t* slots,
                             const float* cos_sin, const T* q_norm, const T* k_norm, T* k_cache,
                             T* v_cache, RopeArguments a) {
  gpu::WaitForPrevious();
  T* row = qkv + blockIdx.x * a.qkv_stride;
  const float* angles = cos_sin + positions[blockIdx.x] * a.cos_sin_stride;
  const int64_t slot = slots[blockIdx.x], d = a.head_dim;
  for (int h = threadIdx.y; h < a.q_heads + 2 * a.kv_heads; h += kWarps) {
    T* in = row + h * d;
    if (h < a.q_heads) {
      RotateHead(in, q_norm, a.norm_eps, angles, a.head_dim, in);
      continue;
    }
    if (slot < 0) continue;  // the same for the whole block
    const int kv_head = (h - a.q_heads) % a.kv_heads;
    const int64_t to = (slot * a.kv_heads + kv_head) * d;  // [page, offset] is the slot itself
    if (h < a.q_heads + a.kv_heads) {
      RotateHead(in, k_norm, a.norm_eps, angles, a.head_dim, k_cache + to);
    } else {
      for (int i = threadIdx.x; i < a.head_dim; i += 32) v_cache[to + i] = in[i];
    }
  }
}

}  // namespace

void RopeAndStoreKv(Stream& stream, TensorView qkv, ConstTensorView positions,
                    ConstTensorView slot_mapping, const RopeParams& rope, int64_t q_heads,
                    const PagedKv& kv) {
  if (qkv.dim(0) == 0) return;
  const RopeArguments arguments{.qkv_stride = qkv.stride0,
                                .cos_sin_stride = rope.cos_sin.stride0,
                                .norm_eps = rope.norm_eps,
                                .q_heads = static_cast<int>(q_heads),
                                .kv_heads = static_cast<int>(kv.k.dim(2)),
                                .head_dim = static_cast<int>(kv.k.dim(3))};
  CHECK(kv.k.contiguous() && kv.v.contiguous()) << "the cache has gaps between its pages";
  DispatchFloat(qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    gpu::LaunchDependent(
        {dim3(static_cast<unsigned>(qkv.dim(0))), dim3(32, kWarps), 0, NativeHandle(stream)},
        RopeAndStore<T>, static_cast<T*>(qkv.data), static_cast<const int32_t*>(positions.data),
        static_cast<const int64_t*>(slot_mapping.data),
        static_cast<const float*>(rope.cos_sin.data), static_cast<const T*>(rope.q_norm.data),
        static_cast<const T*>(rope.k_norm.data), static_cast<T*>(kv.k.data),
        static_cast<T*>(kv.v.data), arguments);
  });
}

}  // namespace trireme::cuda
