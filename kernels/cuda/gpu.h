// The one CUDA header that kernels include. The same source then compiles with nvcc for the device
// and with a host compiler for the emulator in tests/host_cuda, whose header the build names in
// TRIREME_HOST_CUDA. Everything that has no portable CUDA C++ spelling (launch, shared memory, PTX)
// is wrapped here, and PTX is nowhere else.
//
// Kernels that both sides take: no <<<>>> and no asm outside this file, shared memory through the
// two macros, every thread reaches every barrier, full-warp masks, no cooperative groups.
#pragma once

#include "kernels/check.h"
#include "kernels/dtype.h"

#if !defined(TRIREME_HOST_CUDA)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "kernels/cuda/stream_errors.h"
#else
#include TRIREME_HOST_CUDA
#endif

// GPU_SHARED(name, type): block-wide variable, e.g. GPU_SHARED(part, float[32]).
// GPU_DYNAMIC_SHARED(name, type): typed view of the dynamic shared memory.
#if !defined(TRIREME_HOST_CUDA)
#define GPU_SHARED(name, ...)   \
  using name##_t = __VA_ARGS__; \
  __shared__ __align__(128) name##_t name
#define GPU_DYNAMIC_SHARED(name, ...)                          \
  extern __shared__ __align__(1024) unsigned char gpu_smem_[]; \
  __VA_ARGS__* name = reinterpret_cast<__VA_ARGS__*>(gpu_smem_)
#else
#define GPU_SHARED(name, ...)        \
  using name##_t = __VA_ARGS__;      \
  static const char name##_tag_ = 0; \
  name##_t& name = *static_cast<name##_t*>(host_cuda::StaticShared(&name##_tag_, sizeof(name##_t)))
#define GPU_DYNAMIC_SHARED(name, ...) \
  auto* name = static_cast<__VA_ARGS__*>(host_cuda::DynamicShared())
#endif

