// Both matmuls with activations and weights of e4m3, on every device: against the naive twin with
// the same roundings in double, on CPUs against the matmul of rounded activations, and against
// themselves in other batches and pieces.
#include <cmath>
#include <limits>

#include "kernels/quantize.h"
#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class MatMulCodesTest : public KernelTest {
 protected:
  // From weights that e4m3 has exactly, so that all rounding is of activations.
  std::unique_ptr<LinearWeight> Pack(const Tensor& weight, LinearUse use = LinearUse::kMatMul,
                                     int64_t rows = 256) {
    auto packed = PackLinear(stream(), weight.view(), DType::kE4M3, use).value();
    packed->quantizes_activations = true;
    CHECK(ReserveMatMul(stream(), rows, {packed.get()}).ok());
    return packed;
  }
  // f32 [n, k] of codes / 448; 1 is in every row, which makes its scale 1 / 448.
  Tensor Weights(int64_t n, int64_t k, uint64_t seed) {
    Tensor w = device_.Zeros(DType::kF32, {n, k});
    for (int64_t i = 0; i < n * k; ++i) {
      const double value = RandomValue(seed, static_cast<uint64_t>(i)) * 448.0;
      const double code = ToFloat(FromFloat<E4M3>(static_cast<float>(value)));
      w.view().as<float>()[i] = i % k == i / k % k ? 1.0f : static_cast<float>(code / 448.0);
    }
    return w;
  }
  // Magnitudes over 2^14: rows have subnormal codes and zeros among the others.
  Tensor Inputs(int64_t rows, int64_t k, uint64_t seed) {
    std::vector<double> values(rows * k);
    Tensor x = device_.Zeros(dtype(), {rows, k});
    for (int64_t i = 0; i < rows * k; ++i)
      Fill(x.view().Rows(i / k, 1).Columns(i % k, 1),
           std::ldexp(RandomValue(seed, static_cast<uint64_t>(i)), -static_cast<int>(i % 15)));
    return x;
  }
};

struct Dims {
  int64_t rows, n, k;
};

TEST_P(MatMulCodesTest, EqualsReference) {
  const Dims all[] = {{1, 1, 1},     {1, 64, 64},    {2, 65, 3},    {5, 17, 16},
                      {13, 100, 7},  {7, 65, 2051},  {1, 40, 4160}, {3, 40, 64},
                      {17, 70, 576}, {16, 33, 1088}, {130, 70, 128}};
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = Inputs(dims.rows, dims.k, 1), w = Weights(dims.n, dims.k, 2),
                 bias = device_.Random(dtype(), {dims.n}, 3);
    const auto packed = Pack(w);
    const std::vector<double> dx = reference::RoundActivations(ToDoubles(x.view()), dims.k),
                              dw = ToDoubles(w.view());
    for (DType out_type : {dtype(), DType::kF32}) {
      const Tensor y = device_.Zeros(out_type, {dims.rows, dims.n});
      MatMul(stream(), x.view(), *packed, {}, y.view());
      ExpectClose(y.view(), reference::MatMul(dx, dw, {}, dims.k), dims.k + 2, 1.0);
      MatMul(stream(), x.view(), *packed, bias.view(), y.view());
      ExpectClose(y.view(), reference::MatMul(dx, dw, ToDoubles(bias.view()), dims.k), dims.k + 3,
                  1.0);
    }
  }
}

// Products of small integers have no rounding, so each of the result's bits shows where the tensor
// cores take which code from.
TEST_P(MatMulCodesTest, SmallIntegersAreExact) {
  constexpr int64_t kN = 40, kK = 192;
  const Tensor w = device_.Zeros(DType::kF32, {kN, kK}), x = device_.Zeros(dtype(), {70, kK});
  for (int64_t i = 0; i < kN * kK; ++i)
    w.view().as<float>()[i] = static_cast<float>(i % kK == 0 ? 448 : (i * 7 + i / kK) % 31 / 2 - 7);
  for (int64_t i = 0; i < 70 * kK; ++i)
    Fill(x.view().Rows(i / kK, 1).Columns(i % kK, 1),
         static_cast<double>(i % kK == 0 ? 448 : (i * 5 + i / kK) % 29 / 2 - 7));
  const auto packed = Pack(w);
  const std::vector<double> expected =
      reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()), {}, kK);
  for (const int64_t rows : {1, 16, 70}) {
    const Tensor y = device_.Zeros(DType::kF32, {70, kN});
    for (int64_t first = 0; first < 70; first += rows) {
      const int64_t count = std::min<int64_t>(rows, 70 - first);
      MatMul(stream(), x.view().Rows(first, count), *packed, {}, y.view().Rows(first, count));
    }
    EXPECT_EQ(ToDoubles(y.view()), expected) << rows;
  }
}

