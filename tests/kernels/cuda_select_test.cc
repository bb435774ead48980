// The choices of kernels, which are pure functions, without a GPU and without CUDA.
#include <gtest/gtest.h>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/matmul_select.h"

namespace trireme::cuda {
namespace {

TEST(SelectMatMulTest, RowsAndTypeDecide) {
  EXPECT_EQ(SelectMatMul({.rows = 1}), MatMulKernel::kStream);
  EXPECT_EQ(SelectMatMul({.rows = kFewRowsLimit, .n = 128256}), MatMulKernel::kStream);
  EXPECT_EQ(SelectMatMul({.rows = kFewRowsLimit + 1}), MatMulKernel::kWideTiles);
  EXPECT_EQ(SelectMatMul({.rows = kWideTileRows, .n = 128256}), MatMulKernel::kWideTiles);
  EXPECT_EQ(SelectMatMul({.rows = kWideTileRows + 1}), MatMulKernel::kTiles);
  EXPECT_EQ(SelectMatMul({.dtype = DType::kF16, .rows = 512, .n = 4096}), MatMulKernel::kTiles);
  EXPECT_EQ(SelectMatMul({.rows = 512, .n = 28672}), MatMulKernel::kLargeTiles);
  EXPECT_EQ(SelectMatMul({.rows = 8192, .n = 4096}), MatMulKernel::kLargeTiles);
  EXPECT_EQ(SelectMatMul({.dtype = DType::kF32, .rows = 100}), MatMulKernel::kPlain);
  EXPECT_EQ(SelectMatMul({.rows = 1, .permuted = false}), MatMulKernel::kPlain);
  EXPECT_EQ(SelectMatMul({.rows = 1, .vectorizable = false}), MatMulKernel::kPlain);
}

TEST(SelectMatMulTest, CublasLtTakesManyRowsWhereItHasRoomAndFits) {
  const MatMulDesc many{.rows = kFewRowsLimit + 1, .cublas_lt = true};
  EXPECT_EQ(SelectMatMul(many), MatMulKernel::kLibrary);
  for (const int64_t rows : {17, 512, 8192})
    EXPECT_EQ(SelectMatMul({.rows = rows, .cublas_lt = true}), MatMulKernel::kLibrary) << rows;
  for (const int64_t rows : {int64_t{1}, kFewRowsLimit})
    EXPECT_EQ(SelectMatMul({.rows = rows, .cublas_lt = true}), MatMulKernel::kStream) << rows;
  MatMulDesc desc = many;
  desc.dtype = DType::kF16;
  desc.vectorizable = false;  // x is copied in any case
  EXPECT_EQ(SelectMatMul(desc), MatMulKernel::kLibrary);
  desc = many, desc.cublas_lt = false;
  EXPECT_EQ(SelectMatMul(desc), MatMulKernel::kWideTiles) << "not asked for, or no room";
  desc = many, desc.dtype = DType::kF32;
  EXPECT_EQ(SelectMatMul(desc), MatMulKernel::kPlain);
  desc = many, desc.permuted = false;
  EXPECT_EQ(SelectMatMul(desc), MatMulKernel::kPlain) << "K is no multiple of 32";
  desc = many, desc.result_aligned = false;
  EXPECT_EQ(SelectMatMul(desc), MatMulKernel::kWideTiles);
  desc = many, desc.bias_fits = false;
  EXPECT_EQ(SelectMatMul(desc), MatMulKernel::kWideTiles);
}

TEST(SelectMatMulTest, SegmentsAreWholeStagesAndAtMostEight) {
  for (int64_t k = 32; k <= 40'000; k += 32) {
    ASSERT_EQ(SegmentOf(k) % 128, 0) << k;
    ASSERT_LE(SegmentsOf(k), 8) << k;
    ASSERT_GE(SegmentsOf(k) * SegmentOf(k), k);
    ASSERT_LT((SegmentsOf(k) - 1) * SegmentOf(k), k) << "an empty segment";
  }
  EXPECT_EQ(SegmentOf(64), 512);
  EXPECT_EQ(SegmentOf(4096), 512);
  EXPECT_EQ(SegmentOf(8192), 1024);
  EXPECT_EQ(SegmentOf(14336), 1792);
}

// Every segment is in one range, no range is empty, and all blocks are on the chip at once.
TEST(SelectMatMulTest, RangesShareKAmongAsManyBlocksAsFit) {
  for (const int64_t n : {8, 128, 129, 2048, 3072, 4096, 6144, 16'896, 17'000, 28'672, 128'256}) {
    for (const int64_t k : {32, 512, 513, 2048, 2560, 4096, 5120, 8192, 11'008, 14'336, 28'672}) {
      const KRanges r = RangesOf(n, k);
      SCOPED_TRACE(testing::Message() << n << " x " << k << ": " << r.ranges);
      ASSERT_GE(r.ranges, 1);
      EXPECT_GE(r.ranges * r.segments, SegmentsOf(k));
      EXPECT_LT((r.ranges - 1) * r.segments, SegmentsOf(k));
      if (r.ranges == 1) {
        EXPECT_EQ(PartsBytes(n, k), 0);
        continue;
      }
      EXPECT_LE(WideTilesOf(n) * r.ranges, kSplitBlocks);
      EXPECT_LE(WideTilesOf(n) * 4, kPartsCounterBytes);
      EXPECT_EQ(PartsOfTile(n, k), 1 + SegmentsOf(k) - r.segments);
      EXPECT_EQ((PartsBytes(n, k) - kPartsCounterBytes) % (kWideTileRows * kWideTileColumns), 0);
    }
  }
  EXPECT_EQ(RangesOf(4096, 14'336).ranges, 8);
  EXPECT_EQ(RangesOf(4096, 4096).ranges, 8);
  EXPECT_EQ(RangesOf(6144, 4096).ranges, 4);
  EXPECT_EQ(RangesOf(28'672, 4096).ranges, 1) << "224 tiles fill the chip";
}

AttentionChoice Select(int64_t min_q_len, int64_t max_q_len, int64_t decode_q_len = 1,
                       int64_t heads_per_group = 4) {
  return SelectAttention({.heads_per_group = heads_per_group,
                          .max_kv_len = 8192,
                          .min_q_len = min_q_len,
                          .max_q_len = max_q_len,
                          .decode_q_len = decode_q_len});
}

TEST(SelectAttentionTest, EverySequenceIsTakenByExactlyOneKernel) {
  for (int64_t heads : {1, 4, 16, 40}) {
    for (int64_t decode_q_len : {0, 1, 4, 8}) {
      for (int64_t low = 0; low <= 20; ++low) {
        for (int64_t high = low; high <= 20; ++high) {
          const AttentionChoice choice = Select(low, high, decode_q_len, heads);
          ASSERT_FALSE(choice.plain);
          for (int64_t q_len = std::max<int64_t>(low, 1); q_len <= high; ++q_len) {
            // As the kernels themselves decide it.
            const int64_t limit = choice.decode ? choice.decode_q_len : 0;
            ASSERT_TRUE(q_len <= limit ? choice.decode : choice.prefill)
                << q_len << " of " << low << ".." << high;
            if (q_len <= limit) {
              ASSERT_LE(q_len * heads, kDecodeRows);
            }
          }
        }
      }
    }
  }
}

TEST(SelectAttentionTest, NoKernelRunsForNothing) {
  EXPECT_FALSE(Select(1, 1).prefill);
  EXPECT_TRUE(Select(1, 1).decode);
  EXPECT_FALSE(Select(2, 100).decode);
  EXPECT_TRUE(Select(1, 100).decode && Select(1, 100).prefill);
  EXPECT_TRUE(Select(0, 0).decode && Select(0, 0).prefill) << "unknown lengths need both";
  EXPECT_FALSE(Select(0, 0, 0).decode) << "no workspace";
  EXPECT_TRUE(Select(1, 1, 1, 40).decode) << "a group wider than an mma";
  EXPECT_FALSE(Select(1, 1, 1, 129).decode) << "a group wider than a prefill block";
}

TEST(SelectAttentionTest, SplitsCoverAllKeysInOrder) {
  for (int64_t split = 0; split < 200; ++split) {
    const int64_t begin = SplitBegin(split), end = SplitBegin(split + 1);
    ASSERT_LT(begin, end);
    EXPECT_EQ(SplitOf(begin), split);
    EXPECT_EQ(SplitOf(end - 1), split);
    EXPECT_EQ(begin % 64, 0) << "tiles of keys do not cross splits";
    EXPECT_TRUE(end - begin == kSplitKeys || (end - begin) * 16 <= begin) << split;
  }
}

// Each takes (D + 2) * 4 bytes of workspace for each row of a group.
TEST(SelectAttentionTest, SplitsAreFew) {
  const auto splits = [](int64_t capacity) {
    return SelectAttention({.max_kv_len = capacity}).max_splits;
  };
  EXPECT_EQ(splits(0), 1);
  EXPECT_EQ(splits(1), 1);
  EXPECT_EQ(splits(256), 1);
  EXPECT_EQ(splits(257), 2);
  EXPECT_EQ(splits(8192), 32);
  EXPECT_EQ(splits(8193), 33);
  EXPECT_EQ(splits(131072), 96);
  EXPECT_EQ(splits(1 << 20), 144);
}

TEST(SelectAttentionTest, WhatTensorCoresDoNotTakeIsPlain) {
  EXPECT_TRUE(SelectAttention({.dtype = DType::kF32}).plain);
  EXPECT_TRUE(SelectAttention({.head_dim = 72}).plain);
  EXPECT_TRUE(SelectAttention({.aligned = false}).plain);
  for (int64_t d : {64, 80, 96, 128, 256}) {
    EXPECT_FALSE(SelectAttention({.dtype = DType::kF16, .head_dim = d}).plain);
  }
}

}  // namespace
}  // namespace trireme::cuda
