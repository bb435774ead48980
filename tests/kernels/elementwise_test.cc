#include <limits>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class ElementwiseTest : public KernelTest {};

// Widths around the vector length, and one large enough that two threads share the rows.
constexpr int64_t kWidths[] = {1, 15, 16, 17, 31, 33, 64, 100, 2048};

TEST_P(ElementwiseTest, RmsNormEqualsReference) {
  for (int64_t h : kWidths) {
    const int64_t rows = h == 2048 ? 40 : 3;
    const Tensor x = device_.Random(dtype(), {rows, h}, 1),
                 weight = device_.Random(dtype(), {h}, 2);
    const Tensor out = device_.Zeros(dtype(), {rows, h});
    RmsNorm(stream(), x.view(), weight.view(), 1e-5f, out.view());
    // Relative error of the scale: h terms in the sum of squares, each beside the sum; 2 bounds |x|
    // / rms.
    ExpectClose(out.view(), reference::RmsNorm(ToDoubles(x.view()), ToDoubles(weight.view()), 1e-5),
                h + 8, 2.0);
  }
}

TEST_P(ElementwiseTest, RmsNormWorksInPlaceOnStridedRows) {
  const Tensor wide = device_.Random(dtype(), {5, 50}, 3),
               weight = device_.Random(dtype(), {20}, 4);
  const TensorView x = wide.view().Columns(7, 20);
  const std::vector<double> before = ToDoubles(wide.view());
  const Tensor out = device_.Zeros(dtype(), {5, 20});
  RmsNorm(stream(), x, weight.view(), 1e-6f, out.view());
  RmsNorm(stream(), x, weight.view(), 1e-6f, x);
  ExpectSameBits(x, out.view());
  const std::vector<double> after = ToDoubles(wide.view());
  for (int64_t i = 0; i < 250; ++i) {
    const bool inside = i % 50 >= 7 && i % 50 < 27;
    ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
  }
}

TEST_P(ElementwiseTest, AddRmsNormEqualsAddThenRmsNorm) {
  for (int64_t h : kWidths) {
    const Tensor fused = device_.Random(dtype(), {4, h}, 5),
                 plain = device_.Random(dtype(), {4, h}, 5);
    const Tensor delta = device_.Random(dtype(), {4, h}, 6),
                 weight = device_.Random(dtype(), {h}, 7);
    const Tensor fused_out = device_.Zeros(dtype(), {4, h}),
                 plain_out = device_.Zeros(dtype(), {4, h});
    AddRmsNorm(stream(), fused.view(), delta.view(), weight.view(), 1e-5f, fused_out.view());
    Add(stream(), plain.view(), delta.view());
    RmsNorm(stream(), plain.view(), weight.view(), 1e-5f, plain_out.view());
    ExpectSameBits(fused.view(), plain.view());
    ExpectSameBits(fused_out.view(), plain_out.view());
  }
}

TEST_P(ElementwiseTest, AddEqualsReference) {
  for (int64_t h : kWidths) {
    const Tensor x = device_.Random(dtype(), {3, h}, 8), delta = device_.Random(dtype(), {3, h}, 9);
    const std::vector<double> expected =
        reference::Add(ToDoubles(x.view()), ToDoubles(delta.view()));
    Add(stream(), x.view(), delta.view());
    ExpectClose(x.view(), expected, 1, 2.0);
  }
}

TEST_P(ElementwiseTest, SiluAndMulEqualsReference) {
  for (int64_t n : kWidths) {
    const int64_t rows = n == 2048 ? 20 : 3;
    const Tensor gate_up = device_.Random(dtype(), {rows, 2 * n}, 10, 12.0),
                 out = device_.Zeros(dtype(), {rows, n});
    SiluAndMul(stream(), gate_up.view(), out.view());
    // Values reach 12 * 12; four roundings and Exp's 2e-7 (3.4 roundings).
    ExpectClose(out.view(), reference::SiluAndMul(ToDoubles(gate_up.view()), n), 8, 144.0);
  }
}

TEST_P(ElementwiseTest, SiluOfExtremesNeitherOverflowsNorTurnsNan) {
  const Tensor gate_up = device_.Zeros(dtype(), {1, 8}), out = device_.Zeros(dtype(), {1, 4});
  const float largest = dtype() == DType::kF16 ? 60000.0f : 3e38f;
  const float gates[] = {-largest, largest, -100.0f, 0.0f};
  Fill(gate_up.view(), 1.0);
  for (int64_t i = 0; i < 4; ++i) Fill(gate_up.view().Columns(i, 1), gates[i]);
  SiluAndMul(stream(), gate_up.view(), out.view());
  const std::vector<double> y = ToDoubles(out.view());
  EXPECT_NEAR(
      y[0], 0.0,
      dtype() == DType::kF16 ? 1e-30 : 3.0);  // -3e38 / e^88 is -1.8, where the clamp of Exp shows
  EXPECT_NEAR(y[1], largest, 0.004 * largest);
  EXPECT_NEAR(y[2], 0.0, 1e-35);
  EXPECT_EQ(y[3], 0.0);
}

