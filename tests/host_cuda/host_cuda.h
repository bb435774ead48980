// Runs CUDA device code on the CPU, so that kernels can be tested without a GPU.
//
// Every CUDA thread of a block is a fiber; a fiber runs until it meets a
// barrier or a warp collective, and which runnable fiber goes next is drawn
// from a seeded generator. So a result that depends on thread order changes
// with the seed. Included by gpu.h for compilers other than nvcc.
#pragma once
#if defined(__CUDACC__)
#error "host_cuda.h is for host compilers only"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)  // __noinline__ stays undefined: libstdc++ uses the word
#define __grid_constant__
// Raw static shared memory also works (a block never changes its OS thread),
// but it keeps the previous block's bytes; GPU_SHARED in gpu.h is poisoned.
#define __shared__ static thread_local

// The built-in variables; the scheduler sets them before it resumes a fiber.
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim(1, 1, 1), gridDim(1, 1, 1);
inline constexpr int warpSize = 32;

namespace host_cuda {

enum class Order : uint8_t { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kShuffled;
  uint64_t seed = 1;
  int workers = 1;                                 // OS threads; each runs whole blocks
  size_t stack_bytes = 64 << 10;                   // per CUDA thread
  std::function<void(bool begins)> around_launch;  // or none
};
Options& DefaultOptions();

// Thrown by Launch: divergent or missing barrier, bad mask, bad geometry.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a stream that captures holds instead of doing it. A launch is kept as a graph's node keeps
// it: the kernel, its geometry and its arguments by value.
using Recording = std::vector<std::function<void()>>;

struct Config {
  dim3 grid, block;
  size_t dynamic_smem = 0;
  void* stream = nullptr;  // the Recording of a stream that captures; else null, and the launch
                           // has been done when it returns
  bool dependent = false;  // every thread must call WaitForPrevious
  bool resident = false;   // all blocks side by side, each on an OS thread of its own
};
void LaunchRaw(const Config& config, const std::function<void()>& body, const Options& options);

using Loc = std::source_location;

// --- services that kernels reach through the CUDA names below ---
void BlockBarrier(int id, int count, Loc loc);  // count 0: all threads
void WarpBarrier(uint32_t mask, Loc loc);
void Shuffle(uint32_t mask, void* inout, size_t bytes, int src_lane, Loc loc);
uint32_t Ballot(uint32_t mask, bool predicate, Loc loc);
// 16x8x16, or of e4m3 16x8x32; fp32 sums.
enum class Element : uint8_t { kBF16, kF16, kE4M3 };
void Mma(float d[4], const uint32_t a[4], const uint32_t b[2], Element element, Loc loc);
void CheckRow(const void* row, Loc loc);  // that an ldmatrix may read it
void LdMatrix(uint32_t* r, uint4 row, int count, bool transpose, Loc loc);
void AsyncCopy(void* dst, const void* src, size_t bytes, size_t valid);
void AsyncCommit();
void AsyncWait(int newest_left);
void* DynamicShared();
void* StaticShared(const void* tag, size_t bytes);  // one per block and tag
int LaneId();
void WaitForPrevious();  // it has ended in any case
void SpinPause();        // lets other threads of the block run, and other OS threads
[[noreturn]] void Fail(const char* what, Loc loc);

template <class T>
T ShuffleValue(uint32_t mask, T value, int src_lane, Loc loc) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  Shuffle(mask, &value, sizeof(T), src_lane, loc);
  return value;
}

template <class... P, class... A>
void Launch(const Config& config, void (*kernel)(P...), A&&... args) {
  if (config.stream != nullptr) {
    auto replay = [config, kernel, values = std::tuple<P...>(static_cast<P>(args)...)] {
      LaunchRaw(
          config, [&] { std::apply(kernel, values); }, DefaultOptions());
    };
    static_cast<Recording*>(config.stream)->push_back(std::move(replay));
    return;
  }
  LaunchRaw(
      config, [&] { kernel(static_cast<P>(args)...); }, DefaultOptions());
}

template <class... P, class... A>
void LaunchDependent(Config config, void (*kernel)(P...), A&&... args) {
  config.dependent = true;
  Launch(config, kernel, static_cast<A&&>(args)...);
}

// The kernel's blocks wait for those of other launches, which other OS threads make meanwhile.
template <class... P, class... A>
void LaunchResident(Config config, void (*kernel)(P...), A&&... args) {
  config.resident = true;
  LaunchDependent(config, kernel, static_cast<A&&>(args)...);
}

}  // namespace host_cuda

// --- the CUDA names that kernels use ---
#define HC_LOC host_cuda::Loc loc = host_cuda::Loc::current()

inline void __syncthreads(HC_LOC) { host_cuda::BlockBarrier(0, 0, loc); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, HC_LOC) { host_cuda::WarpBarrier(mask, loc); }

template <class T>
T __shfl_sync(uint32_t mask, T v, int src, int width = 32, HC_LOC) {
  const int lane = host_cuda::LaneId();
  return host_cuda::ShuffleValue(mask, v, (lane & ~(width - 1)) | (src & (width - 1)), loc);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32, HC_LOC) {
  const int lane = host_cuda::LaneId(), src = lane ^ lanes;
  return host_cuda::ShuffleValue(mask, v, src / width > lane / width ? lane : src, loc);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, int delta, int width = 32, HC_LOC) {
  const int lane = host_cuda::LaneId(), src = lane + delta;
  return host_cuda::ShuffleValue(mask, v, src / width != lane / width ? lane : src, loc);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, int delta, int width = 32, HC_LOC) {
  const int lane = host_cuda::LaneId(), src = lane - delta;
  return host_cuda::ShuffleValue(mask, v, src < (lane & ~(width - 1)) ? lane : src, loc);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, HC_LOC) {
  return host_cuda::Ballot(mask, p != 0, loc);
}
inline int __any_sync(uint32_t mask, int p, HC_LOC) {
  return host_cuda::Ballot(mask, p != 0, loc) != 0;
}
inline int __all_sync(uint32_t mask, int p, HC_LOC) {
  return host_cuda::Ballot(mask, p != 0, loc) == mask;
}
inline uint32_t __activemask() { return 0xffffffffu; }

namespace host_cuda {
template <class T, class F>
T Rmw(T* p, F f) {  // relaxed, as on the device; bitwise compare, so that NaN terminates
  using U = std::conditional_t<sizeof(T) == 8, uint64_t,
                               std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  std::atomic_ref<U> ref(*reinterpret_cast<U*>(p));
  U old = ref.load(std::memory_order_relaxed);
  while (!ref.compare_exchange_weak(old, std::bit_cast<U>(f(std::bit_cast<T>(old))),
                                    std::memory_order_relaxed)) {
  }
  return std::bit_cast<T>(old);
}
}  // namespace host_cuda
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return host_cuda::Rmw(p, [v](T x) { return T(x + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return host_cuda::Rmw(p, [v](T x) { return x < v ? v : x; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return host_cuda::Rmw(p, [v](T x) { return v < x ? v : x; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return host_cuda::Rmw(p, [v](T x) { return T(x | v); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return host_cuda::Rmw(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) {
  return host_cuda::Rmw(p, [c, v](T x) { return x == c ? v : x; });
}
inline void __threadfence() { std::atomic_signal_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { std::atomic_signal_fence(std::memory_order_seq_cst); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }  // the build contracts nothing
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(x)) + 1; }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
