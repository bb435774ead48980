// MatMulGelu against its two twins: the naive one in double, and MatMul followed by Gelu, whose
// bits it must have.
#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class MatMulGeluTest : public KernelTest {
 protected:
  std::unique_ptr<LinearWeight> Pack(const Tensor& weight, DType stored, bool codes = false) {
    auto packed = PackLinear(stream(), weight.view(), stored);
    CHECK(packed.ok()) << packed.status().ToString();
    (*packed)->quantizes_activations = codes;
    CHECK(ReserveMatMul(stream(), 256, {packed->get()}).ok());
    return std::move(packed).value();
  }
};

struct Dims {
  int64_t rows, n, k;
};

TEST_P(MatMulGeluTest, HasTheUnfusedBits) {
  // K for every kernel, of e4m3 too, and over more than one segment of 512; rows around the tensor
  // cores' 16 and a tile's 64; columns around panels and tiles.
  std::vector<Dims> all = {{1, 1, 1},    {2, 5, 33},    {1, 64, 64},  {16, 65, 128}, {17, 8, 576},
                           {65, 40, 64}, {7, 130, 100}, {3, 9, 1088}, {200, 70, 24}};
  // As many blocks as the large tiles want; the emulator is slow.
  if (GetParam().device.gpu() && dtype() != DType::kF32) all.push_back({65, 16886, 64});
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 1),
                 w = device_.Random(DType::kF32, {dims.n, dims.k}, 2),
                 bias = device_.Random(dtype(), {dims.n}, 3);
    const Tensor fused = device_.Zeros(dtype(), {dims.rows, dims.n}),
                 unfused = device_.Zeros(dtype(), {dims.rows, dims.n});
    struct Stored {
      DType dtype;
      bool codes;  // of activations
    };
    for (const auto& [stored, codes] :
         {Stored{dtype(), false}, {DType::kE4M3, false}, {DType::kE4M3, true}}) {
      const auto packed = Pack(w, stored, codes);
      for (const ConstTensorView& b : {ConstTensorView(), ConstTensorView(bias.view())}) {
        if (dims.n > 8000 && !b) continue;
        MatMulGelu(stream(), x.view(), *packed, b, fused.view());
        MatMul(stream(), x.view(), *packed, b, unfused.view());
        Gelu(stream(), unfused.view());
        ExpectSameBits(fused.view(), unfused.view());
      }
    }
  }
}

// The product bears the error of a sum and one rounding, by at most 1.13 of which the GELU changes;
// the GELU itself that of some operations and one rounding.
TEST_P(MatMulGeluTest, EqualsReference) {
  for (const Dims& dims : {Dims{3, 70, 96}, Dims{20, 33, 64}, Dims{5, 7, 13}}) {
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 4),
                 w = device_.Random(dtype(), {dims.n, dims.k}, 5),
                 bias = device_.Random(dtype(), {dims.n}, 6);
    const Tensor y = device_.Zeros(dtype(), {dims.rows, dims.n});
    MatMulGelu(stream(), x.view(), *Pack(w, dtype()), bias.view(), y.view());
    const std::vector<double> product =
        reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()), ToDoubles(bias.view()), dims.k);
    const std::vector<double> expected = reference::Gelu(product), actual = ToDoubles(y.view());
    const double unit = UnitRoundoff(dtype()), sum = static_cast<double>(dims.k + 1) * 0x1p-24;
    for (size_t i = 0; i < actual.size(); ++i) {
      const double bound =
          1.13 * (unit * std::abs(product[i]) + sum) + unit * std::abs(expected[i]) + 16 * 0x1p-24;
      ASSERT_NEAR(actual[i], expected[i], 1.1 * bound) << i;
    }
  }
}

TEST_P(MatMulGeluTest, WritesNothingBesideItsColumns) {
  const Tensor x = device_.Random(dtype(), {20, 64}, 7), w = device_.Random(dtype(), {40, 64}, 8);
  const Tensor wide = device_.Random(dtype(), {20, 60}, 9),
               before = device_.Random(dtype(), {20, 60}, 9),
               alone = device_.Zeros(dtype(), {20, 40});
  const auto packed = Pack(w, dtype());
  MatMulGelu(stream(), x.view(), *packed, {}, wide.view().Columns(11, 40));
  MatMulGelu(stream(), x.view(), *packed, {}, alone.view());
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 11}, {51, 9}})
    EXPECT_EQ(ToDoubles(wide.view().Columns(first, count)),
              ToDoubles(before.view().Columns(first, count)));
  // cuBLASLt's order of a sum may hang on the result's stride.
  if (GetParam().device.cublas_lt) return;
  EXPECT_EQ(ToDoubles(wide.view().Columns(11, 40)), ToDoubles(alone.view()));
}

INSTANTIATE_TEST_SUITE_P(Devices, MatMulGeluTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
