// Both matmuls with weights of e4m3, on every device: against the naive twin with the same weights
// in double, code by code, and against themselves in other batches.
#include <cmath>

#include "kernels/quantize.h"
#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class MatMulE4M3Test : public KernelTest {
 protected:
  std::unique_ptr<LinearWeight> Pack(const Tensor& weight, LinearUse use = LinearUse::kMatMul) {
    auto packed = PackLinear(stream(), weight.view(), DType::kE4M3, use);
    CHECK(packed.ok()) << packed.status().ToString();
    CHECK(ReserveMatMul(stream(), 256, {packed->get()}).ok());
    return std::move(packed).value();
  }
  // f32 [n, k], magnitudes over 2^14: a row has subnormal codes and zeros among the others.
  Tensor Weights(int64_t n, int64_t k, uint64_t seed) {
    Tensor w = device_.Random(DType::kF32, {n, k}, seed);
    for (int64_t i = 0; i < n * k; ++i)
      w.view().as<float>()[i] *= std::ldexp(1.0f, -static_cast<int>((i + i / 7) % 15));
    return w;
  }
};

// scale * q, the weights that an op with e4m3 computes with.
std::vector<double> Dequantized(ConstTensorView w, const float* row_maxima = nullptr) {
  std::vector<double> out;
  std::vector<E4M3> codes(w.dim(1));
  for (int64_t n = 0; n < w.dim(0); ++n) {
    const float maximum =
        row_maxima != nullptr ? row_maxima[n] : RowMaximum(w.row<float>(n), w.dim(1));
    const float scale = ScaleOfRow(maximum);
    QuantizeRow(w.row<float>(n), w.dim(1), scale, codes.data());
    for (const E4M3 code : codes) out.push_back(double{scale} * ToFloat(code));
  }
  return out;
}

struct Dims {
  int64_t rows, n, k;
};

// Products are at most 1 in magnitude; beside the sum's roundings there are the scale's and the
// bias's.
TEST_P(MatMulE4M3Test, EqualsReference) {
  const Dims all[] = {{1, 1, 1},    {1, 64, 64},   {2, 65, 3},    {5, 17, 16},   {6, 130, 31},
                      {7, 128, 65}, {13, 100, 7},  {200, 70, 24}, {7, 65, 2051}, {1, 130, 4161},
                      {3, 40, 64},  {17, 70, 576}, {16, 33, 1088}};
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 1),
                 w = Weights(dims.n, dims.k, 2), bias = device_.Random(dtype(), {dims.n}, 3);
    const auto packed = Pack(w);
    const std::vector<double> dx = ToDoubles(x.view()), dw = Dequantized(w.view());
    for (DType out_type : {dtype(), DType::kF32}) {
      const Tensor y = device_.Zeros(out_type, {dims.rows, dims.n});
      MatMul(stream(), x.view(), *packed, {}, y.view());
      ExpectClose(y.view(), reference::MatMul(dx, dw, {}, dims.k), dims.k + 1, 1.0);
      MatMul(stream(), x.view(), *packed, bias.view(), y.view());
      ExpectClose(y.view(), reference::MatMul(dx, dw, ToDoubles(bias.view()), dims.k), dims.k + 2,
                  1.0);
    }
  }
}

// x the identity gives every code's value back: 448 in a row makes its scale 1.
TEST_P(MatMulE4M3Test, EveryCodeIsItsValue) {
  constexpr int64_t kN = 3, kK = 256;
  const Tensor w = device_.Zeros(DType::kF32, {kN, kK}), x = device_.Zeros(dtype(), {kK, kK});
  for (int64_t k = 0; k < kK; ++k) {
    Fill(x.view().Rows(k, 1).Columns(k, 1), 1.0);
    for (int64_t n = 0; n < kN; ++n) {
      const float value = ToFloat(E4M3{static_cast<uint8_t>(k * (2 * n + 1) + n)});
      w.view().row<float>(n)[k] = std::isnan(value) ? 448.0f : value;
    }
  }
  const auto packed = Pack(w);
  const Tensor y = device_.Zeros(DType::kF32, {kK, kN});
  for (const int64_t rows : {int64_t{1}, int64_t{16}, kK}) {
    Fill(y.view(), -1.0);
    for (int64_t first = 0; first < kK; first += rows)
      MatMul(stream(), x.view().Rows(first, rows), *packed, {}, y.view().Rows(first, rows));
    for (int64_t k = 0; k < kK; ++k) {
      for (int64_t n = 0; n < kN; ++n)
        ASSERT_EQ(y.view().row<float>(k)[n], w.view().row<float>(n)[k]) << rows << " rows";
    }
  }
}

TEST_P(MatMulE4M3Test, ARowsBitsDoNotDependOnTheBatchOrTheThreads) {
  // More than one segment of 512 on GPUs, more than one stretch of 2048 on CPUs.
  const int64_t kN = GetParam().device.host_cuda ? 130 : 333;
  const int64_t kK = GetParam().device.host_cuda ? 576 : GetParam().device.gpu() ? 2624 : 2501;
  const Tensor x = device_.Random(dtype(), {210, kK}, 7), w = Weights(kN, kK, 8);
  const auto packed = Pack(w);
  const Tensor whole = device_.Zeros(DType::kF32, {210, kN});
  MatMul(stream(), x.view(), *packed, {}, whole.view());
  for (int64_t rows : {1, 2, 3, 5, 6, 7, 16, 17, 100}) {
    for (int64_t first : {int64_t{0}, 210 - rows}) {
      const Tensor part = device_.Zeros(DType::kF32, {rows, kN});
      MatMul(stream(), x.view().Rows(first, rows), *packed, {}, part.view());
      ExpectSameBits(part.view(), whole.view().Rows(first, rows));
    }
  }
  if (GetParam().device.gpu()) return;  // it has no threads to differ in
  const TestDevice three(3);
  const auto other = PackLinear(three.stream(), w.view(), DType::kE4M3);
  ASSERT_TRUE(other.ok()) << other.status();
  const Tensor y = three.Zeros(DType::kF32, {210, kN});
  MatMul(three.stream(), x.view(), **other, {}, y.view());
  ExpectSameBits(y.view(), whole.view());
}