TEST_P(MatMulCodesTest, OnCpusHasTheBitsOfRoundedActivations) {
  if (GetParam().device.gpu()) return;  // their sums are over codes, in another order
  for (const Dims& dims : {Dims{1, 130, 4161}, Dims{7, 65, 100}, Dims{200, 70, 24}}) {
    const Tensor x = Inputs(dims.rows, dims.k, 4), w = Weights(2 * dims.n, dims.k, 5),
                 rounded = device_.Zeros(dtype(), {dims.rows, dims.k});
    const std::vector<double> values = reference::RoundActivations(ToDoubles(x.view()), dims.k);
    for (int64_t i = 0; i < dims.rows * dims.k; ++i)
      Fill(rounded.view().Rows(i / dims.k, 1).Columns(i % dims.k, 1), values[i]);
    for (const LinearUse use : {LinearUse::kMatMul, LinearUse::kMatMulSwiGlu}) {
      const bool gated = use == LinearUse::kMatMulSwiGlu;
      const auto packed = Pack(w, use);
      const Tensor y = device_.Zeros(dtype(), {dims.rows, gated ? dims.n : 2 * dims.n}),
                   expected = device_.Zeros(dtype(), y.view().shape);
      const auto run = gated ? MatMulSwiGlu : MatMul;
      run(stream(), x.view(), *packed, {}, y.view());
      packed->quantizes_activations = false;
      run(stream(), rounded.view(), *packed, {}, expected.view());
      ExpectSameBits(y.view(), expected.view());
    }
  }
}

TEST_P(MatMulCodesTest, ARowsBitsDoNotDependOnTheBatchOrThePieces) {
  // More than one segment of 512 on GPUs.
  const int64_t kN = 130, kK = GetParam().device.host_cuda ? 576 : 2624;
  const Tensor x = Inputs(150, kK, 7), w = Weights(kN, kK, 8);
  const auto packed = Pack(w);
  const Tensor whole = device_.Zeros(DType::kF32, {150, kN});
  MatMul(stream(), x.view(), *packed, {}, whole.view());
  for (int64_t rows : {1, 3, 7, 16, 17, 100}) {
    for (int64_t first : {int64_t{0}, 150 - rows}) {
      const Tensor part = device_.Zeros(DType::kF32, {rows, kN});
      MatMul(stream(), x.view().Rows(first, rows), *packed, {}, part.view());
      ExpectSameBits(part.view(), whole.view().Rows(first, rows));
    }
  }
  // Room for fewer rows than there are.
  const TestDevice little(GetParam().device);
  auto other = PackLinear(little.stream(), w.view(), DType::kE4M3).value();
  other->quantizes_activations = true;
  ASSERT_TRUE(ReserveMatMul(little.stream(), 40, {other.get()}).ok());
  const Tensor y = little.Zeros(DType::kF32, {150, kN});
  MatMul(little.stream(), x.view(), *other, {}, y.view());
  ExpectSameBits(y.view(), whole.view());
}

TEST_P(MatMulCodesTest, FusedSwiGluHasTheUnfusedBits) {
  std::vector<Dims> all = {{1, 1, 1},    {2, 3, 33},   {1, 32, 64},  {16, 33, 128},
                           {17, 8, 576}, {65, 40, 64}, {7, 65, 100}, {1, 100, 1088}};
  // As many blocks as the large tiles want; the emulator is slow.
  if (GetParam().device.gpu() && dtype() != DType::kF32) all.push_back({65, 8443, 64});
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = Inputs(dims.rows, dims.k, 10), w = Weights(2 * dims.n, dims.k, 11),
                 bias = device_.Random(dtype(), {2 * dims.n}, 12);
    const Tensor fused = device_.Zeros(dtype(), {dims.rows, dims.n}),
                 unfused = device_.Zeros(dtype(), {dims.rows, dims.n}),
                 gate_up = device_.Zeros(dtype(), {dims.rows, 2 * dims.n});
    MatMulSwiGlu(stream(), x.view(), *Pack(w, LinearUse::kMatMulSwiGlu), bias.view(), fused.view());
    MatMul(stream(), x.view(), *Pack(w), bias.view(), gate_up.view());
    SiluAndMul(stream(), gate_up.view(), unfused.view());
    ExpectSameBits(fused.view(), unfused.view());
  }
}

