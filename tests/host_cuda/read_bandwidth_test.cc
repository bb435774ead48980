// What the read bandwidth is measured with reads every byte.
#include "kernels/cuda/read_bandwidth.h"

#include <gtest/gtest.h>

#include <vector>

namespace trireme {
namespace {

TEST(CudaReadBandwidthTest, ReadsEveryWordOnce) {
  constexpr int kBlocks = 2;
  // Of 16 bytes: more than a round of both blocks, and no whole number of anything.
  constexpr size_t kPieces = 2 * 4 * 512 + 1234;
  std::vector<uint32_t> words(4 * kPieces, 0);
  const std::vector<size_t> some = {
      0, 3, 4 * 511 + 1, 4 * 512, 4 * 2048 - 1, 4 * 4096, 4 * kPieces - 1};
  for (const size_t at : some) {
    // What the kernel tells of is a thread's words put together: this one, all others being zero.
    words[at] = 0x5eed;
    uint32_t out = 0;
    cuda::ReadOnce(nullptr, words.data(), static_cast<int64_t>(words.size() * 4), kBlocks, &out);
    EXPECT_EQ(out, 0x5eedu) << "word " << at;
    words[at] = 0;
  }
}

}  // namespace
}  // namespace trireme
