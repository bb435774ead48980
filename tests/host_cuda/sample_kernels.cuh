// Kernels with and without planted faults, for the tests of the emulator itself.
#pragma once

#include "kernels/cuda/gpu.h"

namespace host_cuda_samples {

// Sum of a block by a tree in shared memory. kSync = false: a step may read before its input is
// written.
template <bool kSync>
__global__ void TreeSum(const float* x, float* out) {
  GPU_DYNAMIC_SHARED(s, float);
  s[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    if (kSync) __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(out, s[0]);
}

// Passes values on to the left. Without the second barrier a value may be overwritten before its
// neighbour has read it.
template <bool kSecondBarrier>
__global__ void Rotate(int* x, int rounds) {
  GPU_SHARED(s, int[256]);
  int v = x[threadIdx.x];
  for (int r = 0; r < rounds; ++r) {
    s[threadIdx.x] = v;
    __syncthreads();
    v = s[(threadIdx.x + 1) % blockDim.x];
    if (kSecondBarrier) __syncthreads();
  }
  x[threadIdx.x] = v;
}

// Launched as a dependent of another; kWaits = false: one thread forgets to wait for it.
template <bool kWaits>
__global__ void Dependent(int* x) {
  if (kWaits || threadIdx.x != 5) gpu::WaitForPrevious();
  x[threadIdx.x] += 1;
}

// Half of the threads miss the barrier.
__global__ inline void Divergent(int* x) {
  if (threadIdx.x % 64 < 32) {
    __syncthreads();
    x[threadIdx.x] = 1;
  }
}

__global__ inline void OutOfBounds(float* out) {
  GPU_SHARED(s, float[64]);
  s[threadIdx.x + 1] = 1;
  __syncthreads();
  if (threadIdx.x == 0) *out = s[1];
}

// out[i] = x[i] by way of an asynchronous copy. kWait = false: read before it has arrived.
template <bool kWait>
__global__ void CopyAsync(const float* x, float* out) {
  GPU_SHARED(s, float[128]);
  gpu::CpAsync16(&s[threadIdx.x * 4], x + threadIdx.x * 4);
  gpu::CpAsyncCommit();
  if (kWait) gpu::CpAsyncWait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = s[threadIdx.x * 4 + i];
  gpu::CpAsyncWait<0>();
}

// Addresses and barriers that a chip takes only as they must be. 0: right.
enum class Wrong {
  kNothing,
  kLdMatrixRow,
  kLdMatrixMemory,
  kCopySource,
  kCopyTarget,
  kBarrierCount
};
template <Wrong kWrong>
__global__ void Addresses(const uint16_t* x, uint32_t* out) {
  GPU_SHARED(s, uint16_t[32][8]);
  const int lane = gpu::LaneId();
  const int off = kWrong == Wrong::kCopySource && lane == 3 ? 2 : 0;
  void* const to = kWrong == Wrong::kCopyTarget && lane == 3 ? static_cast<void*>(out) : s[lane];
  gpu::CpAsync16(to, x + lane * 8 + off);
  gpu::CpAsyncCommit();
  gpu::CpAsyncWait<0>();
  gpu::NamedBarrier(1, kWrong == Wrong::kBarrierCount ? 31 : 32);
  uint32_t r[4];
  gpu::LdMatrixX4(r, kWrong == Wrong::kLdMatrixRow && lane == 3      ? s[lane] + 1
                     : kWrong == Wrong::kLdMatrixMemory && lane == 3 ? x
                                                                     : s[lane]);
  out[lane] = r[0];
}

// Reads from a lane that has left.
__global__ inline void ShuffleFromAbsentLane(int* x) {
  if (threadIdx.x >= 16) return;
  x[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 20);
}

// Lane l votes whether l is odd, and adds its number to its right neighbour's.
__global__ inline void Vote(uint32_t* odd, int* sums) {
  const int lane = gpu::LaneId();
  const uint32_t ballot = __ballot_sync(0xffffffffu, lane % 2);
  odd[threadIdx.x] = ballot;
  sums[threadIdx.x] = lane + __shfl_down_sync(0xffffffffu, lane, 1);
}

// c [16, 8] = a [16, 16] b [8, 16]^T by one mma, operands through ldmatrix.
template <typename T>
__global__ void OneMma(const T* a, const T* b, float* c) {
  GPU_SHARED(as, T[16][24]);
  GPU_SHARED(bs, T[16][24]);
  const int lane = gpu::LaneId();
  for (int i = lane; i < 256; i += 32) {
    as[i / 16][i % 16] = a[i];
    bs[i / 16][i % 16] = i < 128 ? b[i] : T(0.0f);
  }
  __syncwarp();
  uint32_t x[4], w[4];
  gpu::LdMatrixX4(x, &as[lane % 16][lane / 16 * 8]);
  gpu::LdMatrixX4(w, &bs[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  float sums[4] = {};
  const uint32_t pair[2] = {w[0], w[1]};
  gpu::Mma(sums, x, pair, T{});
  for (int e = 0; e < 4; ++e) {
    c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sums[e];
  }
}

// The same of codes a [16, 32] and b [8, 32], a register four neighbouring bytes of a row.
template <bool kByHalves>
__global__ void OneMmaE4M3(const uint8_t* a, const uint8_t* b, float* c) {
  const int lane = gpu::LaneId();
  const auto codes = [lane](const uint8_t* rows, int row, int half) {
    return *reinterpret_cast<const uint32_t*>(rows + (row + lane / 4) * 32 + half * 16 +
                                              lane % 4 * 4);
  };
  const uint32_t x[4] = {codes(a, 0, 0), codes(a, 8, 0), codes(a, 0, 1), codes(a, 8, 1)};
  const uint32_t w[2] = {codes(b, 0, 0), codes(b, 0, 1)};
  float sums[4] = {};
  kByHalves ? gpu::MmaE4M3ByHalves(sums, x, w) : gpu::MmaE4M3(sums, x, w);
  for (int e = 0; e < 4; ++e) {
    c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sums[e];
  }
}

}  // namespace host_cuda_samples