TEST_P(MatMulE4M3Test, FusedSwiGluHasTheUnfusedBits) {
  std::vector<Dims> all = {{1, 1, 1},    {2, 3, 33},   {1, 32, 64},    {16, 33, 128}, {17, 8, 576},
                           {65, 40, 64}, {7, 65, 100}, {1, 100, 1088}, {200, 70, 24}, {4, 5, 2112}};
  // As many blocks as the large tiles want; the emulator is slow.
  if (GetParam().device.gpu() && dtype() != DType::kF32) all.push_back({65, 8443, 64});
  for (const Dims& dims : all) {
    SCOPED_TRACE(::testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 10),
                 w = Weights(2 * dims.n, dims.k, 11),
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

// The pieces of a matrix that is cut within its rows are those of the whole one.
TEST_P(MatMulE4M3Test, PiecesOfRowsTakeTheWholeRowsScale) {
  constexpr int64_t kN = 70, kK = 64;
  const Tensor w = Weights(kN, 2 * kK, 13), x = device_.Zeros(dtype(), {kK, kK});
  for (int64_t i = 0; i < kK; ++i) Fill(x.view().Rows(i, 1).Columns(i, 1), 1.0);
  std::vector<float> maxima;
  for (int64_t n = 0; n < kN; ++n) maxima.push_back(RowMaximum(w.view().row<float>(n), 2 * kK));
  const std::vector<double> whole = Dequantized(w.view());
  for (const LinearUse use : {LinearUse::kMatMul, LinearUse::kMatMulSwiGlu}) {
    const ConstTensorView piece = w.view().Columns(kK, kK);
    const auto source = [&](int64_t first, TensorView rows) {
      for (int64_t r = 0; r < rows.dim(0); ++r) {
        const float* from = piece.row<float>(first + r);
        std::copy(from, from + kK, rows.row<float>(r));
      }
      return absl::OkStatus();
    };
    const auto packed = PackLinearFrom(stream(), kN, kK, DType::kE4M3, source, use, maxima.data());
    ASSERT_TRUE(packed.ok()) << packed.status();
    if (use == LinearUse::kMatMul) {
      const Tensor y = device_.Zeros(DType::kF32, {kK, kN});
      MatMul(stream(), x.view(), **packed, {}, y.view());
      for (int64_t n = 0; n < kN; ++n) {
        for (int64_t k = 0; k < kK; ++k)
          ASSERT_FLOAT_EQ(y.view().row<float>(k)[n],
                          static_cast<float>(whole[(2 * n + 1) * kK + k]));
      }
    } else {
      std::vector<double> dequantized;
      for (int64_t n = 0; n < kN; ++n) {
        const auto from = whole.begin() + (2 * n + 1) * kK;
        dequantized.insert(dequantized.end(), from, from + kK);
      }
      const Tensor y = device_.Zeros(dtype(), {kK, kN / 2});
      MatMulSwiGlu(stream(), x.view(), **packed, {}, y.view());
      const std::vector<double> expected =
          reference::MatMulSwiGlu(ToDoubles(x.view()), dequantized, {}, kK);
      const std::vector<double> actual = ToDoubles(y.view());
      for (size_t i = 0; i < expected.size(); ++i)
        ASSERT_NEAR(actual[i], expected[i], 4 * UnitRoundoff(dtype()) + 1e-6) << i;
    }
  }
}

TEST_P(MatMulE4M3Test, TakesAByteAnElementAndAScaleARow) {
  const Tensor w = Weights(128, 64, 14);
  const auto packed = Pack(w);
  EXPECT_EQ(packed->dtype, DType::kE4M3);
  EXPECT_EQ(packed->bytes, 128 * 64 + 128 * 4);
  EXPECT_EQ(Pack(w, LinearUse::kMatMulSwiGlu)->bytes, packed->bytes);
}

TEST_P(MatMulE4M3Test, StridedInputAndOutputLeaveTheirNeighboursAlone) {
  for (const int64_t k : {37, 64}) {
    const Tensor wide_x = device_.Random(dtype(), {9, 96}, 15),
                 wide_y = device_.Random(dtype(), {9, 100}, 16), w = Weights(70, k, 17);
    const std::vector<double> before = ToDoubles(wide_y.view());
    const TensorView x = wide_x.view().Columns(16, k), y = wide_y.view().Columns(11, 70);
    MatMul(stream(), x, *Pack(w), {}, y);
    ExpectClose(y, reference::MatMul(ToDoubles(x), Dequantized(w.view()), {}, k), k + 1, 1.0);
    const std::vector<double> after = ToDoubles(wide_y.view());
    for (int64_t i = 0; i < 9 * 100; ++i) {
      const bool inside = i % 100 >= 11 && i % 100 < 11 + 70;
      ASSERT_TRUE(inside || after[i] == before[i]) << "neighbour " << i << " was written";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, MatMulE4M3Test, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
