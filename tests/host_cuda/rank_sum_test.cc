// The CUDA communicator's sum over ranks gives the bits of the CPU's.
#include "parallel/rank_sum.h"

#include <gtest/gtest.h>

#include "kernels/cuda/rank_sum.h"
#include "tests/testing.h"

namespace trireme {
namespace {

TEST(CudaRankSumTest, GivesTheBitsOfTheCpu) {
  const TestDevice cpu;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const int ranks : {1, 2, 3, 8}) {
      constexpr int64_t kStride = 700, kCount = 683;
      const Tensor parts = cpu.Random(dtype, {ranks, kStride}, 5, 100.0);
      const Tensor expected = cpu.Zeros(dtype, {kCount}), got = cpu.Zeros(dtype, {kCount});
      std::vector<const void*> inputs;
      for (int r = 0; r < ranks; ++r) inputs.push_back(parts.view().Rows(r, 1).data);
      SumInOrder(dtype, inputs, kCount, expected.view().data);
      cuda::RankSum(nullptr, dtype, parts.view().data, kStride, ranks, kCount, got.view().data);
      ExpectSameBits(got.view(), expected.view());
    }
  }
}

}  // namespace
}  // namespace trireme
