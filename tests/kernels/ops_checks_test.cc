// The shape and dtype rules of ops.h end the process with a line that names what is wrong; the cost
// formulas count what a naive loop would.
#include "kernels/sampling.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class OpsDeathTest : public ::testing::Test {
 protected:
  OpsDeathTest() { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
  Stream& stream() { return device_.stream(); }
  TestDevice device_;
};

TEST_F(OpsDeathTest, NormsAndSums) {
  const Tensor x = device_.Zeros(DType::kF32, {2, 8}), half = device_.Zeros(DType::kBF16, {2, 8});
  const Tensor weight = device_.Zeros(DType::kF32, {7}), right = device_.Zeros(DType::kF32, {8});
  const NormParams norm{.weight = right.view()};
  EXPECT_DEATH(Norm(stream(), x.view(), {.weight = weight.view()}, x.view()),
               "norm weight is \\[7\\], must be \\[8\\]");
  EXPECT_DEATH(Norm(stream(), x.view(), norm, half.view()), "out is bf16, must be f32");
  NormParams layer{.kind = NormKind::kLayer, .weight = right.view(), .bias = weight.view()};
  EXPECT_DEATH(Norm(stream(), x.view(), layer, x.view()), "norm bias is \\[7\\], must be \\[8\\]");
  layer.kind = NormKind::kRms;
  EXPECT_DEATH(Norm(stream(), x.view(), layer, x.view()), "an RMSNorm has no bias");
  EXPECT_DEATH(Add(stream(), x.view(), x.view().Columns(0, 4)), "delta is \\[2, 4\\]");
  EXPECT_DEATH(AddNorm(stream(), x.view(), half.view(), norm, x.view()), "delta is bf16");
  EXPECT_DEATH(SiluAndMul(stream(), x.view(), x.view()),
               "gate_up is \\[2, 8\\], must be \\[2, 16\\]");
}

TEST_F(OpsDeathTest, MatMul) {
  const Tensor w = device_.Zeros(DType::kF32, {5, 8}), x = device_.Zeros(DType::kF32, {2, 8});
  const Tensor y = device_.Zeros(DType::kF32, {2, 5}), half = device_.Zeros(DType::kBF16, {2, 8});
  const auto packed = PackLinear(stream(), w.view(), DType::kF32);
  ASSERT_TRUE(packed.ok());
  EXPECT_DEATH(MatMul(stream(), half.view(), **packed, {}, y.view()), "x is bf16, the weight f32");
  EXPECT_DEATH(MatMul(stream(), x.view().Columns(0, 7), **packed, {}, y.view()), "another K");
  EXPECT_DEATH(MatMul(stream(), x.view(), **packed, {}, x.view()),
               "y is \\[2, 8\\], must be \\[2, 5\\]");
  EXPECT_DEATH(MatMul(stream(), x.view(), **packed, half.view(), y.view()), "bias is \\[2, 8\\]");
  EXPECT_DEATH((void)PackLinear(stream(), w.view(), DType::kI32), "packed to i32");
}

TEST_F(OpsDeathTest, MatMulGelu) {
  const Tensor w = device_.Zeros(DType::kF32, {6, 8}), x = device_.Zeros(DType::kF32, {2, 8});
  const Tensor y = device_.Zeros(DType::kF32, {2, 6});
  const auto plain = PackLinear(stream(), w.view(), DType::kF32);
  const auto gated = PackLinear(stream(), w.view(), DType::kF32, LinearUse::kMatMulSwiGlu);
  ASSERT_TRUE(plain.ok() && gated.ok());
  EXPECT_DEATH(MatMulGelu(stream(), x.view(), **plain, {}, x.view()),
               "y is \\[2, 8\\], must be \\[2, 6\\]");
  EXPECT_DEATH(MatMulGelu(stream(), x.view(), **gated, {}, y.view()),
               "packed for matmul with SwiGLU, not for matmul");
}

TEST_F(OpsDeathTest, MatMulSwiGlu) {
  const Tensor w = device_.Zeros(DType::kF32, {6, 8}), x = device_.Zeros(DType::kF32, {2, 8});
  const Tensor y = device_.Zeros(DType::kF32, {2, 3}), wide = device_.Zeros(DType::kF32, {2, 6});
  const auto plain = PackLinear(stream(), w.view(), DType::kF32);
  const auto gated = PackLinear(stream(), w.view(), DType::kF32, LinearUse::kMatMulSwiGlu);
  ASSERT_TRUE(plain.ok() && gated.ok());
  EXPECT_DEATH(MatMulSwiGlu(stream(), x.view(), **gated, {}, wide.view()),
               "y is \\[2, 6\\], must be \\[2, 3\\]");
  EXPECT_DEATH(MatMulSwiGlu(stream(), x.view(), **gated, y.view(), y.view()), "bias is \\[2, 3\\]");
  EXPECT_DEATH(MatMulSwiGlu(stream(), x.view(), **plain, {}, y.view()),
               "packed for matmul, not for matmul with SwiGLU");
  EXPECT_DEATH(MatMul(stream(), x.view(), **gated, {}, wide.view()),
               "packed for matmul with SwiGLU, not for matmul");
  EXPECT_DEATH(
      (void)PackLinear(stream(), w.view().Rows(0, 5), DType::kF32, LinearUse::kMatMulSwiGlu),
      "gate and up have 5 rows together");
}

