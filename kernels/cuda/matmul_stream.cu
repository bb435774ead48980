// y = x W^T for up to 16 rows, one mma's worth: bound by reading W. A warp takes 16 columns and
// every kWarps-th segment of k; W goes from memory into registers, 256 bytes of each column ahead
// of the mma (128 k's, of e4m3 256), where e4m3 becomes the type of x; the warps' segments meet in
// shared memory and are added in order.
//
// In flight: 16 columns x 256 bytes = 4 KiB a warp, 16 warps an SM at 128 registers: 64 KiB,
// where 4.8 TB/s x 0.7 us / 132 SMs = 25 KiB are needed.
#include <algorithm>

#include "kernels/cuda/matmul_launch.h"

namespace trireme::cuda {
namespace {

constexpr int kWarps = 8, kColumns = 16, kBlocks = 4;
template <typename W>
constexpr int kAheadOf = kBlocks* kStretchOf<W>;

// One warp's columns of W, a chunk of kAheadOf k's at a time: column lane / 4 + 8 i, the lane's 16
// bytes of each permuted stretch.
struct WeightChunk {
  uint4 w[2][kBlocks];
};

// The chunks that a warp walks through: those of segments first, first + step, ... of `length` k's.
template <int kAhead>
struct Cursor {
  int segment, k;
  __device__ bool inside(int segments) const { return segment < segments; }
  __device__ int end(int length, int k_end) const { return min((segment + 1) * length, k_end); }
  __device__ Cursor Next(int length, int k_end, int step) const {
    if (k + kAhead < end(length, k_end)) return {segment, k + kAhead};
    return {segment + step, (segment + step) * length};
  }
};

template <typename W>
__device__ inline void LoadWeights(const W* const (&rows)[2], int k, int k_end,
                                   WeightChunk& chunk) {
  const int lane = gpu::LaneId();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = k + b * kStretchOf<W>;
      chunk.w[i][b] =
          at < k_end ? gpu::LoadStreaming(reinterpret_cast<const uint4*>(rows[i] + at) + lane % 4)
                     : uint4{};
    }
  }
}

// Rows lane / 4 and lane / 4 + 8 of x as A fragments of one mma from k on.
template <typename T>
__device__ inline void LoadInputs(const T* const (&x)[2], int k, uint32_t (&a)[4]) {
  const int column = k + gpu::LaneId() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      a[part * 2 + i] =
          x[i] == nullptr ? 0u : *reinterpret_cast<const uint32_t*>(x[i] + column + part * 8);
    }
  }
}

template <typename W, typename T>
__device__ inline void MultiplyChunk(const T* const (&x)[2], const WeightChunk& chunk, int k,
                                     int k_end, float (&sums)[2][4]) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    constexpr int kMmas = kStretchOf<W> / 16;
    const int at = k + b * kStretchOf<W>;
    if (at >= k_end) break;
    uint32_t a[kMmas][4];
#pragma unroll
    for (int m = 0; m < kMmas; ++m) LoadInputs(x, at + m * 16, a[m]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kMmas; ++m) {
        uint32_t w[2];
        WeightFragment<T, W>(chunk.w[i][b], m, w);
        gpu::Mma(sums[i], a[m], w, T{});
      }
    }
  }
}

// Of codes: x's fragments lie as W's do. A half of a lane's bytes, one mma, at a time: more of them
// would not fit the registers.
template <typename W>
__device__ inline void MultiplyChunk(const E4M3* const (&x)[2], const WeightChunk& chunk, int k,
                                     int k_end, float (&sums)[2][4]) {
  const int lane_at = gpu::LaneId() % 4 * 16;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int at = k + b * kStretchOf<W>;
    if (at >= k_end) break;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint2 rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[i] = x[i] == nullptr ? uint2{} : Load8(x[i] + at + lane_at + m * 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4& w = chunk.w[i][b];
        MultiplyCodes(sums[i], rows, m == 0 ? uint2{w.x, w.y} : uint2{w.z, w.w});
      }
    }
  }
}

__device__ inline float SumOfSegments(const float* from, int segments) {
  float sum = 0.0f;
  for (int s = 0; s < segments; ++s) sum = __fadd_rn(sum, from[s * 16 * kColumns]);
  return sum;
}

