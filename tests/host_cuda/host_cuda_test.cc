// The emulator itself: right kernels are right in every order of threads, wrong ones are found.
#include "tests/host_cuda/host_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "tests/host_cuda/sample_kernels.cuh"
#include "tests/testing.h"

namespace trireme {
namespace {

using namespace host_cuda_samples;
using host_cuda::KernelError;
using host_cuda::Order;

// Runs f with threads in forward, reverse and ten shuffled orders; how often it gave false.
template <typename F>
int FailuresOverOrders(F f) {
  host_cuda::Options& options = host_cuda::DefaultOptions();
  const host_cuda::Options before = options;
  int failures = 0;
  for (int i = -2; i < 10; ++i) {
    options.order = i == -2 ? Order::kForward : i == -1 ? Order::kReverse : Order::kShuffled;
    options.seed = i + 3;
    failures += !f();
  }
  options = before;
  return failures;
}

template <bool kSync>
bool TreeSumIsRight() {
  std::vector<float> x(256);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(RandomValue(1, i));
  float out = 0.0f;
  gpu::Launch({dim3(1), dim3(256), 256 * sizeof(float)}, TreeSum<kSync>, x.data(), &out);
  return std::abs(out - std::accumulate(x.begin(), x.end(), 0.0)) < 1e-4;
}

template <bool kSecondBarrier>
bool RotateIsRight() {
  std::vector<int> x(256);
  std::iota(x.begin(), x.end(), 0);
  gpu::Launch({dim3(1), dim3(256)}, Rotate<kSecondBarrier>, x.data(), 3);
  for (int i = 0; i < 256; ++i) {
    if (x[i] != (i + 3) % 256) return false;
  }
  return true;
}

TEST(HostCuda, RightKernelsAreRightInEveryOrder) {
  EXPECT_EQ(FailuresOverOrders(TreeSumIsRight<true>), 0);
  EXPECT_EQ(FailuresOverOrders(RotateIsRight<true>), 0);
}

// Under ThreadSanitizer these would end the run; planted_faults.cc is for that.
#if !defined(__SANITIZE_THREAD__)
TEST(HostCuda, MissingBarriersGiveWrongResultsInMostOrders) {
  EXPECT_GT(FailuresOverOrders(TreeSumIsRight<false>), 6);
  EXPECT_GT(FailuresOverOrders(RotateIsRight<false>), 6);
}
#endif

TEST(HostCuda, AsynchronousCopiesArriveOnlyAtTheWait) {
  std::vector<float> x(128, 1.0f), out(128);
  gpu::Launch({dim3(1), dim3(32)}, CopyAsync<true>, x.data(), out.data());
  EXPECT_EQ(out, x);
  gpu::Launch({dim3(1), dim3(32)}, CopyAsync<false>, x.data(), out.data());
  EXPECT_TRUE(std::isnan(out[0]));
}

// A launch that throws leaves fibers behind, which ThreadSanitizer takes for threads still running.
#if !defined(__SANITIZE_THREAD__)
TEST(HostCuda, ErrorsNameThePlace) {
  std::vector<int> x(256);
  const auto message = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const KernelError& error) {
      return error.what();
    }
    return "";
  };
  const auto divergent = message([&] { gpu::Launch({dim3(1), dim3(256)}, Divergent, x.data()); });
  EXPECT_NE(divergent.find("128 at "), std::string::npos) << divergent;
  EXPECT_NE(divergent.find("sample_kernels.cuh:"), std::string::npos) << divergent;
  EXPECT_NE(message([&] {
              gpu::Launch({dim3(1), dim3(2048)}, Divergent, x.data());
            }).find("block size"),
            std::string::npos);
  EXPECT_NE(message([&] {
              gpu::Launch({dim3(1), dim3(32)}, ShuffleFromAbsentLane, x.data());
            }).find("does not take part"),
            std::string::npos);
  alignas(16) uint16_t halves[260] = {};
  std::vector<uint32_t> words(32);
  gpu::Launch({dim3(1), dim3(32)}, Addresses<Wrong::kNothing>, halves, words.data());
  const auto addresses = [&](auto kernel) {
    return message([&] { gpu::Launch({dim3(1), dim3(32)}, kernel, halves, words.data()); });
  };
  EXPECT_NE(addresses(Addresses<Wrong::kLdMatrixRow>).find("not aligned at "), std::string::npos);
  EXPECT_NE(addresses(Addresses<Wrong::kLdMatrixMemory>).find("not in shared"), std::string::npos);
  EXPECT_NE(addresses(Addresses<Wrong::kCopySource>).find("not aligned at "), std::string::npos);
  EXPECT_NE(addresses(Addresses<Wrong::kCopyTarget>).find("no shared memory"), std::string::npos);
  EXPECT_NE(addresses(Addresses<Wrong::kBarrierCount>).find("whole warps"), std::string::npos);
  EXPECT_NE(message([&] {
              gpu::Launch({dim3(1), dim3(32), 164 << 10}, Divergent, x.data());
            }).find("more dynamic shared memory"),
            std::string::npos);
  gpu::LaunchDependent({dim3(1), dim3(32)}, Dependent<true>, x.data());
  EXPECT_NE(message([&] {
              gpu::LaunchDependent({dim3(1), dim3(32)}, Dependent<false>, x.data());
            }).find("without WaitForPrevious at "),
            std::string::npos);
  gpu::Launch({dim3(1), dim3(32)}, Dependent<false>, x.data());  // nothing to wait for
}
#endif