TEST_F(OpsDeathTest, LookUps) {
  const Tensor table = device_.Zeros(DType::kF32, {5, 8}), out = device_.Zeros(DType::kF32, {2, 8});
  const Tensor wide_ids = device_.From(std::vector<int64_t>{1, 2});
  const Tensor beyond = device_.From(std::vector<int32_t>{1, 5});
  const auto packed = PackLinear(stream(), table.view(), DType::kF32);
  ASSERT_TRUE(packed.ok());
  EXPECT_DEATH(Embedding(stream(), wide_ids.view(), **packed, 0, out.view()), "token_ids is i64");
  EXPECT_DEATH(GatherRows(stream(), table.view(), beyond.view(), out.view()),
               "gather index 5 of 5 rows");
}

TEST_F(OpsDeathTest, RopeAndAttention) {
  const Tensor qkv = device_.Zeros(DType::kF32, {1, 4 * 8}),
               cache = device_.Zeros(DType::kF32, {2, 4, 1, 8});
  const Tensor angles = device_.Zeros(DType::kF32, {10, 8}),
               out = device_.Zeros(DType::kF32, {1, 16});
  const Tensor late = device_.From(std::vector<int32_t>{10}),
               zero = device_.From(std::vector<int32_t>{0});
  const Tensor slot = device_.From(std::vector<int64_t>{0}),
               far_slot = device_.From(std::vector<int64_t>{8});
  const Tensor tables = device_.Zeros(DType::kI32, {1, 2}),
               cu = device_.From(std::vector<int32_t>{0, 1});
  const Tensor too_long = device_.From(std::vector<int32_t>{9});
  const PagedKv kv{cache.view(), cache.view(), tables.view()};
  const RopeParams rope{angles.view(), {}, {}, 0};
  EXPECT_DEATH(RopeAndStoreKv(stream(), qkv.view(), late.view(), slot.view(), rope, 2, kv),
               "position 10 of row 0");
  EXPECT_DEATH(RopeAndStoreKv(stream(), qkv.view(), zero.view(), far_slot.view(), rope, 2, kv),
               "slot of row 0");
  EXPECT_DEATH(RopeAndStoreKv(stream(), qkv.view(), zero.view(), slot.view(), rope, 3, kv),
               "another width");
  EXPECT_DEATH(PagedAttention(stream(), out.view(), kv, cu.view(), too_long.view(), {}, out.view()),
               "of 9 keys");
  EXPECT_DEATH(PagedAttention(stream(), out.view(), kv, cu.view(), zero.view(), {}, out.view()),
               "more queries");
  EXPECT_DEATH(PagedAttention(stream(), out.view().Columns(0, 12), kv, cu.view(), zero.view(), {},
                              out.view().Columns(0, 12)),
               "no multiple of the kv heads' 8");
}

TEST(OpCostTest, AttentionCountsThePairsOfALoop) {
  for (int64_t window : {0, 1, 5, 100}) {
    for (int64_t q_len : {1, 4, 20}) {
      for (int64_t kv_len : {int64_t{20}, int64_t{33}}) {
        double pairs = 0;
        for (int64_t i = 0; i < q_len; ++i) {
          const int64_t keys = kv_len - q_len + i + 1;
          pairs += static_cast<double>(window > 0 ? std::min(window, keys) : keys);
        }
        const OpCost cost = PagedAttentionCost(q_len, kv_len, 8, 2, 64, DType::kBF16, window);
        EXPECT_EQ(cost.flops, 4 * pairs * 8 * 64) << window << " " << q_len << " " << kv_len;
      }
    }
  }
}

TEST(OpCostTest, MatMulMovesEveryOperandOnce) {
  const OpCost cost = MatMulCost(3, 10, 20, DType::kF32, DType::kBF16);
  EXPECT_EQ(cost.flops, 2.0 * 3 * 10 * 20);
  EXPECT_EQ(cost.bytes, 10 * 20 * 2 + 3 * 20 * 4 + 3 * 10 * 4);
}

