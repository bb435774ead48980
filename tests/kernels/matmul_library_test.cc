// Matmuls by cuBLASLt: what is not the op tests' (matmul_test.cc and matmul_swiglu_test.cc run them
// with it too). Plans, errors, memory and captures, in the emulator with cuBLASLt's double.

#include "kernels/cuda/matmul_library.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/cublas_lt_plans.h"
#include "kernels/cuda/cuda_ops.h"
#include "tests/host_cuda/cublas_lt_double.h"
#include "tests/host_cuda/device.h"
#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

using cuda::CublasLt;
using cuda::CublasLtPlans;
using cuda::CublasLtShape;

CublasLtDouble& Double() { return TheCublasLtDouble(); }
DeviceCase DoubleCase() { return {.name = "host_cuda", .host_cuda = true, .cublas_lt = true}; }
DeviceCase OwnCase() { return {.name = "host_cuda", .host_cuda = true}; }

// Every test leaves the double as it found it.
class MatMulLibraryTest : public ::testing::Test {
 protected:
  MatMulLibraryTest() { before_ = Double(); }
  ~MatMulLibraryTest() override {
    HostCudaTestHooks() = {};
    const int searches = Double().searches, matmuls = Double().matmuls, alive = Double().alive;
    Double() = before_;
    Double().searches = searches, Double().matmuls = matmuls, Double().alive = alive;
  }

  static std::unique_ptr<LinearWeight> Pack(const TestDevice& device, const Tensor& w,
                                            LinearUse use = LinearUse::kMatMul) {
    return PackLinear(device.stream(), w.view(), w.view().dtype, use).value();
  }
  static CublasLtPlans& PlansOf(const TestDevice& device) {
    return cuda::LibraryOf(device.stream())->plans();
  }

 private:
  CublasLtDouble before_;
};

TEST_F(MatMulLibraryTest, AShapesPlanIsMadeOnce) {
  const TestDevice device(DoubleCase());
  const Tensor one = device.Random(DType::kBF16, {64, 96}, 1),
               two = device.Random(DType::kBF16, {64, 96}, 2);
  const auto first = Pack(device, one), second = Pack(device, two);
  ASSERT_TRUE(ReserveMatMul(device.stream(), 64, {first.get(), second.get()}).ok());
  const Tensor bias = device.Random(DType::kBF16, {64}, 3);
  const int searches = Double().searches, matmuls = Double().matmuls;
  for (int round = 0; round < 3; ++round) {
    for (const int64_t rows : {20, 40}) {
      for (const auto* w : {&first, &second}) {
        const Tensor x = device.Random(DType::kBF16, {rows, 96}, 4),
                     y = device.Zeros(DType::kBF16, {rows, 64}),
                     logits = device.Zeros(DType::kF32, {rows, 64});
        MatMul(device.stream(), x.view(), **w, {}, y.view());
        MatMul(device.stream(), x.view(), **w, bias.view(), y.view());
        MatMul(device.stream(), x.view(), **w, {}, logits.view());
      }
    }
  }
  // Rows, a bias and the result's type each make another plan; weights do not.
  EXPECT_EQ(Double().searches - searches, 2 * 3);
  EXPECT_EQ(Double().matmuls - matmuls, 3 * 2 * 2 * 3);
  EXPECT_EQ(PlansOf(device).stats().misses, 6);
  EXPECT_EQ(PlansOf(device).stats().hits, 30);
  EXPECT_EQ(PlansOf(device).stats().evicted, 0);
  EXPECT_TRUE(device.stream().Synchronize().ok());
}