TEST_P(ElementwiseTest, EmbeddingGivesZerosOutsideTheShard) {
  const std::vector<int32_t> ids = {99, 100, 105, 119, 120, 0, 2147483647};
  const Tensor token_ids = device_.From(ids), table = device_.Random(dtype(), {20, 33}, 11);
  const Tensor out = device_.Random(dtype(), {7, 33}, 12);
  const auto packed = PackLinear(stream(), table.view(), dtype());
  ASSERT_TRUE(packed.ok()) << packed.status();
  Embedding(stream(), token_ids.view(), **packed, 100, out.view());
  EXPECT_EQ(ToDoubles(out.view()), reference::Embedding(ids, ToDoubles(table.view()), 33, 100));
}

TEST_P(ElementwiseTest, EmbeddingShardsSumToTheWhole) {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 300; ++i) ids.push_back(i * 7 % 300);
  const Tensor token_ids = device_.From(ids), table = device_.Random(dtype(), {300, 15}, 13);
  const Tensor whole = device_.Zeros(dtype(), {300, 15}), sum = device_.Zeros(dtype(), {300, 15});
  const auto packed = PackLinear(stream(), table.view(), dtype());
  ASSERT_TRUE(packed.ok()) << packed.status();
  Embedding(stream(), token_ids.view(), **packed, 0, whole.view());
  for (int64_t begin : {0, 100, 200}) {
    const Tensor part = device_.Zeros(dtype(), {300, 15});
    const auto piece = PackLinear(stream(), table.view().Rows(begin, 100), dtype());
    ASSERT_TRUE(piece.ok()) << piece.status();
    Embedding(stream(), token_ids.view(), **piece, begin, part.view());
    Add(stream(), sum.view(), part.view());
  }
  ExpectSameBits(sum.view(), whole.view());
}

TEST_P(ElementwiseTest, GatherRowsEqualsReference) {
  const std::vector<int32_t> indices = {4, 0, 4, 2};
  const Tensor wide = device_.Random(dtype(), {5, 40}, 14), index = device_.From(indices);
  const Tensor out = device_.Zeros(dtype(), {4, 19});
  const TensorView x = wide.view().Columns(3, 19);
  GatherRows(stream(), x, index.view(), out.view());
  EXPECT_EQ(ToDoubles(out.view()), reference::GatherRows(ToDoubles(x), indices, 19));
}

TEST_P(ElementwiseTest, ARowAloneEqualsTheRowInABatch) {
  constexpr int64_t kRows = 67, kWidth = 1000;
  const Tensor x = device_.Random(dtype(), {kRows, kWidth}, 15),
               weight = device_.Random(dtype(), {kWidth}, 16);
  const Tensor normed = device_.Zeros(dtype(), {kRows, kWidth}),
               gated = device_.Zeros(dtype(), {kRows, kWidth / 2});
  RmsNorm(stream(), x.view(), weight.view(), 1e-5f, normed.view());
  SiluAndMul(stream(), x.view(), gated.view());
  for (int64_t r = 0; r < kRows; r += 11) {
    const Tensor norm = device_.Zeros(dtype(), {1, kWidth}),
                 gate = device_.Zeros(dtype(), {1, kWidth / 2});
    RmsNorm(stream(), x.view().Rows(r, 1), weight.view(), 1e-5f, norm.view());
    SiluAndMul(stream(), x.view().Rows(r, 1), gate.view());
    ExpectSameBits(norm.view(), normed.view().Rows(r, 1));
    ExpectSameBits(gate.view(), gated.view().Rows(r, 1));
  }
}

TEST_P(ElementwiseTest, NoRowsIsNoWork) {
  const Tensor x = device_.Zeros(dtype(), {0, 8}), weight = device_.Random(dtype(), {8}, 17);
  RmsNorm(stream(), x.view(), weight.view(), 1e-5f, x.view());
  Add(stream(), x.view(), x.view());
  EXPECT_TRUE(stream().Synchronize().ok());
}

INSTANTIATE_TEST_SUITE_P(Devices, ElementwiseTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
