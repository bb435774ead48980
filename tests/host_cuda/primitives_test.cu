// What gpu.h wraps, one by one and against its contract: fragment layouts, ldmatrix, cp.async, the
// order of pairs, approximations, barriers, flags. Built twice, for the emulator and by nvcc for a
// chip (tests/gpu), so that the two can be compared, and so that on a new chip a wrong layout is
// told from a wrong kernel.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/cuda/gpu.h"

namespace trireme {
namespace {

// --- a kernel for each of them ---

// c [16, 8] += a [16, 16] b [8, 16]^T; the fragments as in the PTX manual, "Matrix fragments for
// mma.m16n8k16".
template <typename T>
__global__ void MmaOfFragments(const T* a, const T* b, float* c) {
  const int g = gpu::LaneId() / 4, t = gpu::LaneId() % 4 * 2;
  const auto pair = [](const T* p) { return *reinterpret_cast<const uint32_t*>(p); };
  uint32_t x[4], w[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) x[i] = pair(a + (g + i % 2 * 8) * 16 + t + i / 2 * 8);
  for (int i = 0; i < 2; ++i) w[i] = pair(b + g * 16 + t + i * 8);
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + t + i % 2];
  gpu::Mma(sums, x, w, T{});
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = sums[i];
}

// Four matrices of 8 x 8, [4, 8, 8]; each lane's registers.
template <bool kTransposed>
__global__ void DumpMatrices(const uint16_t* in, uint32_t* out) {
  GPU_SHARED(matrices, uint16_t[4][8][8]);
  const int lane = gpu::LaneId();
  for (int i = lane; i < 4 * 64; i += 32) matrices[i / 64][i / 8 % 8][i % 8] = in[i];
  __syncwarp();
  uint32_t r[4];
  const void* row = matrices[lane / 8][lane % 8];
  if constexpr (kTransposed) {
    gpu::LdMatrixX4Trans(r, row);
  } else {
    gpu::LdMatrixX4(r, row);
  }
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

// Pieces 0-31 in one group, 32-63 in another; a third of them with nothing valid.
__global__ void CopyInTwoGroups(const uint32_t* in, uint32_t* out) {
  GPU_SHARED(pieces, uint32_t[64][4]);
  const int lane = gpu::LaneId();
  for (int group = 0; group < 2; ++group) {
    const int piece = group * 32 + lane;
    gpu::CpAsync16(pieces[piece], in + piece * 4, piece % 3 == 0 ? 0 : 16);
    gpu::CpAsyncCommit();
  }
  gpu::CpAsyncWait<1>();
  __syncwarp();
  for (int i = lane; i < 128; i += 32) out[i] = pieces[i / 4][i % 4];
  gpu::CpAsyncWait<0>();
  __syncwarp();
  for (int i = 128 + lane; i < 256; i += 32) out[i] = pieces[i / 4][i % 4];
}

__global__ void LoadAll(const uint4* in, uint4* out) {
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  out[i] = gpu::LoadStreaming(in + i);
}

// Each number with the one behind it.
__global__ void RoundPairs(const float* in, int n, uint32_t* bf16, uint32_t* half) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  bf16[i] = gpu::RoundedPair(in[i], in[(i + 1) % n], __nv_bfloat16());
  half[i] = gpu::RoundedPair(in[i], in[(i + 1) % n], __half());
}

__global__ void MulPairs(const uint32_t* pairs, uint32_t factors, uint32_t* out) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  out[i] = gpu::MulPair(pairs[i], factors, __nv_bfloat16());
}

__global__ void Approximate(const float* in, int n, float* exp2, float* tanh) {
  const int i = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  if (i >= n) return;
  exp2[i] = gpu::Exp2(in[i]);
  tanh[i] = gpu::Tanh(in[i]);
}

// Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2, so often that one that held the
// wrong ones would let some through.
__global__ void PassByNamedBarriers(int* out) {
  GPU_SHARED(box, int[128]);
  const int i = static_cast<int>(threadIdx.x), lane = gpu::LaneId(), pair = i / 64;
  int seen = 0;
  for (int round = 0; round < 10; ++round) {
    box[i] = i + round;
    gpu::NamedBarrier(1 + pair, 64);
    seen = box[i ^ 32] - round;
    gpu::NamedBarrier(1 + pair, 64);
  }
  out[i] = 1000 * seen + gpu::WarpSum(lane) + gpu::WarpMax(lane);
}