TEST_F(MatMulLibraryTest, TheLeastRecentlyUsedPlanGoesWhereThereAreTooMany) {
  const int alive = Double().alive;
  {
    const auto library = CublasLt::Open(TRIREME_CUBLAS_LT_DOUBLE).value();
    CublasLtPlans plans(*library, /*capacity=*/2);
    const TestDevice device(OwnCase());
    const Tensor x = device.Random(DType::kF16, {3, 32}, 1),
                 w = device.Random(DType::kF16, {8, 32}, 2), y = device.Zeros(DType::kF16, {3, 8});
    const Tensor workspace = device.Zeros(DType::kU8, {CublasLtPlans::kWorkspaceBytes});
    const auto run = [&](int64_t rows) {
      const CublasLtShape shape{.in = DType::kF16,
                                .out = DType::kF16,
                                .rows = rows,
                                .n = 8,
                                .k = 32,
                                .x_stride = 32,
                                .y_stride = 8,
                                .y_alignment = 256};
      const auto done =
          plans.MatMul(nullptr, shape, {.x = x.view().data, .w = w.view().data, .y = y.view().data},
                       workspace.view().data);
      ASSERT_TRUE(done.ok() && *done) << done.status();
    };
    for (const int64_t rows : {1, 2, 1, 3}) run(rows);  // 3 takes the place of 2
    EXPECT_EQ(plans.stats().evicted, 1);
    EXPECT_EQ(plans.size(), 2);
    run(1);
    EXPECT_EQ(plans.stats().misses, 3);
    run(2);
    EXPECT_EQ(plans.stats().misses, 4);
    EXPECT_EQ(plans.stats().hits, 2);
    EXPECT_EQ(plans.stats().evicted, 2);
    run(3);
    ExpectClose(y.view(), reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()), {}, 32), 32,
                1.0);
  }
  EXPECT_EQ(Double().alive, alive) << "all descriptors are given back";
}

TEST_F(MatMulLibraryTest, AlignmentIsThatOfTheAddress) {
  EXPECT_EQ(cuda::AlignmentOf(reinterpret_cast<void*>(0x1000)), 256);
  EXPECT_EQ(cuda::AlignmentOf(reinterpret_cast<void*>(0x1010)), 16);
  EXPECT_EQ(cuda::AlignmentOf(reinterpret_cast<void*>(0x1080)), 128);
  EXPECT_EQ(cuda::AlignmentOf(reinterpret_cast<void*>(0x1001)), 1);
}

TEST_F(MatMulLibraryTest, ColumnsArePermutedAsTheWeightsAre) {
  const TestDevice device(OwnCase());
  for (const int64_t begin : {0, 3}) {
    for (const int64_t k : {32, 96, 1056}) {
      const Tensor wide = device.Random(DType::kF16, {5, k + 7 + begin % 2}, 1),
                   out = device.Zeros(DType::kF16, {5, k});
      const ConstTensorView x = wide.view().Columns(begin, k);
      cuda::PermuteColumns(nullptr, x, out.view().data);
      const auto packed = PackLinear(device.stream(), x, DType::kF16).value();
      const auto& stored = static_cast<const cuda::CudaLinear&>(*packed);
      ASSERT_TRUE(stored.permuted);
      ExpectSameBits(out.view(), ConstTensorView(stored.buffer.data(), DType::kF16, {5, k}));
    }
  }
}

TEST_F(MatMulLibraryTest, RowsBeyondTheRoomGoThroughInPieces) {
  const TestDevice device(DoubleCase());
  const Tensor w = device.Random(DType::kBF16, {2 * 24, 64}, 1),
               bias = device.Random(DType::kBF16, {2 * 24}, 2);
  const Tensor x = device.Random(DType::kBF16, {50, 64}, 3),
               y = device.Zeros(DType::kBF16, {50, 24}),
               whole = device.Zeros(DType::kBF16, {50, 48}),
               expected = device.Zeros(DType::kBF16, {50, 24});
  const auto gated = Pack(device, w, LinearUse::kMatMulSwiGlu), plain = Pack(device, w);
  ASSERT_TRUE(ReserveMatMul(device.stream(), 20, {gated.get()}).ok());
  int matmuls = Double().matmuls;
  MatMulSwiGlu(device.stream(), x.view(), *gated, bias.view(), y.view());
  EXPECT_EQ(Double().matmuls - matmuls, 3) << "17, 17 and 16 rows";
  // The unfused twin, with more rows at once: another order of the sums.
  matmuls = Double().matmuls;
  MatMul(device.stream(), x.view(), *plain, bias.view(), whole.view());
  EXPECT_EQ(Double().matmuls - matmuls, 2) << "25 and 25 rows: without gate and up there is room";
  SiluAndMul(device.stream(), whole.view(), expected.view());
  ExpectClose(
      whole.view(),
      reference::MatMul(ToDoubles(x.view()), ToDoubles(w.view()), ToDoubles(bias.view()), 64), 65,
      1.0);
  const std::vector<double> a = ToDoubles(y.view()), b = ToDoubles(expected.view());
  for (size_t i = 0; i < a.size(); ++i)
    ASSERT_NEAR(a[i], b[i], 0x1p-5 * (1.0 + std::abs(b[i]))) << i;
}

