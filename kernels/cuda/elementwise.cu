// Row-wise ops: norms, sums, GELU, SwiGLU's product, look-ups. Each is bound by memory: a block a
// row, 16 bytes a thread and load.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/matmul_launch.h"
#include "kernels/cuda/norm_row.cuh"
#include "kernels/cuda/primitives.cuh"

namespace trireme::cuda {
namespace {

// x += delta where kAdd; out = the norm of x.
template <typename T, int V, NormKind kKind, bool kAdd>
__global__ void NormRows(T* x, int64_t x_stride, const T* delta, int64_t delta_stride,
                         NormWeights<T> norm, T* out, int64_t out_stride, int h) {
  gpu::WaitForPrevious();
  delta += blockIdx.x * delta_stride;
  NormRow<T, V, kKind, kAdd>(
      x + blockIdx.x * x_stride, [delta](int i, float(&b)[V]) { LoadFloats<V>(delta + i, b); },
      norm, out + blockIdx.x * out_stride, h);
}

template <typename T, int V>
__global__ void AddRows(T* x, int64_t x_stride, const T* delta, int64_t delta_stride, int h) {
  gpu::WaitForPrevious();
  float a[V], b[V];
  for (int i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    LoadFloats<V>(x + blockIdx.x * x_stride + i, a);
    LoadFloats<V>(delta + blockIdx.x * delta_stride + i, b);
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] += b[v];
    StoreRounded<V>(x + blockIdx.x * x_stride + i, a);
  }
}

template <typename T, int V>
__global__ void GeluRows(T* x, int64_t stride, int n) {
  gpu::WaitForPrevious();
  x += blockIdx.x * stride;
  float a[V];
  for (int i = threadIdx.x * V; i < n; i += blockDim.x * V) {
    LoadFloats<V>(x + i, a);
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] = GeluOf(a[v]);
    StoreRounded<V>(x + i, a);
  }
}

template <typename T, int V>
__global__ void SiluAndMulRows(const T* gate_up, int64_t in_stride, T* out, int64_t out_stride,
                               int n) {
  gpu::WaitForPrevious();
  gate_up += blockIdx.x * in_stride;
  float gate[V], up[V];
  for (int i = threadIdx.x * V; i < n; i += blockDim.x * V) {
    LoadFloats<V>(gate_up + i, gate);
    LoadFloats<V>(gate_up + n + i, up);
#pragma unroll
    for (int v = 0; v < V; ++v) gate[v] = SwiGlu(gate[v], up[v]);
    StoreRounded<V>(out + blockIdx.x * out_stride + i, gate);
  }
}

// out[t] = row ids[t] - first of the table, zeros where that is none of its `rows`.
template <typename T, int V>
__global__ void CopyRows(const int32_t* ids, int64_t first, const T* table, int64_t table_stride,
                         int64_t rows, T* out, int64_t out_stride, int h) {
  gpu::WaitForPrevious();
  const int64_t row = ids[blockIdx.x] - first;
  const bool inside = row >= 0 && row < rows;
  out += blockIdx.x * out_stride;
  for (int i = threadIdx.x * V; i < h; i += blockDim.x * V) {
    Pack<T, V> pack{};
    if (inside) pack = *reinterpret_cast<const Pack<T, V>*>(table + row * table_stride + i);
    *reinterpret_cast<Pack<T, V>*>(out + i) = pack;
  }
}

// The same from a table stored for the tensor cores (matmul_launch.h).
template <typename T>
__global__ void CopyPermutedRows(const int32_t* ids, int64_t first, const T* table, int64_t rows,
                                 T* out, int64_t out_stride, int h) {
  gpu::WaitForPrevious();
  const int64_t row = ids[blockIdx.x] - first;
  const bool inside = row >= 0 && row < rows;
  out += blockIdx.x * out_stride;
  for (int i = threadIdx.x; i < h; i += blockDim.x) {
    const int stretch = i / kPermutedBlock * kPermutedBlock;
    out[i] =
        inside ? table[row * h + stretch + PermutedIndex(i % kPermutedBlock)] : Rounded<T>(0.0f);
  }
}

