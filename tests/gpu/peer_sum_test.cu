// Sums over peer memory with all ranks on one GPU, each on a stream of its own: the flags, the
// order of memory and the halves that take turns, where there are no two GPUs to try them on.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/cuda/peer_sum.h"
#include "tests/gpu/one_gpu_ranks.h"

namespace trireme {
namespace {

using cuda::PeerPath;

constexpr int64_t kHalfBytes = 1 << 20;

// Memory that both sides read.
template <typename T>
struct Both {
  explicit Both(int64_t count) {
    Must(cudaMallocManaged(&data, static_cast<size_t>(count) * sizeof(T)));
    Must(cudaMemset(data, 0, static_cast<size_t>(count) * sizeof(T)));
    Must(cudaDeviceSynchronize());
  }
  ~Both() { cudaFree(data); }
  Both(const Both&) = delete;
  Both& operator=(const Both&) = delete;
  T* data = nullptr;
};

TEST(PeerSumOnOneGpu, HasTheBitsOfTheSumInRankOrder) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
  for (const int size : {2, 4}) {  // a GPU's queues are eight, and streams may share one
    const OneGpuRanks ranks(size, kHalfBytes);
    uint64_t sum = 0;
    for (const int64_t elements : {8, 4096, 5000, 49152}) {
      for (const PeerPath path : {PeerPath::kOneShot, PeerPath::kTwoShot}) {
        const auto rows = cuda::RowsOfSum(DType::kBF16, elements, size);
        if (cuda::PeerBytes(path, DType::kBF16, rows, size) > kHalfBytes) continue;
        SCOPED_TRACE(testing::Message() << size << " ranks, " << elements << " elements, "
                                        << (path == PeerPath::kOneShot ? "one" : "two") << "-shot");
        std::vector<std::unique_ptr<Both<BF16>>> parts;
        std::vector<float> want(elements, 0.0f);
        ++sum;
        for (int r = 0; r < size; ++r) {
          parts.push_back(std::make_unique<Both<BF16>>(elements));
          for (int64_t i = 0; i < elements; ++i) {
            const uint64_t number = (i * 37 + r * 101 + sum * 13) % 509;
            const BF16 x = FromFloat<BF16>(static_cast<float>(number) / 16.0f - 15.0f);
            parts[r]->data[i] = x;
            want[i] = r == 0 ? ToFloat(x) : want[i] + ToFloat(x);
          }
        }
        for (int r = 0; r < size; ++r)
          PeerSum(ranks.stream(r), ranks.Of(r), path,
                  TensorView(parts[r]->data, DType::kBF16, {elements}));
        ASSERT_TRUE(ranks.Wait()) << "ranks waited for each other in vain";
        for (int r = 0; r < size; ++r) {
          for (int64_t i = 0; i < elements; ++i) {
            ASSERT_EQ(parts[r]->data[i].bits, FromFloat<BF16>(want[i]).bits)
                << "rank " << r << ", element " << i;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace trireme