TEST_F(MatMulLibraryTest, WhatItDoesNotTakeIsTheOwnKernels) {
  struct Case {
    const char* why;
    int64_t rows, n;
    bool f32_with_bias;
  };
  const TestDevice device(DoubleCase()), own(OwnCase());
  for (const Case& c : {Case{"few rows", 16, 64, false}, Case{"rows of 140 bytes", 20, 70, false},
                        Case{"a bias of another type than the result", 20, 64, true}}) {
    SCOPED_TRACE(c.why);
    const Tensor w = device.Random(DType::kBF16, {c.n, 64}, 1),
                 bias = device.Random(DType::kBF16, {c.n}, 2),
                 x = device.Random(DType::kBF16, {c.rows, 64}, 3);
    const DType out = c.f32_with_bias ? DType::kF32 : DType::kBF16;
    const Tensor y = device.Zeros(out, {c.rows, c.n}), expected = own.Zeros(out, {c.rows, c.n});
    const auto packed = Pack(device, w), own_packed = Pack(own, w);
    ASSERT_TRUE(ReserveMatMul(device.stream(), 64, {packed.get()}).ok());
    const int matmuls = Double().matmuls;
    MatMul(device.stream(), x.view(), *packed, bias.view(), y.view());
    EXPECT_EQ(Double().matmuls, matmuls);
    MatMul(own.stream(), x.view(), *own_packed, bias.view(), expected.view());
    ExpectSameBits(y.view(), expected.view());
  }
}

// Codes of x and of W, a scale for each row of both; what cuBLASLt has no algorithm for is computed
// by the own kernels from the same codes.
TEST_F(MatMulLibraryTest, CodesAreMultipliedWithTheScalesOfTheirRows) {
  const TestDevice device(DoubleCase()), own(OwnCase());
  for (const int64_t n : {64, 72}) {
    for (const LinearUse use : {LinearUse::kMatMul, LinearUse::kMatMulSwiGlu}) {
      const bool gated = use == LinearUse::kMatMulSwiGlu;
      const Tensor w = device.Random(DType::kF32, {n, 192}, 1),
                   x = device.Random(DType::kBF16, {50, 192}, 2),
                   bias = device.Random(DType::kBF16, {n}, 3),
                   y = device.Zeros(DType::kBF16, {50, gated ? n / 2 : n}),
                   expected = own.Zeros(DType::kBF16, y.view().shape);
      const auto run = gated ? MatMulSwiGlu : MatMul;
      const auto multiply = [&](const TestDevice& on, const Tensor& out) {
        auto packed = PackLinear(on.stream(), w.view(), DType::kE4M3, use).value();
        packed->quantizes_activations = true;
        // Rows go through in pieces of 30 and 20.
        ASSERT_TRUE(ReserveMatMul(on.stream(), 30, {packed.get()}).ok());
        run(on.stream(), x.view(), *packed, bias.view(), out.view());
        ASSERT_TRUE(on.stream().Synchronize().ok());
      };
      const int matmuls = Double().matmuls;
      multiply(device, y);
      EXPECT_EQ(Double().matmuls > matmuls, n % 16 == 0) << n;
      multiply(own, expected);
      if (n % 16 != 0) {
        ExpectSameBits(y.view(), expected.view());
        continue;
      }
      const std::vector<double> a = ToDoubles(y.view()), b = ToDoubles(expected.view());
      for (size_t i = 0; i < a.size(); ++i)
        ASSERT_NEAR(a[i], b[i], 0x1p-6 * (1.0 + std::abs(b[i]))) << i;
    }
  }
}

TEST_F(MatMulLibraryTest, WeightsOfE4M3AloneAreTheOwnKernels) {
  const TestDevice device(DoubleCase());
  const Tensor w = device.Random(DType::kF32, {64, 64}, 1),
               x = device.Random(DType::kBF16, {20, 64}, 2),
               y = device.Zeros(DType::kBF16, {20, 64});
  const auto packed = PackLinear(device.stream(), w.view(), DType::kE4M3).value();
  EXPECT_EQ(ReserveMatMul(device.stream(), 64, {packed.get()}).value(), 0);
  const int matmuls = Double().matmuls;
  MatMul(device.stream(), x.view(), *packed, {}, y.view());
  EXPECT_EQ(Double().matmuls, matmuls);
}