TEST(OpCostTest, WeightsOfE4M3AreAByteEachAndAScaleARow) {
  const OpCost cost = MatMulCost(3, 10, 20, DType::kF32, DType::kE4M3);
  EXPECT_EQ(cost.flops, 2.0 * 3 * 10 * 20);
  EXPECT_EQ(cost.bytes, 10 * 20 + 10 * 4 + 3 * 20 * 4 + 3 * 10 * 4);
  EXPECT_EQ(MatMulSwiGluCost(1, 10, 20, DType::kBF16, DType::kE4M3).bytes,
            20 * 20 + 20 * 4 + 20 * 2 + 10 * 2);
}

TEST(OpCostTest, MatMulSwiGluSavesStoringAndReadingWhatIsBetweenTheTwo) {
  const OpCost product = MatMulCost(3, 20, 7, DType::kBF16, DType::kBF16);
  const OpCost gated = SiluAndMulCost(3, 10, DType::kBF16);
  const OpCost fused = MatMulSwiGluCost(3, 10, 7, DType::kBF16, DType::kBF16);
  EXPECT_EQ(fused.flops, product.flops + gated.flops);
  EXPECT_EQ(fused.bytes, product.bytes + gated.bytes - 2 * 3 * 20 * 2);
}

// What a loop over every element of [T, H] reads, writes and computes.
struct LoopCount {
  double flops = 0, bytes = 0;
  void Each(int64_t elements, int flops_each, int tensors, DType dtype) {
    for (int64_t i = 0; i < elements; ++i) {
      flops += flops_each;
      for (int tensor = 0; tensor < tensors; ++tensor) bytes += static_cast<double>(SizeOf(dtype));
    }
  }
};

void ExpectCost(const OpCost& cost, const LoopCount& loop) {
  EXPECT_EQ(cost.flops, loop.flops);
  EXPECT_EQ(cost.bytes, loop.bytes);
}

TEST(OpCostTest, AddReadsTwoAndWritesOne) {
  for (const DType act : {DType::kF32, DType::kBF16}) {
    LoopCount loop;
    loop.Each(7 * 33, 1, 3, act);
    ExpectCost(AddCost(7, 33, act), loop);
  }
}

// Square, sum, scale by the root and by the weight; the weight itself is read once. A LayerNorm
// sums for the mean, subtracts it and adds the bias besides.
TEST(OpCostTest, NormsReadOneWriteOneAndTheirWeights) {
  LoopCount rms, layer;
  rms.Each(7 * 33, 4, 2, DType::kBF16);
  rms.Each(33, 0, 1, DType::kBF16);
  ExpectCost(NormCost(NormKind::kRms, 7, 33, DType::kBF16), rms);
  layer.Each(7 * 33, 7, 2, DType::kBF16);
  layer.Each(33, 0, 2, DType::kBF16);
  ExpectCost(NormCost(NormKind::kLayer, 7, 33, DType::kBF16), layer);
}

TEST(OpCostTest, AddNormSavesReadingTheSumAgain) {
  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    const OpCost add = AddCost(7, 33, DType::kBF16), norm = NormCost(kind, 7, 33, DType::kBF16);
    const OpCost fused = AddNormCost(kind, 7, 33, DType::kBF16);
    EXPECT_EQ(fused.flops, add.flops + norm.flops);
    EXPECT_EQ(fused.bytes, add.bytes + norm.bytes - 7 * 33 * 2);
  }
}

TEST(OpCostTest, MatMulGeluSavesReadingAndStoringTheProductAgain) {
  const OpCost product = MatMulCost(3, 20, 7, DType::kBF16, DType::kBF16);
  const OpCost gelu = GeluCost(3, 20, DType::kBF16);
  const OpCost fused = MatMulGeluCost(3, 20, 7, DType::kBF16, DType::kBF16);
  LoopCount loop;
  loop.Each(3 * 20, 8, 2, DType::kBF16);
  ExpectCost(gelu, loop);
  EXPECT_EQ(fused.flops, product.flops + gelu.flops);
  EXPECT_EQ(fused.bytes, product.bytes);
}

TEST(OpCostTest, GatherRowsCopiesRowsAndReadsTheirIndices) {
  LoopCount loop;
  loop.Each(5 * 19, 0, 2, DType::kF16);
  loop.Each(5, 0, 1, DType::kI32);
  ExpectCost(GatherRowsCost(5, 19, DType::kF16), loop);
}

TEST(OpCostTest, PenalizeLogitsTouchesItsPlacesAlone) {
  LoopCount loop;
  loop.Each(9, 0, 2, DType::kI32);  // row and column
  loop.Each(9, 2, 2, DType::kF32);  // repetition and subtract
  loop.Each(9, 0, 3, DType::kF32);  // the logit read, written, and kept in `before`
  ExpectCost(PenalizeLogitsCost(9), loop);
}

}  // namespace
}  // namespace trireme