namespace gpu {

#if !defined(TRIREME_HOST_CUDA)

using StreamHandle = cudaStream_t;

// Whether LaunchDependent lets kernels overlap: set when the device is opened, before it has
// streams.
inline bool& DependentLaunches() {
  static bool enabled = false;
  return enabled;
}

#if defined(__CUDACC__)  // the backend's host sources need no more than the handle

struct Config {
  dim3 grid, block;
  size_t dynamic_smem = 0;
  StreamHandle stream = nullptr;
};

// What goes wrong stays with the stream (stream_errors.h). Of the call itself, not
// cudaGetLastError's, which also gives what others left there.
template <class... P, class... A>
void Enqueue(const Config& c, cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(P...),
             A&&... args) {
  if (!MayEnqueue(c.stream)) return;
  if (c.dynamic_smem > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(c.dynamic_smem));
    CheckLaunch(c.stream, error);
    if (error != cudaSuccess) return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = c.grid;
  config.blockDim = c.block;
  config.dynamicSmemBytes = c.dynamic_smem;
  config.stream = c.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  CheckLaunch(c.stream, cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

// Enqueues the kernel.
template <class... P, class... A>
void Launch(const Config& c, void (*kernel)(P...), A&&... args) {
  Enqueue(c, nullptr, 0, kernel, static_cast<A&&>(args)...);
}

// Enqueues a kernel all of whose threads call WaitForPrevious. With DependentLaunches its blocks
// come to the chip as soon as those of the kernel before it in the stream have all come, and not
// when that one has ended (CUDA's programmatic dependent launch; the same in a captured graph).
template <class... P, class... A>
void LaunchDependent(const Config& c, void (*kernel)(P...), A&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  Enqueue(c, &attribute, DependentLaunches() ? 1 : 0, kernel, static_cast<A&&>(args)...);
}

// Enqueues a kernel, likewise dependent, whose blocks wait for those of other launches, on other
// GPUs: all of them must fit on the chip at once.
template <class... P, class... A>
void LaunchResident(const Config& c, void (*kernel)(P...), A&&... args) {
  LaunchDependent(c, kernel, static_cast<A&&>(args)...);
}

// Why the calling thread's current GPU cannot run the kernel; empty: it can.
template <class... P>
std::string WhyNoCode(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Lets the blocks of the next kernel come, and waits until the kernel before has ended and all that
// it wrote can be seen. In front of it a kernel may read only what no kernel of a step writes:
// weights. In order, through any number of kernels: each ends after it has waited itself.
__device__ inline void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline int LaneId() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31;
}
__device__ inline uint32_t SmemAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a * b for one 16x8x16 tile, fp32 accumulators (sm_80 and later). The fragments are those of
// the PTX manual, "Matrix fragments for mma.m16n8k16".
__device__ inline void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           __nv_bfloat16 /*element type*/) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void MmaE4M3ByHalves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// The same for one 16x8x32 tile of e4m3: "Matrix fragments for mma.m16n8k32", four neighbours along
// k in a register. Codes are not NaN. Sums are fp32, as all are: for 9.0 and 10.0 ptxas makes
// conversions and two mma of half precision of the instruction. Where tensor cores take e4m3 from
// registers themselves (8.9, 12.0) a sum has fewer bits, so these go by halves too.
__device__ inline void MmaE4M3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  MmaE4M3ByHalves(d, a, b);
#endif
}
// Four 8x8 b16 matrices; lane l gives the address of row l%8 of matrix l/8.
__device__ inline void LdMatrixX4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SmemAddress(row))
               : "memory");
}
__device__ inline void LdMatrixX4Trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SmemAddress(row))
               : "memory");
}
// 16 bytes global to shared, the last 16 - valid of them zero.
__device__ inline void CpAsync16(void* dst, const void* src, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SmemAddress(dst)), "l"(src),
               "r"(valid)
               : "memory");
}
__device__ inline void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestLeft>
__device__ inline void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestLeft) : "memory");
}
// 16 bytes that are read once.
__device__ inline uint4 LoadStreaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// 2^x, to 2 units in the last place; tiny results are zero.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// One special function; within 2^-10.9 relative.
__device__ inline float Tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two elements, rounded to nearest even, the first in the low half.
__device__ inline uint32_t RoundedPair(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t RoundedPair(float first, float second, __half) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// Products of the elements of two pairs; subnormal numbers are taken and given.
__device__ inline uint32_t MulPair(uint32_t a, uint32_t b, __nv_bfloat16) {
  constexpr uint32_t kMinusZeros = 0x80008000u;  // what leaves every product as it is
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(kMinusZeros));
  return d;
}
__device__ inline uint32_t MulPair(uint32_t a, uint32_t b, __half) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Two numbers as e4m3, rounded to nearest even, the first in the low byte. Neither is NaN.
__device__ inline uint32_t PairOfE4M3(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return trireme::FromFloat<trireme::E4M3>(first).bits |
         uint32_t{trireme::FromFloat<trireme::E4M3>(second).bits} << 8;
#endif
}
// Barrier `id` (1..15) among `count` threads of the block.
__device__ inline void NamedBarrier(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
// A flag between GPUs. What this thread wrote before StoreFlag, and what others of its block wrote
// before a barrier ahead of it, is seen by who has loaded the value, and behind a barrier by its
// block.
__device__ inline void StoreFlag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ inline uint64_t LoadFlag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
// Words that others change meanwhile, with no order among them.
__device__ inline uint64_t LoadRelaxed(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline uint32_t LoadRelaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline void AddRelaxed(uint64_t* p, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
// In a loop that waits for a flag.
__device__ inline void SpinPause() {}

#endif  // __CUDACC__

#else

using StreamHandle = void*;
using host_cuda::Config;
using host_cuda::LaneId;
using host_cuda::Launch;
using host_cuda::LaunchDependent;
using host_cuda::LaunchResident;
using host_cuda::SpinPause;
using host_cuda::WaitForPrevious;

inline void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                HC_LOC) {
  host_cuda::Mma(d, a, b, host_cuda::Element::kBF16, loc);
}
inline void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half, HC_LOC) {
  host_cuda::Mma(d, a, b, host_cuda::Element::kF16, loc);
}
inline void MmaE4M3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HC_LOC) {
  host_cuda::Mma(d, a, b, host_cuda::Element::kE4M3, loc);
}
template <class... P>
std::string WhyNoCode(void (*)(P...)) {
  return "";
}
inline uint4 LoadStreaming(const uint4* p) { return *p; }
inline float Exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float Tanh(float x) { return std::tanh(x); }
template <class T>
uint32_t RoundedPair(float first, float second, T) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half(first)) | uint32_t{__half_as_ushort(__float2half(second))}
                                                       << 16;
  } else {
    return __bfloat16_as_ushort(__float2bfloat16(first)) |
           uint32_t{__bfloat16_as_ushort(__float2bfloat16(second))} << 16;
  }
}
inline uint32_t MulPair(uint32_t a, uint32_t b, __nv_bfloat16 type) {
  const auto half = [](uint32_t pair, int shift) {
    return std::bit_cast<float>(pair >> shift << 16);
  };
  return RoundedPair(half(a, 0) * half(b, 0), half(a, 16) * half(b, 16), type);
}
inline uint32_t MulPair(uint32_t a, uint32_t b, __half type) {
  const auto half = [](uint32_t pair, int shift) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> shift)));
  };
  return RoundedPair(half(a, 0) * half(b, 0), half(a, 16) * half(b, 16), type);
}
inline uint32_t PairOfE4M3(float first, float second) {
  return trireme::FromFloat<trireme::E4M3>(first).bits |
         uint32_t{trireme::FromFloat<trireme::E4M3>(second).bits} << 8;
}
inline void LdMatrixX4(uint32_t (&r)[4], const void* row, HC_LOC) {
  host_cuda::CheckRow(row, loc);
  host_cuda::LdMatrix(r, *static_cast<const uint4*>(row), 4, false, loc);
}
inline void LdMatrixX4Trans(uint32_t (&r)[4], const void* row, HC_LOC) {
  host_cuda::CheckRow(row, loc);
  host_cuda::LdMatrix(r, *static_cast<const uint4*>(row), 4, true, loc);
}
inline void CpAsync16(void* dst, const void* src, int valid = 16) {
  host_cuda::AsyncCopy(dst, src, 16, valid);
}
inline void CpAsyncCommit() { host_cuda::AsyncCommit(); }
template <int kNewestLeft>
void CpAsyncWait() {
  host_cuda::AsyncWait(kNewestLeft);
}
inline void NamedBarrier(int id, int count, HC_LOC) { host_cuda::BlockBarrier(id, count, loc); }
inline void StoreFlag(uint64_t* flag, uint64_t value) {
  std::atomic_ref(*flag).store(value, std::memory_order_release);
}
inline uint64_t LoadFlag(const uint64_t* flag) {
  return std::atomic_ref(const_cast<uint64_t&>(*flag)).load(std::memory_order_acquire);
}
template <class T>
T LoadRelaxed(const T* p) {
  return std::atomic_ref(const_cast<T&>(*p)).load(std::memory_order_relaxed);
}
inline void AddRelaxed(uint64_t* p, uint64_t value) { atomicAdd(p, value); }