TEST_F(MatMulLibraryTest, WithoutRoomOrAnAlgorithmTheOwnKernelsCompute) {
  const TestDevice device(DoubleCase()), own(OwnCase());
  const Tensor w = device.Random(DType::kBF16, {64, 96}, 1),
               x = device.Random(DType::kBF16, {20, 96}, 2);
  const Tensor y = device.Zeros(DType::kBF16, {20, 64}),
               expected = own.Zeros(DType::kBF16, {20, 64});
  const auto packed = Pack(device, w), own_packed = Pack(own, w);
  MatMul(own.stream(), x.view(), *own_packed, {}, expected.view());
  const int matmuls = Double().matmuls;
  MatMul(device.stream(), x.view(), *packed, {}, y.view());
  ExpectSameBits(y.view(), expected.view());
  ASSERT_TRUE(ReserveMatMul(device.stream(), 64, {packed.get()}).ok());
  Double().no_algorithm = true;
  for (int round = 0; round < 2; ++round) {
    Fill(y.view(), 0.0);
    MatMul(device.stream(), x.view(), *packed, {}, y.view());
    ExpectSameBits(y.view(), expected.view());
  }
  EXPECT_EQ(PlansOf(device).stats().refused, 2);
  EXPECT_EQ(PlansOf(device).stats().misses, 1) << "that there is none is remembered";
  EXPECT_EQ(Double().matmuls, matmuls);
  EXPECT_TRUE(device.stream().Synchronize().ok());
}

TEST_F(MatMulLibraryTest, AnErrorOfTheLibraryIsTheStreams) {
  for (const char* function :
       {"cublasLtMatmulDescCreate", "cublasLtMatmulDescSetAttribute", "cublasLtMatrixLayoutCreate",
        "cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul"}) {
    SCOPED_TRACE(function);
    const int alive = Double().alive;
    {
      const TestDevice device(DoubleCase());
      const Tensor w = device.Random(DType::kBF16, {64, 96}, 1),
                   x = device.Random(DType::kBF16, {20, 96}, 2);
      const Tensor y = device.Zeros(DType::kBF16, {20, 64});
      const auto packed = Pack(device, w);
      ASSERT_TRUE(ReserveMatMul(device.stream(), 64, {packed.get()}).ok());
      Double().failing = function, Double().status = 13;  // CUBLAS_STATUS_EXECUTION_FAILED
      MatMul(device.stream(), x.view(), *packed, {}, y.view());
      Double().failing = nullptr;
      MatMul(device.stream(), x.view(), *packed, {}, y.view());
      // The first one, however often it is asked for.
      for (int i = 0; i < 2; ++i) {
        const std::string message(device.stream().Synchronize().message());
        for (const std::string& part :
             {std::string(function), std::string("CUBLAS_STATUS_EXECUTION_FAILED"),
              std::string("20 x 64 x 96 bf16"), std::string("--matmul cublaslt")})
          EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
      }
    }
    EXPECT_EQ(Double().alive, alive) << "what was made is given back";
  }
}

TEST_F(MatMulLibraryTest, AnErrorInACaptureIsTheCapturesAlone) {
  const TestDevice device(DoubleCase());
  const Tensor w = device.Random(DType::kBF16, {64, 96}, 1),
               x = device.Random(DType::kBF16, {20, 96}, 2);
  const Tensor y = device.Zeros(DType::kBF16, {20, 64});
  const auto packed = Pack(device, w);
  ASSERT_TRUE(ReserveMatMul(device.stream(), 64, {packed.get()}).ok());
  const auto work = [&] { MatMul(device.stream(), x.view(), *packed, {}, y.view()); };
  work();
  Double().failing = "cublasLtMatmul", Double().status = 13;
  EXPECT_FALSE(device.stream().Capture(work).ok());
  Double().failing = nullptr;
  EXPECT_TRUE(device.stream().Synchronize().ok());
  EXPECT_TRUE(device.stream().Capture(work).ok());
}

