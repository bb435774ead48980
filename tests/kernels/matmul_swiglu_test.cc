// MatMulSwiGlu against its two twins: the naive one in double, and MatMul followed by SiluAndMul,
// whose bits it must have.
#include <cmath>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class MatMulSwiGluTest : public KernelTest {
 protected:
  std::unique_ptr<LinearWeight> Pack(const Tensor& weight, LinearUse use) {
    auto packed = PackLinear(stream(), weight.view(), dtype(), use);
    CHECK(packed.ok()) << packed.status().ToString();
    CHECK(ReserveMatMul(stream(), 256, {packed->get()}).ok());
    return std::move(packed).value();
  }
  void ExpectEqualsUnfused(ConstTensorView x, const Tensor& w, ConstTensorView bias,
                           ConstTensorView fused) {
    const int64_t rows = fused.dim(0), intermediate = fused.dim(1);
    const Tensor gate_up = device_.Zeros(dtype(), {rows, 2 * intermediate}),
                 y = device_.Zeros(dtype(), {rows, intermediate});
    MatMul(stream(), x, *Pack(w, LinearUse::kMatMul), bias, gate_up.view());
    SiluAndMul(stream(), gate_up.view(), y.view());
    ExpectSameBits(fused, y.view());
  }
};

struct Dims {
  int64_t rows, intermediate, k;
};

TEST_P(MatMulSwiGluTest, EqualsItsTwins) {
  // Intermediate sizes around the halves of panels and tiles, K for every kernel, and over more
  // than one segment of 512; rows around the tensor cores' 16 and a tile's 64.
  std::vector<Dims> all = {{1, 1, 1},    {2, 3, 33},  {1, 32, 64},   {5, 31, 32},  {16, 33, 96},
                           {17, 8, 544}, {3, 9, 544}, {65, 40, 64},  {7, 65, 100}, {1, 100, 1056},
                           {18, 77, 96}, {1, 8, 5},   {200, 70, 24}, {4, 5, 2080}};
  // As many blocks as the large tiles want; the emulator is slow.
  constexpr int64_t kLarge = 8443;
  if (GetParam().device.gpu() && dtype() != DType::kF32) all.push_back({65, kLarge, 32});
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message()
                 << dims.rows << " x " << dims.intermediate << " x " << dims.k);
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 1),
                 w = device_.Random(dtype(), {2 * dims.intermediate, dims.k}, 2);
    const Tensor bias = device_.Random(dtype(), {2 * dims.intermediate}, 3);
    const auto packed = Pack(w, LinearUse::kMatMulSwiGlu);
    const Tensor y = device_.Zeros(dtype(), {dims.rows, dims.intermediate});
    for (const ConstTensorView& b : {ConstTensorView(), ConstTensorView(bias.view())}) {
      if (dims.intermediate == kLarge && !b) continue;
      MatMulSwiGlu(stream(), x.view(), *packed, b, y.view());
      ExpectEqualsUnfused(x.view(), w, b, y.view());
    }
  }
}

// Gate and up each bear the error of a sum and one rounding; |silu(g)| <= |g| and |silu'| <= 1.1.
TEST_P(MatMulSwiGluTest, EqualsReference) {
  for (const Dims& dims : {Dims{3, 33, 100}, Dims{17, 40, 96}, Dims{2, 17, 544}}) {
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 4),
                 w = device_.Random(dtype(), {2 * dims.intermediate, dims.k}, 5);
    const Tensor bias = device_.Random(dtype(), {2 * dims.intermediate}, 6);
    const Tensor y = device_.Zeros(dtype(), {dims.rows, dims.intermediate});
    MatMulSwiGlu(stream(), x.view(), *Pack(w, LinearUse::kMatMulSwiGlu), bias.view(), y.view());
    const std::vector<double> dx = ToDoubles(x.view()), dw = ToDoubles(w.view()),
                              db = ToDoubles(bias.view()), actual = ToDoubles(y.view());
    const std::vector<double> gate_up = reference::MatMul(dx, dw, db, dims.k),
                              expected = reference::MatMulSwiGlu(dx, dw, db, dims.k);
    const double unit = UnitRoundoff(dtype()), sum = static_cast<double>(dims.k + 1) * 0x1p-24;
    for (int64_t r = 0; r < dims.rows; ++r) {
      for (int64_t c = 0; c < dims.intermediate; ++c) {
        const int64_t at = r * dims.intermediate + c;
        const double gate = gate_up[r * 2 * dims.intermediate + c];
        const double up = gate_up[(r * 2 + 1) * dims.intermediate + c];
        const double gate_error = unit * std::abs(gate) + sum, up_error = unit * std::abs(up) + sum;
        const double bound = 1.1 * gate_error * (std::abs(up) + up_error) +
                             std::abs(gate) * up_error + unit * std::abs(expected[at]) +
                             8 * 0x1p-24 * std::abs(gate * up);
        ASSERT_NEAR(actual[at], expected[at], 1.1 * bound) << r << ", " << c;
      }
    }
  }
}