#endif

// Portable pieces on top.
#if defined(__CUDACC__) || defined(TRIREME_HOST_CUDA)
// 16 bytes of shared or global memory, whatever is in them.
__device__ inline uint4 Load16(const void* p) { return *static_cast<const uint4*>(p); }
// MmaE4M3 of other chips. A code, shifted to where a half has exponent and mantissa, is its
// 256th part; two mma take a register's bytes 1 and 3 and its bytes 0 and 2 as neighbours.
__device__ inline void MmaE4M3ByHalves(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  const auto halves = [](uint32_t codes) {
    constexpr uint32_t kFactors = 0x5c005c00u;  // 256
    return MulPair((codes & 0x80008000u) | (codes >> 1 & 0x3f803f80u), kFactors, __half{});
  };
  for (int i = 0; i < 2; ++i) {
    const uint32_t rows[4] = {halves(a[2 * i]), halves(a[2 * i + 1]), halves(a[2 * i] << 8),
                              halves(a[2 * i + 1] << 8)};
    const uint32_t columns[2] = {halves(b[i]), halves(b[i] << 8)};
    Mma(d, rows, columns, __half{});
  }
}
template <class T>
__device__ inline T WarpSum(T v) {
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
template <class T>
__device__ inline T WarpMax(T v) {
  for (int o = 16; o > 0; o >>= 1) v = max(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
#endif

}  // namespace gpu