// warps_per_group warps share 16 columns; 1, 2, 4 or 8.
template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
__global__ void __launch_bounds__(kWarps * 32, 2)
    MatMulStream(MatMulArguments<T, Y, W, X> a, int warps_per_group) {
  GPU_DYNAMIC_SHARED(partial, float);  // [groups, segments, 16 rows, 16 columns]
  const int lane = gpu::LaneId(), warp = threadIdx.x / 32;
  const int groups = kWarps / warps_per_group, group = warp / warps_per_group;
  const int segments = (a.k + a.segment - 1) / a.segment;
  constexpr int kOutputs = Outputs<kEpilogue>(kColumns);
  const int outputs = OutputsOf<kEpilogue>(a);
  const int block_y0 = static_cast<int>(blockIdx.x) * groups * kOutputs;
  const W* w[2];
  const X* x[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Columns beyond the last read the last row of W and are not written.
    const TileColumn column =
        TileColumnOf<kEpilogue, 8>(a.n, block_y0 + group * kOutputs, i * 8 + lane / 4);
    w[i] = a.w + int64_t{column.output < outputs ? column.row : a.n - 1} * a.k;
    const int row = lane / 4 + i * 8;
    x[i] = row < a.rows ? a.x + row * a.x_stride : nullptr;
  }
  Cursor<kAheadOf<W>> at{warp % warps_per_group, warp % warps_per_group * a.segment};
  WeightChunk chunk, next_chunk;
  float sums[2][4] = {};
  // The first of the weights come while the kernel before this one ends.
  if (at.inside(segments)) LoadWeights(w, at.k, at.end(a.segment, a.k), chunk);
  gpu::WaitForPrevious();
  while (at.inside(segments)) {
    const auto next = at.Next(a.segment, a.k, warps_per_group);
    if (next.inside(segments)) LoadWeights(w, next.k, next.end(a.segment, a.k), next_chunk);
    MultiplyChunk<W>(x, chunk, at.k, at.end(a.segment, a.k), sums);
    if (next.segment != at.segment) {
      float* to = partial + (group * segments + at.segment) * 16 * kColumns;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          to[(lane / 4 + part / 2 * 8) * kColumns + i * 8 + lane % 4 * 2 + part % 2] =
              sums[i][part];
          sums[i][part] = 0.0f;
        }
      }
    }
    chunk = next_chunk;
    at = next;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups * a.rows * kOutputs; i += kWarps * 32) {
    const int g = i / (a.rows * kOutputs), row = i / kOutputs % a.rows, c = i % kOutputs;
    const int column = block_y0 + g * kOutputs + c;
    if (column >= outputs) continue;
    const float* from = partial + (g * segments * 16 + row) * kColumns + c;
    if constexpr (kEpilogue == Epilogue::kSwiGlu) {
      FinishSwiGlu(a, row, column, SumOfSegments(from, segments),
                   SumOfSegments(from + 8, segments));
    } else {
      Finish<kEpilogue>(a, row, column, SumOfSegments(from, segments));
    }
  }
}

}  // namespace

template <Epilogue kEpilogue, typename T, typename Y, typename W, typename X>
void LaunchMatMulStream(gpu::StreamHandle handle, const MatMulArguments<T, Y, W, X>& a) {
  const int segments = (a.k + a.segment - 1) / a.segment;
  int warps_per_group = 1;
  while (warps_per_group < kWarps && warps_per_group < segments) warps_per_group *= 2;
  const int groups = kWarps / warps_per_group, columns = groups * kColumns;
  const size_t smem = sizeof(float) * groups * segments * 16 * kColumns;
  gpu::LaunchDependent({dim3(Blocks(OutputsOf<kEpilogue>(a), Outputs<kEpilogue>(columns))),
                        dim3(kWarps * 32), smem, handle},
                       MatMulStream<kEpilogue, T, Y, W, X>, a, warps_per_group);
}

template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16>&);
template void LaunchMatMulStream<Epilogue::kStore>(gpu::StreamHandle,
                                                   const MatMulArguments<__nv_bfloat16, float>&);
template void LaunchMatMulStream<Epilogue::kStore>(gpu::StreamHandle,
                                                   const MatMulArguments<__half, __half>&);
template void LaunchMatMulStream<Epilogue::kStore>(gpu::StreamHandle,
                                                   const MatMulArguments<__half, float>&);
template void LaunchMatMulStream<Epilogue::kSwiGlu>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16>&);
template void LaunchMatMulStream<Epilogue::kSwiGlu>(gpu::StreamHandle,
                                                    const MatMulArguments<__half, __half>&);
template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, float, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(gpu::StreamHandle,
                                                   const MatMulArguments<__half, __half, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(gpu::StreamHandle,
                                                   const MatMulArguments<__half, float, E4M3>&);
template void LaunchMatMulStream<Epilogue::kSwiGlu>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3>&);
template void LaunchMatMulStream<Epilogue::kSwiGlu>(gpu::StreamHandle,
                                                    const MatMulArguments<__half, __half, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, float, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__half, __half, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kStore>(
    gpu::StreamHandle, const MatMulArguments<__half, float, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kSwiGlu>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kSwiGlu>(
    gpu::StreamHandle, const MatMulArguments<__half, __half, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kGelu>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16>&);
template void LaunchMatMulStream<Epilogue::kGelu>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3>&);
template void LaunchMatMulStream<Epilogue::kGelu>(gpu::StreamHandle,
                                                  const MatMulArguments<__half, __half>&);
template void LaunchMatMulStream<Epilogue::kGelu>(gpu::StreamHandle,
                                                  const MatMulArguments<__half, __half, E4M3>&);
template void LaunchMatMulStream<Epilogue::kGelu>(
    gpu::StreamHandle, const MatMulArguments<__nv_bfloat16, __nv_bfloat16, E4M3, E4M3>&);
template void LaunchMatMulStream<Epilogue::kGelu>(
    gpu::StreamHandle, const MatMulArguments<__half, __half, E4M3, E4M3>&);

}  // namespace trireme::cuda