TEST_P(MatMulSwiGluTest, StridedInputAndOutputLeaveTheirNeighboursAlone) {
  // Of 36 columns and 19 rows gate and up are cuBLASLt's, where it is asked for.
  for (const Dims& dims : {Dims{9, 35, 37}, Dims{9, 35, 64}, Dims{19, 36, 64}}) {
    const Tensor wide_x = device_.Random(dtype(), {dims.rows, 96}, 7),
                 wide_y = device_.Random(dtype(), {dims.rows, 100}, 8);
    const Tensor w = device_.Random(dtype(), {2 * dims.intermediate, dims.k}, 9);
    const std::vector<double> before = ToDoubles(wide_y.view());
    const TensorView x = wide_x.view().Columns(16, dims.k),
                     y = wide_y.view().Columns(11, dims.intermediate);
    MatMulSwiGlu(stream(), x, *Pack(w, LinearUse::kMatMulSwiGlu), {}, y);
    ExpectEqualsUnfused(x, w, {}, y);
    const std::vector<double> after = ToDoubles(wide_y.view());
    for (int64_t i = 0; i < dims.rows * 100; ++i) {
      const bool inside = i % 100 >= 11 && i % 100 < 11 + dims.intermediate;
      ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
    }
  }
}

TEST_P(MatMulSwiGluTest, ARowsBitsDoNotDependOnTheBatchOrTheThreads) {
  const int64_t intermediate = GetParam().device.host_cuda ? 65 : 333;
  const int64_t k = GetParam().device.host_cuda ? 544 : 2592;
  // More rows are cuBLASLt's where it is asked for, and it promises no such thing.
  const int64_t all = GetParam().device.cublas_lt ? 16 : 130;
  const Tensor x = device_.Random(dtype(), {all, k}, 10),
               w = device_.Random(dtype(), {2 * intermediate, k}, 11);
  const auto packed = Pack(w, LinearUse::kMatMulSwiGlu);
  const Tensor whole = device_.Zeros(dtype(), {all, intermediate});
  MatMulSwiGlu(stream(), x.view(), *packed, {}, whole.view());
  for (int64_t rows : {1, 2, 5, 16, 17, 100}) {
    if (rows > all) break;
    for (int64_t first : {int64_t{0}, all - rows}) {
      const Tensor part = device_.Zeros(dtype(), {rows, intermediate});
      MatMulSwiGlu(stream(), x.view().Rows(first, rows), *packed, {}, part.view());
      ExpectSameBits(part.view(), whole.view().Rows(first, rows));
    }
  }
  if (GetParam().device.gpu()) return;  // it has no threads to differ in
  const TestDevice three(3);
  const auto other = PackLinear(three.stream(), w.view(), dtype(), LinearUse::kMatMulSwiGlu);
  ASSERT_TRUE(other.ok()) << other.status();
  const Tensor y = three.Zeros(dtype(), {all, intermediate});
  MatMulSwiGlu(three.stream(), x.view(), **other, {}, y.view());
  ExpectSameBits(y.view(), whole.view());
}

TEST_P(MatMulSwiGluTest, TakesTheMemoryOfTheTwoMatrices) {
  for (const int64_t intermediate : {64, 96, 37}) {
    const Tensor w = device_.Random(dtype(), {2 * intermediate, 64}, 12);
    const auto plain = Pack(w, LinearUse::kMatMul), gated = Pack(w, LinearUse::kMatMulSwiGlu);
    EXPECT_EQ(gated->bytes, plain->bytes);
    if (intermediate % 32 == 0) {
      EXPECT_EQ(gated->bytes, w.bytes());
    }
  }
}

TEST_P(MatMulSwiGluTest, NoRowsIsNoWork) {
  const Tensor w = device_.Random(dtype(), {10, 8}, 13), x = device_.Zeros(dtype(), {0, 8});
  const Tensor y = device_.Zeros(dtype(), {0, 5});
  MatMulSwiGlu(stream(), x.view(), *Pack(w, LinearUse::kMatMulSwiGlu), {}, y.view());
  EXPECT_TRUE(stream().Synchronize().ok());
}

INSTANTIATE_TEST_SUITE_P(Devices, MatMulSwiGluTest, ::testing::ValuesIn(MatMulCases()), CaseName);

}  // namespace
}  // namespace trireme