// A row's scale follows its maximum, whatever the rows beside it hold, and what is not finite makes
// all of its row NaN and nothing else.
TEST_P(MatMulCodesTest, EveryRowHasAScaleOfItsOwn) {
  for (const int64_t k : {64, 70}) {
    const Tensor w = Weights(33, k, 20), x = Inputs(19, k, 21), plain = Inputs(19, k, 21);
    const std::vector<double> before = ToDoubles(x.view());
    const double large = dtype() == DType::kF16 ? 65504.0 : 1e30;
    const auto scale_row = [&](int64_t row, double factor) {
      for (int64_t i = 0; i < k; ++i)
        Fill(x.view().Rows(row, 1).Columns(i, 1), before[row * k + i] * factor);
    };
    scale_row(1, 0.0);
    scale_row(2, dtype() == DType::kF16 ? 0x1p-8 : 0x1p-90);
    Fill(x.view().Rows(3, 1).Columns(5, 1), large);
    Fill(x.view().Rows(4, 1).Columns(5, 1), std::numeric_limits<double>::infinity());
    Fill(x.view().Rows(18, 1).Columns(k - 1, 1), std::nan(""));
    const auto packed = Pack(w);
    for (const int64_t rows : {1, 19}) {
      const Tensor y = device_.Zeros(DType::kF32, {19, 33});
      for (int64_t first = 0; first < 19; first += rows)
        MatMul(stream(), x.view().Rows(first, rows), *packed, {}, y.view().Rows(first, rows));
      for (const int64_t row : {4, 18}) {
        for (const double value : ToDoubles(y.view().Rows(row, 1)))
          ASSERT_TRUE(std::isnan(value)) << row;
      }
      for (const int64_t row : {0, 1, 2, 3, 5, 17}) {
        const std::vector<double> exact = ToDoubles(x.view().Rows(row, 1));
        double maximum = 0.0;
        for (const double value : exact) maximum = std::max(maximum, std::abs(value));
        ExpectClose(
            y.view().Rows(row, 1),
            reference::MatMul(reference::RoundActivations(exact, k), ToDoubles(w.view()), {}, k),
            k + 2, maximum);
      }
    }
  }
}

TEST_P(MatMulCodesTest, StridedInputAndOutputLeaveTheirNeighboursAlone) {
  for (const int64_t begin : {16, 3}) {
    const Tensor wide_x = Inputs(18, 96, 15), wide_y = device_.Random(dtype(), {18, 100}, 16),
                 w = Weights(70, 64, 17);
    const std::vector<double> before = ToDoubles(wide_y.view());
    const TensorView x = wide_x.view().Columns(begin, 64), y = wide_y.view().Columns(11, 70);
    MatMul(stream(), x, *Pack(w), {}, y);
    ExpectClose(y,
                reference::MatMul(reference::RoundActivations(ToDoubles(x), 64),
                                  ToDoubles(w.view()), {}, 64),
                66, 1.0);
    const std::vector<double> after = ToDoubles(wide_y.view());
    for (int64_t i = 0; i < 18 * 100; ++i) {
      const bool inside = i % 100 >= 11 && i % 100 < 11 + 70;
      ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
    }
  }
}

// On the step path nothing is allocated, and a captured call does what an eager one does.
TEST_P(MatMulCodesTest, ReplaysWhatItDoesEagerly) {
  if (!GetParam().device.gpu()) return;  // a CPU's stream runs inline
  const Tensor w = Weights(2 * 24, 128, 1), x = Inputs(20, 128, 2),
               y = device_.Zeros(dtype(), {20, 24});
  auto packed = PackLinear(stream(), w.view(), DType::kE4M3, LinearUse::kMatMulSwiGlu).value();
  packed->quantizes_activations = true;
  const int64_t before = device_.device().allocated_bytes();
  const int64_t held = ReserveMatMul(stream(), 20, {packed.get()}).value();
  EXPECT_GE(held, 20 * (128 + 4));
  const int64_t allocated = device_.device().allocated_bytes();
  if (GetParam().device.host_cuda) {
    EXPECT_EQ(allocated - before, held);
  }
  EXPECT_EQ(ReserveMatMul(stream(), 12, {packed.get()}).value(), held) << "there is room for that";
  const auto work = [&] { MatMulSwiGlu(stream(), x.view(), *packed, {}, y.view()); };
  const auto graph = stream().Capture(work);
  ASSERT_TRUE(graph.ok()) << graph.status();
  FillRandom(x.view(), 4);
  work();
  const std::vector<double> eager = ToDoubles(y.view());
  Fill(y.view(), 0.0);
  (*graph)->Replay(stream());
  ASSERT_TRUE(stream().Synchronize().ok());
  EXPECT_EQ(ToDoubles(y.view()), eager);
  EXPECT_EQ(device_.device().allocated_bytes(), allocated);
}

INSTANTIATE_TEST_SUITE_P(Devices, MatMulCodesTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