template <bool kAdd>
void LaunchNorm(Stream& stream, void* x, const ConstTensorView& shape, ConstTensorView delta,
                const NormParams& norm, TensorView out) {
  if (out.dim(0) == 0) return;
  const bool vector = Vectorizable(shape) && Vectorizable(norm) && Vectorizable(out) &&
                      (!kAdd || Vectorizable(delta));
  DispatchFloat(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(vector, [&](auto v) {
      DispatchNorm(norm.kind, [&](auto kind) {
        const int64_t h = out.dim(1);
        gpu::LaunchDependent({dim3(static_cast<unsigned>(out.dim(0))), dim3(RowThreads(h, v)), 0,
                              NativeHandle(stream)},
                             NormRows<T, v(), kind(), kAdd>, static_cast<T*>(x), shape.stride0,
                             static_cast<const T*>(delta.data), delta.stride0, WeightsOf<T>(norm),
                             static_cast<T*>(out.data), out.stride0, static_cast<int>(h));
      });
    });
  });
}

void LaunchCopy(Stream& stream, ConstTensorView ids, int64_t first, ConstTensorView table,
                TensorView out) {
  if (out.dim(0) == 0) return;
  DispatchFloat(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(Vectorizable(table) && Vectorizable(out), [&](auto v) {
      gpu::LaunchDependent({dim3(static_cast<unsigned>(out.dim(0))),
                            dim3(RowThreads(out.dim(1), v)), 0, NativeHandle(stream)},
                           CopyRows<T, v()>, static_cast<const int32_t*>(ids.data), first,
                           static_cast<const T*>(table.data), table.stride0, table.dim(0),
                           static_cast<T*>(out.data), out.stride0, static_cast<int>(out.dim(1)));
    });
  });
}

}  // namespace

void Embedding(Stream& stream, ConstTensorView token_ids, const LinearWeight& table,
               int64_t vocab_begin, TensorView out) {
  const auto& rows = static_cast<const CudaLinear&>(table);
  if (!rows.permuted) {
    return LaunchCopy(stream, token_ids, vocab_begin,
                      ConstTensorView(rows.buffer.data(), table.dtype, {table.n, table.k}), out);
  }
  if (out.dim(0) == 0) return;
  DispatchFloat(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    gpu::LaunchDependent({dim3(static_cast<unsigned>(out.dim(0))), dim3(RowThreads(out.dim(1), 2)),
                          0, NativeHandle(stream)},
                         CopyPermutedRows<T>, static_cast<const int32_t*>(token_ids.data),
                         vocab_begin, static_cast<const T*>(rows.buffer.data()), table.n,
                         static_cast<T*>(out.data), out.stride0, static_cast<int>(out.dim(1)));
  });
}

void GatherRows(Stream& stream, ConstTensorView x, ConstTensorView indices, TensorView out) {
  LaunchCopy(stream, indices, 0, x, out);
}

void Norm(Stream& stream, ConstTensorView x, const NormParams& norm, TensorView out) {
  LaunchNorm<false>(stream, const_cast<void*>(x.data), x, x, norm, out);
}

void AddNorm(Stream& stream, TensorView residual, ConstTensorView delta, const NormParams& norm,
             TensorView out) {
  LaunchNorm<true>(stream, residual.data, residual, delta, norm, out);
}

void Add(Stream& stream, TensorView x, ConstTensorView delta) {
  if (x.dim(0) == 0) return;
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(Vectorizable(x) && Vectorizable(delta), [&](auto v) {
      gpu::LaunchDependent({dim3(static_cast<unsigned>(x.dim(0))), dim3(RowThreads(x.dim(1), v)), 0,
                            NativeHandle(stream)},
                           AddRows<T, v()>, static_cast<T*>(x.data), x.stride0,
                           static_cast<const T*>(delta.data), delta.stride0,
                           static_cast<int>(x.dim(1)));
    });
  });
}

void Gelu(Stream& stream, TensorView x) {
  if (x.dim(0) == 0) return;
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(Vectorizable(x), [&](auto v) {
      gpu::LaunchDependent({dim3(static_cast<unsigned>(x.dim(0))), dim3(RowThreads(x.dim(1), v)), 0,
                            NativeHandle(stream)},
                           GeluRows<T, v()>, static_cast<T*>(x.data), x.stride0,
                           static_cast<int>(x.dim(1)));
    });
  });
}

void SiluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out) {
  if (out.dim(0) == 0) return;
  // `up` begins n elements after `gate`: where out's rows are whole 16-byte pieces, so is that.
  DispatchFloat(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    DispatchVector<T>(Vectorizable(gate_up) && Vectorizable(out), [&](auto v) {
      gpu::LaunchDependent({dim3(static_cast<unsigned>(out.dim(0))),
                            dim3(RowThreads(out.dim(1), v)), 0, NativeHandle(stream)},
                           SiluAndMulRows<T, v()>, static_cast<const T*>(gate_up.data),
                           gate_up.stride0, static_cast<T*>(out.data), out.stride0,
                           static_cast<int>(out.dim(1)));
    });
  });
}

}  // namespace trireme::cuda
