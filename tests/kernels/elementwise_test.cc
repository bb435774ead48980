#include <limits>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class ElementwiseTest : public KernelTest {};

// Widths around the vector length, and one large enough that two threads share the rows.
constexpr int64_t kWidths[] = {1, 15, 16, 17, 31, 33, 64, 100, 2048};

// RMSNorm, and LayerNorm with a bias and without.
struct NormCase {
  NormKind kind;
  bool bias;
  NormParams With(const Tensor& weight, const Tensor& shift, float eps) const {
    return {kind, weight.view(), bias ? ConstTensorView(shift.view()) : ConstTensorView(), eps};
  }
};
constexpr NormCase kNorms[] = {
    {NormKind::kRms, false}, {NormKind::kLayer, true}, {NormKind::kLayer, false}};

std::vector<double> ReferenceNorm(const Tensor& x, const NormParams& norm) {
  if (norm.kind == NormKind::kRms)
    return reference::RmsNorm(ToDoubles(x.view()), ToDoubles(norm.weight), norm.eps);
  return reference::LayerNorm(ToDoubles(x.view()), ToDoubles(norm.weight),
                              norm.bias ? ToDoubles(norm.bias) : std::vector<double>(), norm.eps);
}

TEST_P(ElementwiseTest, NormEqualsReference) {
  for (const NormCase& norm : kNorms) {
    for (int64_t h : kWidths) {
      const int64_t rows = h == 2048 ? 40 : 3;
      const Tensor x = device_.Random(dtype(), {rows, h}, 1),
                   weight = device_.Random(dtype(), {h}, 2), bias = device_.Random(dtype(), {h}, 3);
      const Tensor out = device_.Zeros(dtype(), {rows, h});
      const NormParams params = norm.With(weight, bias, 1e-5f);
      Norm(stream(), x.view(), params, out.view());
      // Relative error of the scale: h terms in the sum of squares, each beside the sum; 2 bounds
      // |x| / rms, 2 more what a mean adds with its own h terms, and 1 is the bias.
      const bool rms = norm.kind == NormKind::kRms;
      ExpectClose(out.view(), ReferenceNorm(x, params), h + 8, rms ? 2.0 : 5.0);
    }
  }
}

// In one pass over squares and sums nothing would be left of the variance.
TEST_P(ElementwiseTest, LayerNormOfRowsFarFromZero) {
  constexpr double kMean = 1000.0;
  for (const int64_t h : {33, 2048}) {
    const Tensor x = device_.Random(DType::kF32, {3, h}, 1),
                 weight = device_.Random(DType::kF32, {h}, 2),
                 bias = device_.Random(DType::kF32, {h}, 3);
    for (int64_t i = 0; i < 3 * h; ++i) x.view().as<float>()[i] += static_cast<float>(kMean);
    const Tensor out = device_.Zeros(DType::kF32, {3, h});
    const NormParams params = kNorms[1].With(weight, bias, 1e-5f);
    Norm(stream(), x.view(), params, out.view());
    // The mean's error, a rounding of it for each term of a lane or thread and each level of the
    // tree above, is divided by a deviation of 0.57.
    const double worst = (static_cast<double>(h) / 16 + 10) * kMean * 0x1p-24 / 0.5;
    const std::vector<double> expected = ReferenceNorm(x, params), got = ToDoubles(out.view());
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_NEAR(got[i], expected[i], worst) << h << " " << i;
  }
}

TEST_P(ElementwiseTest, NormWorksInPlaceOnStridedRows) {
  const Tensor weight = device_.Random(dtype(), {20}, 4), bias = device_.Random(dtype(), {20}, 5);
  for (const NormCase& norm : kNorms) {
    const Tensor wide = device_.Random(dtype(), {5, 50}, 3);
    const TensorView x = wide.view().Columns(7, 20);
    const std::vector<double> before = ToDoubles(wide.view());
    const Tensor out = device_.Zeros(dtype(), {5, 20});
    const NormParams params = norm.With(weight, bias, 1e-6f);
    Norm(stream(), x, params, out.view());
    Norm(stream(), x, params, x);
    ExpectSameBits(x, out.view());
    const std::vector<double> after = ToDoubles(wide.view());
    for (int64_t i = 0; i < 250; ++i) {
      const bool inside = i % 50 >= 7 && i % 50 < 27;
      ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
    }
  }
}

