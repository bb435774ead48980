#include <algorithm>
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
    CHECK(ReserveMatMul(stream(), 256, {packed->get()}).ok());
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
                      {7, 65, 2051}, {1, 130, 4097}, {3, 40, 64},   {17, 70, 544}, {16, 33, 1056},
                      {17, 72, 544}, {70, 24, 544},  {40, 136, 64}};
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

// As many columns as a vocabulary has: the larger tiles of GPUs, with a head's f32 result too.
TEST_P(MatMulTest, AHeadOfManyColumnsEqualsReference) {
  if (!GetParam().device.gpu()) return;  // to it they are more panels
  constexpr int64_t kRows = 65, kN = 16'904, kK = 64;
  const Tensor x = device_.Random(dtype(), {kRows, kK}, 12),
               w = device_.Random(dtype(), {kN, kK}, 13);
  const auto packed = Pack(w, dtype());
  const auto expected = reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()), {}, kK);
  for (DType out_type : {dtype(), DType::kF32}) {
    const Tensor y = device_.Zeros(out_type, {kRows, kN});
    MatMul(stream(), x.view(), *packed, {}, y.view());
    ExpectClose(y.view(), expected, kK, 8.0);  // of so many sums some grow to 12
  }
}

TEST_P(MatMulTest, StridedInputAndOutputLeaveTheirNeighboursAlone) {
  struct Case {
    int64_t rows, n, k, x_begin, y_begin;
  };
  // The second begins where tensor cores and cuBLASLt take it; its x's pairs, in the third, do not.
  for (const Case& c : {Case{9, 70, 37, 5, 11}, Case{21, 64, 32, 8, 16}, Case{21, 64, 32, 5, 8}}) {
    SCOPED_TRACE(::testing::Message() << c.rows << " rows from column " << c.x_begin);
    const Tensor wide_x = device_.Random(dtype(), {c.rows, 56}, 4),
                 wide_y = device_.Random(dtype(), {c.rows, 104}, 5);
    const Tensor w = device_.Random(dtype(), {c.n, c.k}, 6);
    const std::vector<double> before = ToDoubles(wide_y.view());
    const TensorView x = wide_x.view().Columns(c.x_begin, c.k),
                     y = wide_y.view().Columns(c.y_begin, c.n);
    MatMul(stream(), x, *Pack(w, dtype()), {}, y);
    ExpectClose(y, reference::MatMul(ToDoubles(x), ToDoubles(w.view()), {}, c.k), c.k, 1.0);
    const std::vector<double> after = ToDoubles(wide_y.view());
    for (int64_t i = 0; i < c.rows * 104; ++i) {
      const bool inside = i % 104 >= c.y_begin && i % 104 < c.y_begin + c.n;
      ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
    }
  }
}

TEST_P(MatMulTest, ARowsBitsDoNotDependOnTheBatchOrTheThreads) {
  // On GPUs more than one segment of 512 and one stretch of 32; the emulator is slow.
  const int64_t kN = GetParam().device.host_cuda ? 130 : 333;
  const int64_t kK = GetParam().device.host_cuda ? 544 : GetParam().device.gpu() ? 2592 : 2500;
  // More rows are cuBLASLt's where it is asked for, and it promises no such thing.
  const int64_t kAll = GetParam().device.cublas_lt ? 16 : 210;
  const Tensor x = device_.Random(dtype(), {kAll, kK}, 7), w = device_.Random(dtype(), {kN, kK}, 8);
  const auto packed = Pack(w, dtype());
  const Tensor whole = device_.Zeros(DType::kF32, {kAll, kN});
  MatMul(stream(), x.view(), *packed, {}, whole.view());
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 16, 17, 100}) {
    if (rows > kAll) break;
    for (int64_t first : {int64_t{0}, std::min<int64_t>(101, kAll - rows), kAll - rows}) {
      const Tensor part = device_.Zeros(DType::kF32, {rows, kN});
      MatMul(stream(), x.view().Rows(first, rows), *packed, {}, part.view());
      ExpectSameBits(part.view(), whole.view().Rows(first, rows));
    }
  }
  if (GetParam().device.gpu()) return;  // it has no threads to differ in
  const TestDevice alone(1), three(3);
  for (const TestDevice* other : {&alone, &three}) {
    const auto other_packed = PackLinear(other->stream(), w.view(), dtype());
    const Tensor y = other->Zeros(DType::kF32, {kAll, kN});
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

INSTANTIATE_TEST_SUITE_P(Devices, MatMulTest, ::testing::ValuesIn(MatMulCases()), CaseName);

}  // namespace
}  // namespace trireme