// Block 0 fills the box, block 1 looks whether all of it is new and says that it has.
__global__ void PassByFlags(uint64_t* flags, int* box, int rounds, int* wrong) {
  gpu::WaitForPrevious();
  const int i = static_cast<int>(threadIdx.x), me = static_cast<int>(blockIdx.x);
  for (int round = 1; round <= rounds; ++round) {
    if (me == 0) {
      for (int k = i; k < 256; k += 128) box[k] = round * 1000 + k;
      __syncthreads();
      if (i == 0) {
        gpu::StoreFlag(&flags[0], static_cast<uint64_t>(round));
        while (gpu::LoadFlag(&flags[1]) < static_cast<uint64_t>(round)) gpu::SpinPause();
      }
      __syncthreads();
    } else {
      if (i == 0) {
        while (gpu::LoadFlag(&flags[0]) < static_cast<uint64_t>(round)) gpu::SpinPause();
      }
      __syncthreads();
      for (int k = i; k < 256; k += 128) {
        if (box[255 - k] != round * 1000 + 255 - k) atomicAdd(wrong, 1);
      }
      __syncthreads();
      if (i == 0) gpu::StoreFlag(&flags[1], static_cast<uint64_t>(round));
    }
  }
}

__global__ void FillShared(int words, int* wrong) {
  GPU_DYNAMIC_SHARED(memory, int);
  const int threads = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  for (int k = i; k < words; k += threads) memory[k] = k * 3 + static_cast<int>(blockIdx.x);
  __syncthreads();
  for (int k = i; k < words; k += threads) {
    const int at = words - 1 - k;
    if (memory[at] != at * 3 + static_cast<int>(blockIdx.x)) atomicAdd(wrong, 1);
  }
}

// to[i] = 1 + from[300 further on].
__global__ void MoveOn(const int* from, int count, int* to) {
  const int i = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  gpu::WaitForPrevious();
  to[i] = from[(i + 300) % count] + 1;
}

// --- what they must give ---

// Memory of kernels and of the test.
template <typename T>
class Both {
 public:
  explicit Both(size_t count) : count_(count) {
#if defined(TRIREME_HOST_CUDA)
    memory_.resize(count);
    data_ = memory_.data();
#else
    CHECK(cudaMallocManaged(&data_, count * sizeof(T)) == cudaSuccess);
#endif
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  ~Both() {
#if !defined(TRIREME_HOST_CUDA)
    cudaFree(data_);
#endif
  }
  Both(const Both&) = delete;
  Both& operator=(const Both&) = delete;
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  const size_t count_;
  T* data_ = nullptr;
#if defined(TRIREME_HOST_CUDA)
  std::vector<T> memory_;
#endif
};

class Primitives : public ::testing::Test {
 protected:
  void SetUp() override {
#if !defined(TRIREME_HOST_CUDA)
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    ASSERT_EQ(gpu::WhyNoCode(LoadAll), "");
#endif
  }
  // As the backend's are: not the legacy stream, in which launches of all kinds wait.
  static gpu::StreamHandle NewStream() {
#if defined(TRIREME_HOST_CUDA)
    return nullptr;
#else
    cudaStream_t stream = nullptr;
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    return stream;
#endif
  }
  // What was launched is done, and right so far.
  static void Finish() {
#if !defined(TRIREME_HOST_CUDA)
    const cudaError_t error = cudaDeviceSynchronize();
    ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
#endif
  }
};

template <typename T>
T Element(int i) {
  return T(static_cast<float>((i * 7 + 3) % 17 - 8));
}

// A and B from memory, by the manual's tables: no ldmatrix has a part in it.
TEST_F(Primitives, MmaTakesTheFragmentsOfTheManual) {
  const auto check = [](auto zero) {
    using T = decltype(zero);
    const Both<T> a(16 * 16), b(8 * 16);
    const Both<float> c(16 * 8);
    for (int i = 0; i < 256; ++i) a[i] = Element<T>(i);
    for (int i = 0; i < 128; ++i) b[i] = Element<T>(5 * i + 1);
    for (int i = 0; i < 128; ++i) c[i] = static_cast<float>(i);  // what the product is added to
    gpu::Launch({dim3(1), dim3(32)}, MmaOfFragments<T>, a.data(), b.data(), c.data());
    Finish();
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        auto want = static_cast<float>(m * 8 + n);
        for (int k = 0; k < 16; ++k)
          want += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[n * 16 + k]);
        ASSERT_EQ(c[m * 8 + n], want) << "row " << m << ", column " << n;
      }
    }
  };
  check(__nv_bfloat16());
  check(__half());
}

