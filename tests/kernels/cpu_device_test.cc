#include "kernels/cpu/cpu_device.h"

#include <atomic>
#include <cstring>
#include <numeric>
#include <thread>

#include "kernels/cpu/ceilings.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "tests/testing.h"

namespace trireme {
namespace {

TEST(CpuDeviceTest, MemoryIsZeroedAndAligned) {
  const TestDevice device;
  for (size_t bytes :
       {size_t{0}, size_t{1}, size_t{1000}, size_t{2} << 20, (size_t{5} << 20) + 3}) {
    for (int round = 0; round < 2; ++round) {
      auto buffer = device.device().Allocate(bytes);
      ASSERT_TRUE(buffer.ok());
      EXPECT_EQ(buffer->bytes(), bytes);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 256, 0u);
      const char* data = static_cast<const char*>(buffer->data());
      for (size_t i = 0; i < bytes; ++i) ASSERT_EQ(data[i], 0) << i;
      std::memset(buffer->data(), 0x5a, bytes);  // what the next round must not see
    }
  }
}

TEST(CpuDeviceTest, TooMuchMemoryIsAnErrorThatNamesTheBytes) {
  const TestDevice device;
  const auto buffer = device.device().Allocate(size_t{1} << 55);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(buffer.status().ToString().find("36028797018963968"), std::string::npos)
      << buffer.status();
}

TEST(CpuDeviceTest, ThreadsAreAsAskedOrAllCores) {
  EXPECT_EQ(TestDevice(3).device().spec().threads, 3);
  EXPECT_GE(TestDevice(0).device().spec().threads, 1);
  EXPECT_EQ(NewCpuDevice(-1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_GT(TestDevice().device().spec().memory_bytes, int64_t{1} << 20);
}

TEST(ThreadPoolTest, EveryIndexOnce) {
  for (int threads : {1, 2, 5}) {
    cpu::ThreadPool pool(threads);
    for (int64_t n : {0, 1, 7, 1000}) {
      for (int64_t grain : {0, 1, 3, 5000}) {
        std::vector<std::atomic<int>> seen(n);
        pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) seen[i].fetch_add(1);
        });
        for (int64_t i = 0; i < n; ++i) ASSERT_EQ(seen[i].load(), 1) << i;
      }
    }
  }
}

TEST(ThreadPoolTest, ManyShortLoopsAndSleepsBetween) {
  cpu::ThreadPool pool(3);
  int64_t total = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<int64_t> parts(16);
    pool.ParallelFor(16, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) parts[i] = round;
    });
    total += std::accumulate(parts.begin(), parts.end(), int64_t{0});
    if (round % 1000 == 999)
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // workers fall asleep
  }
  EXPECT_EQ(total, int64_t{16} * 3000 * 2999 / 2);
}

TEST(ThreadPoolTest, SeveralCallersAtOnce) {
  cpu::ThreadPool pool(2);
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round) {
        pool.ParallelFor(10, 1, [&](int64_t begin, int64_t end) { sum.fetch_add(end - begin); });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum.load(), 3 * 300 * 10);
}

TEST(CpuCeilingsTest, AreMeasuredAndOrdered) {
  const TestDevice device;
  const auto ceilings = MeasureCpuCeilings(device.stream());
  ASSERT_TRUE(ceilings.ok());
  EXPECT_GT(ceilings->read_bytes_per_s, 1e8);
  // A core that does not even manage one multiply-add each nanosecond is a measurement gone wrong.
  EXPECT_GT(ceilings->matmul_flops_f32, 2e8);
  EXPECT_GT(ceilings->matmul_flops_bf16, 2e8);
}

// f16 is multiplied as f32 here: neither stands for the other by accident.
TEST(CpuCeilingsTest, EachTypeHasItsOwn) {
  Ceilings sum;
  const Ceilings one{1.0, 2.0, 3.0, 4.0};
  sum.Add(one);
  sum.Add(one);
  EXPECT_EQ(sum.read_bytes_per_s, 2.0);
  EXPECT_EQ(sum.MatMulFlops(DType::kF32), 4.0);
  EXPECT_EQ(sum.MatMulFlops(DType::kBF16), 6.0);
  EXPECT_EQ(sum.MatMulFlops(DType::kF16), 8.0);
  const auto measured = MeasureCpuCeilings(TestDevice().stream());
  ASSERT_TRUE(measured.ok());
  EXPECT_EQ(measured->matmul_flops_f16, measured->matmul_flops_f32);
}

}  // namespace
}  // namespace trireme
