// The matmul op: packing, the choice of a kernel, and the plain kernel for what the tensor-core
// ones do not take (fp32, K that is no multiple of 32, unaligned rows).
#include <algorithm>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/matmul_codes.h"
#include "kernels/cuda/matmul_launch.h"
#include "kernels/cuda/matmul_library.h"
#include "kernels/cuda/matmul_select.h"
#include "kernels/quantize.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

// --- anything: 64 x 64 tiles, 16 x 16 threads of 4 x 4, k in steps of 16 ---
constexpr int kTile = 64, kPlainStep = 16;

// An element of x; a code as 256 times itself, for those of W are 256th parts.
template <typename X>
__device__ inline float InputFloat(X x) {
  if constexpr (std::is_same_v<X, E4M3>) {
    return WeightFloat(x) * (kKernelScale * kKernelScale);
  } else {
    return Float(x);
  }
}

// Codes of x lie in W's order.
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
__global__ void __launch_bounds__(256) MatMulPlain(MatMulArguments<T, Y, W, X> a, bool permuted) {
  gpu::WaitForPrevious();
  GPU_SHARED(xs, float[kPlainStep][kTile + 1]);
  GPU_SHARED(ws, float[kPlainStep][kTile + 1]);
  constexpr int kStretch = kStretchOf<W>;
  const int outputs = OutputsOf<kEpilogue>(a);
  const int m0 = blockIdx.y * kTile, y0 = blockIdx.x * Outputs<kEpilogue>(kTile);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sums[4][4] = {};
  for (int k0 = 0; k0 < a.k; k0 += kPlainStep) {
    for (int i = threadIdx.x; i < kTile * kPlainStep; i += 256) {
      const int r = i / kPlainStep, k = i % kPlainStep;
      const bool in_k = k0 + k < a.k;
      const int at = k0 + k;
      const int stored =
          permuted ? at / kStretch * kStretch + PermutedIndexOf<W>(at % kStretch) : at;
      const int x_at = std::is_same_v<X, E4M3> ? stored : at;
      xs[k][r] = in_k && m0 + r < a.rows ? InputFloat(a.x[(m0 + r) * a.x_stride + x_at]) : 0.0f;
      const TileColumn column = TileColumnOf<kEpilogue, kTile / 2>(a.n, y0, r);
      ws[k][r] = in_k && column.output < outputs
                     ? WeightFloat(a.w[int64_t{column.row} * a.k + stored])
                     : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kPlainStep; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += xs[k][ty + 16 * i] * ws[k][tx + 16 * j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < Outputs<kEpilogue>(4); ++j) {
      const int row = m0 + ty + 16 * i, column = y0 + tx + 16 * j;
      if (row >= a.rows || column >= outputs) continue;
      if constexpr (kEpilogue == Epilogue::kSwiGlu) {
        FinishSwiGlu(a, row, column, sums[i][j], sums[i][j + 2]);
      } else {
        Finish<kEpilogue>(a, row, column, sums[i][j]);
      }
    }
  }
}

MatMulDesc DescOf(Stream& stream, ConstTensorView x, const CudaLinear& w, ConstTensorView bias,
                  TensorView y) {
  MatMulDesc desc{.dtype = x.dtype,
                  .rows = x.dim(0),
                  .n = w.n,
                  .permuted = w.permuted,
                  .vectorizable = w.quantizes_activations || Vectorizable(x)};
  if (const MatMulLibrary* const library = LibraryOf(stream); library != nullptr) {
    const bool gated = w.use == LinearUse::kMatMulSwiGlu;  // cuBLASLt writes gate and up
    const int64_t gate_up_bytes = w.n * static_cast<int64_t>(SizeOf(x.dtype));
    desc.cublas_lt = library->Takes(w) && library->RowsWithRoom(LibraryRowBytes(w)) > kFewRowsLimit;
    desc.result_aligned = gated ? gate_up_bytes % 16 == 0 : Vectorizable(y);
    desc.bias_fits =
        !bias || (y.dtype == bias.dtype && reinterpret_cast<uintptr_t>(bias.data) % 16 == 0);
  }
  return desc;
}

// How blocks share k, with such weights and so much room.
KSplit SplitOf(const MatMulRoom& room, const LinearWeight& w) {
  const int64_t bytes = PartsBytes(w.n, w.k);
  if (bytes == 0 || room.bytes() < bytes) return {};
  const KRanges ranges = RangesOf(w.n, w.k);
  auto* const memory = static_cast<char*>(room.data());
  return {.arrived = reinterpret_cast<int32_t*>(memory),
          .parts = reinterpret_cast<float*>(memory + kPartsCounterBytes),
          .ranges = static_cast<int>(ranges.ranges),
          .segments = static_cast<int>(ranges.segments)};
}

// `codes` of x, or none where X is T.
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
void LaunchMatMulRows(Stream& stream, ConstTensorView x, const Codes& codes, const CudaLinear& w,
                      ConstTensorView bias, TensorView y) {
  const gpu::StreamHandle handle = NativeHandle(stream);
  MatMulDesc desc = DescOf(stream, x, w, bias, y);
  if (SelectMatMul(desc) == MatMulKernel::kLibrary) {
    if (LibraryOf(stream)->MatMul(stream, x, codes, w, bias, y)) {
      if constexpr (kEpilogue == Epilogue::kGelu) cuda::Gelu(stream, y);
      return;
    }
    desc.cublas_lt = false;  // it has no algorithm for this one
  }
  const MatMulKernel kernel = SelectMatMul(desc);
  constexpr bool kCodes = std::is_same_v<X, E4M3>;
  const MatMulArguments<T, Y, W, X> a{.x = static_cast<const X*>(kCodes ? codes.codes : x.data),
                                      .w = static_cast<const W*>(w.buffer.data()),
                                      .bias = static_cast<const T*>(bias.data),
                                      .y = static_cast<Y*>(y.data),
                                      .x_stride = kCodes ? w.k : x.stride0,
                                      .y_stride = y.stride0,
                                      .rows = static_cast<int>(x.dim(0)),
                                      .n = static_cast<int>(w.n),
                                      .k = static_cast<int>(w.k),
                                      .segment = static_cast<int>(SegmentOf(w.k)),
                                      .scales = std::is_same_v<W, E4M3> ? w.scales() : nullptr,
                                      .x_scales = codes.scales};
  if constexpr (!std::is_same_v<T, float>) {
    if (kernel == MatMulKernel::kStream) return LaunchMatMulStream<kEpilogue>(handle, a);
    if (kernel != MatMulKernel::kPlain) {
      return LaunchMatMulTiles<kEpilogue>(handle, kernel, SplitOf(PartsRoomOf(stream), w), a);
    }
  }
  const dim3 grid(Blocks(OutputsOf<kEpilogue>(a), Outputs<kEpilogue>(kTile)),
                  Blocks(a.rows, kTile));
  gpu::LaunchDependent({grid, dim3(256), 0, handle}, MatMulPlain<kEpilogue, T, Y, W, X>, a,
                       w.permuted);
}

// What all matmuls share: the choice of a kernel and its launch. W is the stored type.
template <Epilogue kEpilogue, typename T, typename Y, typename W = T>
void LaunchMatMul(Stream& stream, ConstTensorView x, const LinearWeight& weight,
                  ConstTensorView bias, TensorView y) {
  const auto& w = static_cast<const CudaLinear&>(weight);
  const int64_t rows = x.dim(0);
  if (rows == 0) return;
  if constexpr (std::is_same_v<W, E4M3>) {
    if (w.quantizes_activations) {
      const CodesRoom& room = CodesRoomOf(stream);
      const int64_t at_once = room.RowsWithRoom(w.k);
      CHECK_GT(at_once, 0) << "there is no room for codes of x: call ReserveMatMul first";
      for (int64_t row = 0; row < rows; row += at_once) {
        const int64_t count = std::min(at_once, rows - row);
        const ConstTensorView piece = x.Rows(row, count);
        const Codes codes = room.Quantize(NativeHandle(stream), piece, w.permuted);
        LaunchMatMulRows<kEpilogue, T, Y, W, E4M3>(stream, piece, codes, w, bias,
                                                   y.Rows(row, count));
      }
      return;
    }
  }
  LaunchMatMulRows<kEpilogue, T, Y, W, T>(stream, x, {}, w, bias, y);
}

// Elements of rows that are whole stretches: each into the order of matmul_launch.h. W has the size
// of the weight's type.
template <typename W>
void PermuteRows(W* rows, int64_t elements) {
  constexpr int kStretch = kStretchOf<W>;
  W natural[kStretch];
  for (W* stretch = rows; stretch < rows + elements; stretch += kStretch) {
    std::copy(stretch, stretch + kStretch, natural);
    for (int j = 0; j < kStretch; ++j) stretch[PermutedIndexOf<W>(j)] = natural[j];
  }
}

// 8 MiB: long enough for a copy at full speed, short enough to stay in the host's cache.
int64_t StagingRows(int64_t n, int64_t row_bytes) {
  return std::clamp<int64_t>((8 << 20) / row_bytes, 1, n);
}

absl::Status PackRows(Stream& stream, CudaLinear& packed, const RowSource& source) {
  const int64_t n = packed.n, k = packed.k;
  const int64_t row_bytes = k * static_cast<int64_t>(SizeOf(packed.dtype));
  packed.bytes = n * row_bytes;
  packed.permuted = StoredPermuted(packed.dtype, k);
  ASSIGN_OR_RETURN(packed.buffer, stream.device().Allocate(packed.bytes));
  const int64_t rows = StagingRows(n, row_bytes);
  std::vector<char> staging(rows * row_bytes);
  for (int64_t row = 0; row < n; row += rows) {
    const int64_t count = std::min(rows, n - row);
    RETURN_IF_ERROR(source(row, TensorView(staging.data(), packed.dtype, Shape{count, k})));
    if (packed.permuted) PermuteRows(reinterpret_cast<uint16_t*>(staging.data()), count * k);
    stream.Copy(static_cast<char*>(packed.buffer.data()) + row * row_bytes, staging.data(),
                count * row_bytes);
    RETURN_IF_ERROR(stream.Synchronize());  // before the staging buffer is used again
  }
  return absl::OkStatus();
}

// Codes, then the rows' scales.
absl::Status QuantizeRows(Stream& stream, CudaLinear& packed, const RowSource& source,
                          const float* row_maxima) {
  const int64_t n = packed.n, k = packed.k;
  packed.bytes = packed.scales_at() + n * static_cast<int64_t>(sizeof(float));
  packed.permuted = StoredPermuted(DType::kE4M3, k);
  ASSIGN_OR_RETURN(packed.buffer, stream.device().Allocate(packed.bytes));
  const int64_t rows = StagingRows(n, k * static_cast<int64_t>(sizeof(float)));
  std::vector<float> staging(rows * k), scales(n);
  std::vector<E4M3> codes(rows * k);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t count = std::min(rows, n - first);
    RETURN_IF_ERROR(source(first, TensorView(staging.data(), DType::kF32, Shape{count, k})));
    for (int64_t r = 0; r < count; ++r) {
      const float* row = staging.data() + r * k;
      const float scale =
          ScaleOfRow(row_maxima != nullptr ? row_maxima[first + r] : RowMaximum(row, k));
      QuantizeRow(row, k, scale, codes.data() + r * k);
      scales[first + r] = kKernelScale * scale;
    }
    if (packed.permuted) PermuteRows(codes.data(), count * k);
    stream.Copy(static_cast<char*>(packed.buffer.data()) + first * k, codes.data(), count * k);
    RETURN_IF_ERROR(stream.Synchronize());  // before the buffers are used again
  }
  stream.Copy(static_cast<char*>(packed.buffer.data()) + packed.scales_at(), scales.data(),
              n * sizeof(float));
  return stream.Synchronize();
}

}  // namespace

void MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
            TensorView y) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (w.dtype == DType::kE4M3) {
      return y.dtype == DType::kF32
                 ? LaunchMatMul<Epilogue::kStore, T, float, E4M3>(stream, x, w, bias, y)
                 : LaunchMatMul<Epilogue::kStore, T, T, E4M3>(stream, x, w, bias, y);
    }
    y.dtype == DType::kF32 ? LaunchMatMul<Epilogue::kStore, T, float>(stream, x, w, bias, y)
                           : LaunchMatMul<Epilogue::kStore, T, T>(stream, x, w, bias, y);
  });
}

void MatMulSwiGlu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                  TensorView y) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (w.dtype == DType::kE4M3)
      return LaunchMatMul<Epilogue::kSwiGlu, T, T, E4M3>(stream, x, w, bias, y);
    LaunchMatMul<Epilogue::kSwiGlu, T, T>(stream, x, w, bias, y);
  });
}

void MatMulGelu(Stream& stream, ConstTensorView x, const LinearWeight& w, ConstTensorView bias,
                TensorView y) {
  DispatchFloat(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (w.dtype == DType::kE4M3)
      return LaunchMatMul<Epilogue::kGelu, T, T, E4M3>(stream, x, w, bias, y);
    LaunchMatMul<Epilogue::kGelu, T, T>(stream, x, w, bias, y);
  });
}

absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinearFrom(Stream& stream, int64_t n, int64_t k,
                                                             DType dtype, const RowSource& source,
                                                             LinearUse use,
                                                             const float* row_maxima) {
  auto packed = std::make_unique<CudaLinear>();
  packed->use = use;
  packed->n = n;
  packed->k = k;
  packed->dtype = dtype;
  RETURN_IF_ERROR(dtype == DType::kE4M3 ? QuantizeRows(stream, *packed, source, row_maxima)
                                        : PackRows(stream, *packed, source));
  return std::unique_ptr<LinearWeight>(std::move(packed));
}

}  // namespace trireme::cuda