// Register m of lane l: elements (l / 4, l % 4 * 2) and the next of matrix m, or of its transpose.
TEST_F(Primitives, LdMatrixGivesRowsOrColumns) {
  for (const bool transposed : {false, true}) {
    const Both<uint16_t> in(4 * 64);
    const Both<uint32_t> out(32 * 4);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i * 257 + 1);
    gpu::Launch({dim3(1), dim3(32)}, transposed ? DumpMatrices<true> : DumpMatrices<false>,
                in.data(), out.data());
    Finish();
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = in[m * 64 + (transposed ? t * 8 + g : g * 8 + t)];
        const uint32_t high = in[m * 64 + (transposed ? (t + 1) * 8 + g : g * 8 + t + 1)];
        ASSERT_EQ(out[lane * 4 + m], low | high << 16)
            << "lane " << lane << ", matrix " << m << (transposed ? ", transposed" : "");
      }
    }
  }
}

// Two groups: the older is waited for alone. Pieces with nothing valid are zeros.
TEST_F(Primitives, AsynchronousCopiesArriveInGroupsAndFillWithZeros) {
  const Both<uint32_t> in(256), out(256);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i) + 1;
  gpu::Launch({dim3(1), dim3(32)}, CopyInTwoGroups, in.data(), out.data());
  Finish();
  for (uint32_t i = 0; i < 256; ++i) {
    const bool valid = i / 4 % 3 != 0;
    ASSERT_EQ(out[i], valid ? i + 1 : 0u) << "word " << i;
  }
}

TEST_F(Primitives, LoadsOf16BytesWithAHintAreLoads) {
  const Both<uint4> in(64), out(64);
  for (unsigned i = 0; i < 64; ++i) in[i] = make_uint4(i, i + 100, i + 200, i + 300);
  gpu::Launch({dim3(2), dim3(32)}, LoadAll, in.data(), out.data());
  Finish();
  EXPECT_EQ(std::memcmp(in.data(), out.data(), 64 * sizeof(uint4)), 0);
}

// The first number in the low half, to nearest even, subnormal numbers too.
TEST_F(Primitives, PairsAreRoundedToNearestEven) {
  const std::vector<float> numbers = {0.0f,     -0.0f,    1.0f,      -1.0f,       1.00390625f,
                                      3.14159f, 1e-40f,   -3e-39f,   65504.0f,    65520.0f,
                                      3e38f,    5.9e-8f,  2.98e-8f,  1.01171875f, -2.0e-5f,
                                      INFINITY, 0x1p-14f, 0x1p-127f, 0x1.01p0f,   0x1.03p0f};
  const int n = static_cast<int>(numbers.size());
  const Both<float> in(n);
  const Both<uint32_t> bf16(n), half(n);
  for (int i = 0; i < n; ++i) in[i] = numbers[i];
  gpu::Launch({dim3(1), dim3(32)}, RoundPairs, in.data(), n, bf16.data(), half.data());
  Finish();
  for (int i = 0; i < n; ++i) {
    const float first = in[i], second = in[(i + 1) % n];
    EXPECT_EQ(bf16[i], __bfloat16_as_ushort(__float2bfloat16(first)) |
                           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(second)))
                               << 16)
        << first << ", " << second;
    EXPECT_EQ(half[i], __half_as_ushort(__float2half(first)) |
                           static_cast<uint32_t>(__half_as_ushort(__float2half(second))) << 16)
        << first << ", " << second;
  }
}

// Every finite bf16 by 2^112 where that is finite: exact, what is subnormal included.
TEST_F(Primitives, ProductsOfPairsTakeAndGiveSubnormalNumbers) {
  constexpr uint32_t kFactor = 0x7780;  // 2^112
  const Both<uint32_t> pairs(1 << 15), up(1 << 15), down(1 << 15);
  for (uint32_t i = 0; i < pairs.size(); ++i) pairs[i] = i | (i ^ 0x8000u) << 16;
  const auto blocks = static_cast<unsigned>(pairs.size() / 256);
  gpu::Launch({dim3(blocks), dim3(256)}, MulPairs, pairs.data(), kFactor | kFactor << 16,
              up.data());
  constexpr uint32_t kInverse = 0x0780;  // 2^-112
  gpu::Launch({dim3(blocks), dim3(256)}, MulPairs, pairs.data(), kInverse | kInverse << 16,
              down.data());
  Finish();
  const auto value = [](uint32_t bits) {
    const uint32_t word = bits << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  };
  for (uint32_t i = 0; i < pairs.size(); ++i) {
    const float x = value(i);
    if (!std::isfinite(x)) continue;
    const auto rounded = [](double y) {
      return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(static_cast<float>(y))));
    };
    const uint32_t want_up = rounded(std::ldexp(static_cast<double>(x), 112));
    const uint32_t want_down = rounded(std::ldexp(static_cast<double>(x), -112));
    ASSERT_EQ(up[i], want_up | (want_up ^ 0x8000u) << 16) << x;
    ASSERT_EQ(down[i], want_down | (want_down ^ 0x8000u) << 16) << x;
  }
}