TEST(HostCuda, VotesAndShuffles) {
  std::vector<uint32_t> odd(64);
  std::vector<int> sums(64);
  gpu::Launch({dim3(1), dim3(64)}, Vote, odd.data(), sums.data());
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(odd[i], 0xaaaaaaaau);
    EXPECT_EQ(sums[i], i % 32 == 31 ? 62 : 2 * (i % 32) + 1);
  }
}

template <typename T>
void CheckMma() {
  std::vector<T> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[i] = T(static_cast<float>((i * 7 + 3) % 17 - 8));
  for (int i = 0; i < 128; ++i) b[i] = T(static_cast<float>((i * 5 + 1) % 13 - 6));
  std::vector<float> c(128);
  gpu::Launch({dim3(1), dim3(32)}, OneMma<T>, a.data(), b.data(), c.data());
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float want = 0.0f;
      for (int k = 0; k < 16; ++k) {
        want += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[n * 16 + k]);
      }
      EXPECT_EQ(c[m * 8 + n], want) << m << ", " << n;
    }
  }
}
TEST(HostCuda, TensorCoresMultiplyTiles) {
  CheckMma<__nv_bfloat16>();
  CheckMma<__half>();
}

// Every finite code of either sign is in A, and of B no two columns are alike.
template <bool kByHalves>
void CheckMmaE4M3() {
  for (const int first : {0, 63, 127, 190}) {
    std::vector<uint8_t> a(512), b(256);
    for (int i = 0; i < 512; ++i) a[i] = static_cast<uint8_t>((first + i * 5) % 256);
    for (int i = 0; i < 256; ++i) b[i] = static_cast<uint8_t>((first + i * 3) % 256);
    for (auto* codes : {&a, &b}) {
      for (uint8_t& code : *codes) code = code % 128 == 127 ? code - 1 : code;  // no NaN
    }
    std::vector<float> c(128);
    gpu::Launch({dim3(1), dim3(32)}, OneMmaE4M3<kByHalves>, a.data(), b.data(), c.data());
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        double want = 0.0, magnitude = 0.0;
        for (int k = 0; k < 32; ++k) {
          const double product =
              double{ToFloat(E4M3{a[m * 32 + k]})} * ToFloat(E4M3{b[n * 32 + k]});
          want += product, magnitude += std::abs(product);
        }
        EXPECT_NEAR(c[m * 8 + n], want, 32 * 0x1p-24 * magnitude) << m << ", " << n;
      }
    }
  }
}
TEST(HostCuda, TensorCoresMultiplyTilesOfE4M3) {
  CheckMmaE4M3<false>();
  CheckMmaE4M3<true>();
}

}  // namespace
}  // namespace trireme
