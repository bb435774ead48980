#include <cmath>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class MatMulTest : public KernelTest {
 protected:
  std::unique_ptr<LinearWeight> Pack(const Tensor& weight, DType to) {
    auto packed = PackLinear(stream(), weight.view(), to);
    CHECK(packed.ok()) << packed.status().ToString();
    return std::move(packed).value();
  }
};

struct Dims {
  int64_t rows, n, k;
};

TEST_P(MatMulTest, EqualsReference) {
  // Every remainder of the row tiles, widths around the vector and the panel, and sums over more
  // than one stretch of k (1024 floats or 2048 halves).
  const Dims all[] = {{1, 1, 1},     {1, 64, 64},    {2, 65, 3},    {3, 63, 17},   {4, 16, 33},
                      {5, 17, 16},   {6, 130, 31},   {7, 128, 100}, {13, 200, 7},  {200, 70, 24},
                      {7, 65, 2051}, {1, 130, 4097}, {3, 40, 64},   {17, 70, 544}, {16, 33, 1056}};
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 1),
                 w = device_.Random(dtype(), {dims.n, dims.k}, 2);
    const Tensor bias = device_.Random(dtype(), {dims.n}, 3);
    const auto packed = Pack(w, dtype());
    for (DType out_type : {dtype(), DType::kF32}) {
      const Tensor y = device_.Zeros(out_type, {dims.rows, dims.n});
      MatMul(stream(), x.view(), *packed, {}, y.view());
      ExpectClose(y.view(), reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()), {}, dims.k),
                  dims.k, 1.0);
      MatMul(stream(), x.view(), *packed, bias.view(), y.view());
      ExpectClose(y.view(),
                  reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()),
                                    ToDoubles(bias.view()), dims.k),
                  dims.k + 1, 1.0);
    }
  }
}

TEST_P(MatMulTest, StridedInputAndOutputLeaveTheirNeighboursAlone) {
  constexpr int64_t kRows = 9, kN = 70, kK = 37;
  const Tensor wide_x = device_.Random(dtype(), {kRows, 50}, 4),
               wide_y = device_.Random(dtype(), {kRows, 100}, 5);
  const Tensor w = device_.Random(dtype(), {kN, kK}, 6);
  const std::vector<double> before = ToDoubles(wide_y.view());
  const TensorView x = wide_x.view().Columns(5, kK), y = wide_y.view().Columns(11, kN);
  MatMul(stream(), x, *Pack(w, dtype()), {}, y);
  ExpectClose(y, reference::MatMul(ToDoubles(x), ToDoubles(w.view()), {}, kK), kK, 1.0);
  const std::vector<double> after = ToDoubles(wide_y.view());
  for (int64_t i = 0; i < kRows * 100; ++i) {
    const bool inside = i % 100 >= 11 && i % 100 < 11 + kN;
    ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
  }
}

TEST_P(MatMulTest, ARowsBitsDoNotDependOnTheBatchOrTheThreads) {
  // On GPUs more than one segment of 512 and one stretch of 32; the emulator is slow.
  const int64_t kN = GetParam().device.host_cuda ? 130 : 333;
  const int64_t kK = GetParam().device.host_cuda ? 544 : GetParam().device.gpu() ? 2592 : 2500;
  const Tensor x = device_.Random(dtype(), {210, kK}, 7), w = device_.Random(dtype(), {kN, kK}, 8);
  const auto packed = Pack(w, dtype());
  const Tensor whole = device_.Zeros(DType::kF32, {210, kN});
  MatMul(stream(), x.view(), *packed, {}, whole.view());
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 16, 17, 100}) {
    for (int64_t first : {int64_t{0}, int64_t{101}, 210 - rows}) {
      const Tensor part = device_.Zeros(DType::kF32, {rows, kN});
      MatMul(stream(), x.view().Rows(first, rows), *packed, {}, part.view());
      ExpectSameBits(part.view(), whole.view().Rows(first, rows));
    }
  }
  if (GetParam().device.gpu()) return;  // it has no threads to differ in
  const TestDevice alone(1), three(3);
  for (const TestDevice* other : {&alone, &three}) {
    const auto other_packed = PackLinear(other->stream(), w.view(), dtype());
    const Tensor y = other->Zeros(DType::kF32, {210, kN});
    MatMul(other->stream(), x.view(), **other_packed, {}, y.view());
    ExpectSameBits(y.view(), whole.view());
  }
}

TEST_P(MatMulTest, PackingConvertsFromAnyFloatType) {
  for (DType from : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Tensor w = device_.Random(from, {40, 21}, 9), rounded = device_.Zeros(dtype(), {40, 21});
    const Tensor identity = device_.Zeros(dtype(), {21, 21}), y = device_.Zeros(dtype(), {21, 40});
    for (int64_t i = 0; i < 21; ++i) Fill(identity.view().Rows(i, 1).Columns(i, 1), 1.0);
    MatMul(stream(), identity.view(), *Pack(w, dtype()), {}, y.view());
    // x the identity gives the packed weights back, each rounded once.
    const std::vector<double> in = ToDoubles(w.view()), out = ToDoubles(y.view());
    for (int64_t n = 0; n < 40; ++n) {
      for (int64_t k = 0; k < 21; ++k) {
        const double bound =
            UnitRoundoff(dtype()) * std::abs(in[n * 21 + k]) * (from == dtype() ? 0.0 : 1.0);
        ASSERT_NEAR(out[k * 40 + n], in[n * 21 + k], bound) << n << ", " << k;
      }
    }
  }
}

TEST_P(MatMulTest, HoldsOneCopyOfTheWeights) {
  const Tensor w = device_.Random(dtype(), {128, 64}, 10);
  EXPECT_EQ(Pack(w, dtype())->bytes, w.bytes());
}

TEST_P(MatMulTest, NoRowsIsNoWork) {
  const Tensor w = device_.Random(dtype(), {10, 8}, 11), x = device_.Zeros(dtype(), {0, 8});
  const Tensor y = device_.Zeros(dtype(), {0, 10});
  MatMul(stream(), x.view(), *Pack(w, dtype()), {}, y.view());
  EXPECT_TRUE(stream().Synchronize().ok());
}

INSTANTIATE_TEST_SUITE_P(Devices, MatMulTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