TEST_F(Primitives, ApproximationsAreAsNearAsTheySay) {
  constexpr int kCount = 1 << 14;
  const Both<float> in(kCount + 3), exp2(kCount + 3), tanh(kCount + 3);
  for (int i = 0; i < kCount; ++i) in[i] = -125.0f + 250.0f * static_cast<float>(i) / kCount;
  in[kCount] = 0.0f, in[kCount + 1] = -INFINITY, in[kCount + 2] = -200.0f;
  gpu::Launch({dim3(kCount / 256 + 1), dim3(256)}, Approximate, in.data(), kCount + 3, exp2.data(),
              tanh.data());
  Finish();
  for (int i = 0; i <= kCount; ++i) {
    const double e = std::exp2(static_cast<double>(in[i])), t = std::tanh(in[i]);
    ASSERT_NEAR(exp2[i], e, 0x1p-22 * e) << "2^" << in[i];
    ASSERT_NEAR(tanh[i], t, 0x1p-10 * 0.54 * std::abs(t)) << "tanh " << in[i];
  }
  EXPECT_EQ(exp2[kCount], 1.0f);
  EXPECT_EQ(exp2[kCount + 1], 0.0f);
  EXPECT_EQ(exp2[kCount + 2], 0.0f);
}

TEST_F(Primitives, WarpsSumAndBarriersHoldThoseTheyName) {
  const Both<int> out(128);
  gpu::Launch({dim3(1), dim3(128)}, PassByNamedBarriers, out.data());
  Finish();
  // A pair of warps each: what the other wrote, and the sum and the largest of its lanes.
  for (int i = 0; i < 128; ++i) {
    const int warp = i / 32 ^ 1;
    EXPECT_EQ(out[i], 1000 * (warp * 32 + i % 32) + 496 + 31) << i;
  }
}

// Block 0 writes, block 1 reads behind the flag: blocks that wait for each other, side by side.
TEST_F(Primitives, WhatComesBeforeAFlagIsSeenBehindIt) {
  constexpr int kRounds = 20;
  const Both<uint64_t> flags(2);
  const Both<int> box(256), out(1);
  gpu::LaunchResident({dim3(2), dim3(128)}, PassByFlags, flags.data(), box.data(), kRounds,
                      out.data());
  Finish();
  EXPECT_EQ(out[0], 0) << "values that were old";
}

// The most that a kernel here takes.
TEST_F(Primitives, ABlockHas160KiBOfSharedMemory) {
  constexpr int kWords = (160 << 10) / 4;
  const Both<int> out(1);
  gpu::Launch({dim3(2), dim3(256), kWords * sizeof(int)}, FillShared, kWords, out.data());
  Finish();
  EXPECT_EQ(out[0], 0) << "words that were not as written";
}

// Each kernel adds one to what the one before it wrote, in other blocks.
TEST_F(Primitives, DependentKernelsSeeWhatTheOneBeforeWrote) {
  constexpr int kCount = 64 * 256, kKernels = 50;
  const Both<int> x(kCount), y(kCount);
  const gpu::StreamHandle stream = NewStream();
  for (const bool overlap : {false, true}) {
#if !defined(TRIREME_HOST_CUDA)
    gpu::DependentLaunches() = overlap;
#endif
    for (int i = 0; i < kCount; ++i) x[i] = i;
    for (int i = 0; i < kKernels; ++i) {
      const bool even = i % 2 == 0;
      gpu::LaunchDependent({dim3(kCount / 256), dim3(256), 0, stream}, MoveOn,
                           static_cast<const int*>((even ? x : y).data()), kCount,
                           (even ? y : x).data());
    }
    Finish();
    for (int i = 0; i < kCount; ++i)
      ASSERT_EQ(x[i], (i + kKernels * 300) % kCount + kKernels) << (overlap ? "overlapping" : "");
  }
#if !defined(TRIREME_HOST_CUDA)
  gpu::DependentLaunches() = false;
#endif
}

}  // namespace
}  // namespace trireme