// A captured step holds the workspace's addresses and the plan's values: plans that come and go
// afterwards, and a later reservation, do not touch it. Nothing is allocated in a step.
TEST_F(MatMulLibraryTest, ReplaysWhatItDoesEagerly) {
  const TestDevice device(DoubleCase());
  const Tensor w = device.Random(DType::kBF16, {2 * 24, 96}, 1),
               bias = device.Random(DType::kBF16, {48}, 2);
  const Tensor x = device.Random(DType::kBF16, {20, 96}, 3),
               y = device.Zeros(DType::kBF16, {20, 24});
  const auto packed = Pack(device, w, LinearUse::kMatMulSwiGlu);
  ASSERT_TRUE(ReserveMatMul(device.stream(), 20, {packed.get()}).ok());
  const int64_t allocated = device.device().allocated_bytes();
  const auto work = [&] {
    MatMulSwiGlu(device.stream(), x.view(), *packed, bias.view(), y.view());
  };
  work();
  const auto graph = device.stream().Capture(work);
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(device.device().allocated_bytes(), allocated);
  ASSERT_TRUE(ReserveMatMul(device.stream(), 64, {packed.get()}).ok());
  const int searches = Double().searches;
  FillRandom(x.view(), 4);
  work();
  const std::vector<double> eager = ToDoubles(y.view());
  Fill(y.view(), 0.0);
  (*graph)->Replay(device.stream());
  EXPECT_EQ(ToDoubles(y.view()), eager);
  EXPECT_EQ(Double().searches, searches);
  EXPECT_TRUE(device.stream().Synchronize().ok());
}

TEST_F(MatMulLibraryTest, RoomIsMadeOnceAndCounted) {
  const TestDevice device(DoubleCase()), own(OwnCase());
  const Tensor w = device.Random(DType::kBF16, {64, 96}, 1),
               odd = device.Random(DType::kBF16, {64, 95}, 2),
               f32 = device.Random(DType::kF32, {64, 96}, 3);
  const auto packed = Pack(device, w), packed_odd = Pack(device, odd),
             packed_f32 = Pack(device, f32);
  const auto reserve = [&](const TestDevice& on, int64_t rows, const LinearWeight& weight) {
    return ReserveMatMul(on.stream(), rows, {&weight}).value();
  };
  EXPECT_EQ(reserve(own, 64, *Pack(own, w)), 0);
  EXPECT_EQ(reserve(device, 64, *packed_odd), 0) << "those cuBLASLt does not take need none";
  EXPECT_EQ(reserve(device, 64, *packed_f32), 0);
  EXPECT_EQ(reserve(device, 16, *packed), 0) << "few rows are never its";
  const int64_t before = device.device().allocated_bytes();
  const int64_t held = reserve(device, 64, *packed);
  EXPECT_GE(held, CublasLtPlans::kWorkspaceBytes + 64 * 96 * 2);
  EXPECT_EQ(device.device().allocated_bytes() - before, held);
  EXPECT_EQ(reserve(device, 40, *packed), held) << "there is room for that";
  EXPECT_GT(reserve(device, 65, *packed), held);
  // A prompt of any length needs no more than that of kLibraryRows.
  const int64_t most = reserve(device, cuda::kLibraryRows, *packed);
  EXPECT_EQ(reserve(device, 16 * cuda::kLibraryRows, *packed), most);

  const TestDevice full(DoubleCase());
  const auto on_full = Pack(full, w);
  HostCudaTestHooks().allocating = [](size_t) { return absl::ResourceExhaustedError("no memory"); };
  const absl::Status none = ReserveMatMul(full.stream(), 64, {on_full.get()}).status();
  EXPECT_TRUE(absl::IsResourceExhausted(none));
  EXPECT_NE(std::string(none.message()).find("--max-num-batched-tokens"), std::string::npos);
}

TEST_F(MatMulLibraryTest, ALibraryThatIsMissingOrTooOldIsNamed) {
  const auto missing = NewHostCudaDeviceWithCublasLt("libcublasLt.so.nowhere");
  EXPECT_TRUE(absl::IsUnavailable(missing.status()));
  const auto old = NewHostCudaDeviceWithCublasLt("libm.so.6");
  EXPECT_TRUE(absl::IsUnavailable(old.status()));
  for (const auto* device : {&missing, &old}) {
    const std::string message(device->status().message());
    EXPECT_NE(message.find("LD_LIBRARY_PATH"), std::string::npos) << message;
    EXPECT_NE(message.find(CublasLt::DefaultFile()), std::string::npos) << message;
  }
  EXPECT_NE(std::string(missing.status().message()).find("libcublasLt.so.nowhere"),
            std::string::npos);
  EXPECT_NE(std::string(old.status().message()).find("libm.so.6 is too old, it has no cublasLt"),
            std::string::npos);
  Double().failing = "cublasLtCreate", Double().status = 1;
  const std::string message(NewHostCudaDeviceWithCublasLt().status().message());
  EXPECT_NE(message.find("cublasLtCreate: CUBLAS_STATUS_OF_A_TEST (1)"), std::string::npos)
      << message;
}

}  // namespace
}  // namespace trireme