TEST_P(ElementwiseTest, AddNormEqualsAddThenNorm) {
  for (const NormCase& norm : kNorms) {
    for (int64_t h : kWidths) {
      const Tensor fused = device_.Random(dtype(), {4, h}, 5),
                   plain = device_.Random(dtype(), {4, h}, 5);
      const Tensor delta = device_.Random(dtype(), {4, h}, 6),
                   weight = device_.Random(dtype(), {h}, 7), bias = device_.Random(dtype(), {h}, 8);
      const Tensor fused_out = device_.Zeros(dtype(), {4, h}),
                   plain_out = device_.Zeros(dtype(), {4, h});
      const NormParams params = norm.With(weight, bias, 1e-5f);
      AddNorm(stream(), fused.view(), delta.view(), params, fused_out.view());
      Add(stream(), plain.view(), delta.view());
      Norm(stream(), plain.view(), params, plain_out.view());
      ExpectSameBits(fused.view(), plain.view());
      ExpectSameBits(fused_out.view(), plain_out.view());
    }
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

TEST_P(ElementwiseTest, GeluEqualsReference) {
  for (int64_t n : kWidths) {
    const Tensor x = device_.Random(dtype(), {3, n}, 10, 12.0);
    const std::vector<double> expected = reference::Gelu(ToDoubles(x.view()));
    Gelu(stream(), x.view());
    // Values reach 12. The exponent's error, a few roundings of up to 2 * 0.8 * (12 + 0.045 * 12^3)
    // = 143, is one of the power; x times its share of the sum stays below 1 where that is large.
    ExpectClose(x.view(), expected, 40, 12.0);
  }
}

TEST_P(ElementwiseTest, GeluOfExtremesNeitherOverflowsNorTurnsNan) {
  const float largest = dtype() == DType::kF16 ? 60000.0f : 3e38f;
  const Tensor x = device_.Zeros(dtype(), {1, 5});
  const float values[] = {-largest, largest, -100.0f, 0.0f, 100.0f};
  for (int64_t i = 0; i < 5; ++i) Fill(x.view().Columns(i, 1), values[i]);
  Gelu(stream(), x.view());
  const std::vector<double> y = ToDoubles(x.view());
  EXPECT_EQ(y[0], 0.0);
  EXPECT_NEAR(y[1], largest, 0.004 * largest);
  EXPECT_EQ(y[2], 0.0);
  EXPECT_EQ(y[3], 0.0);
  EXPECT_EQ(y[4], 100.0);
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
  const Tensor token_ids = device_.From(ids);
  // Odd rows, whole pieces of 16 bytes, and rows that a GPU stores for its tensor cores.
  for (const int64_t width : {33, 40, 64, 544}) {
    SCOPED_TRACE(width);
    const Tensor table = device_.Random(dtype(), {20, width}, 11);
    const Tensor out = device_.Random(dtype(), {7, width}, 12);
    const auto packed = PackLinear(stream(), table.view(), dtype());
    ASSERT_TRUE(packed.ok()) << packed.status();
    Embedding(stream(), token_ids.view(), **packed, 100, out.view());
    EXPECT_EQ(ToDoubles(out.view()),
              reference::Embedding(ids, ToDoubles(table.view()), width, 100));
  }
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
               weight = device_.Random(dtype(), {kWidth}, 16),
               bias = device_.Random(dtype(), {kWidth}, 17);
  for (const NormCase& norm : kNorms) {
    const NormParams params = norm.With(weight, bias, 1e-5f);
    const Tensor all = device_.Zeros(dtype(), {kRows, kWidth});
    Norm(stream(), x.view(), params, all.view());
    for (int64_t r = 0; r < kRows; r += 11) {
      const Tensor one = device_.Zeros(dtype(), {1, kWidth});
      Norm(stream(), x.view().Rows(r, 1), params, one.view());
      ExpectSameBits(one.view(), all.view().Rows(r, 1));
    }
  }
  const Tensor gated = device_.Zeros(dtype(), {kRows, kWidth / 2});
  SiluAndMul(stream(), x.view(), gated.view());
  for (int64_t r = 0; r < kRows; r += 11) {
    const Tensor gate = device_.Zeros(dtype(), {1, kWidth / 2});
    SiluAndMul(stream(), x.view().Rows(r, 1), gate.view());
    ExpectSameBits(gate.view(), gated.view().Rows(r, 1));
  }
}

TEST_P(ElementwiseTest, NoRowsIsNoWork) {
  const Tensor x = device_.Zeros(dtype(), {0, 8}), weight = device_.Random(dtype(), {8}, 17);
  for (const NormCase& norm : kNorms)
    Norm(stream(), x.view(), norm.With(weight, weight, 1e-5f), x.view());
  Add(stream(), x.view(), x.view());
  Gelu(stream(), x.view());
  EXPECT_TRUE(stream().Synchronize().ok());
}

TEST_P(ElementwiseTest, CopiedRowsLeaveWhatLiesBetweenThem) {
  constexpr int64_t kRows = 5, kStride = 7, kWidth = 3;
  std::vector<int32_t> from(kRows * kWidth);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<int32_t>(i) + 1;
  const Tensor to = device_.Zeros(DType::kI32, {kRows, kStride});
  stream().CopyRows(to.view().row<int32_t>(0) + 2, kStride * sizeof(int32_t), from.data(),
                    kWidth * sizeof(int32_t), kWidth * sizeof(int32_t), kRows);
  stream().CopyRows(to.view().data, 4, from.data(), 4, 0, kRows);
  EXPECT_TRUE(stream().Synchronize().ok());
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < kStride; ++c) {
      const bool inside = c >= 2 && c < 2 + kWidth;
      EXPECT_EQ(to.view().row<int32_t>(r)[c], inside ? r * kWidth + c - 2 + 1 : 0)
          << r << ", " << c;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, ElementwiseTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
