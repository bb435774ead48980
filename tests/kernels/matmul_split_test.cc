// Matmuls of 17 to 64 rows whose k several blocks share: the bits are those of one block's, in
// whatever order the blocks come, and the room for their parts is made at load and counted. Of GPUs
// alone; the CPU runs the cases that ask for nothing.
#include <functional>

#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "kernels/cuda/gpu.h"
#endif

namespace trireme {
namespace {

struct Storage {
  DType dtype;
  bool codes = false;  // of activations
};

class MatMulSplitTest : public KernelTest {
 protected:
  static std::unique_ptr<LinearWeight> Pack(const TestDevice& device, const Tensor& w,
                                            const Storage& stored,
                                            LinearUse use = LinearUse::kMatMul) {
    auto packed = PackLinear(device.stream(), w.view(), stored.dtype, use).value();
    packed->quantizes_activations = stored.codes;
    return packed;
  }
  static int64_t Reserve(const TestDevice& device, int64_t rows, const LinearWeight& w) {
    return ReserveMatMul(device.stream(), rows, {&w}).value();
  }
  bool TensorCores() const { return GetParam().device.gpu() && dtype() != DType::kF32; }

  // Without room for parts: codes have some, for as many rows as no wide tile takes.
  const TestDevice alone_{GetParam().device};
};

struct Dims {
  int64_t rows, n, k;
};

TEST_P(MatMulSplitTest, HasTheBitsOfOneBlock) {
  // Two, three and seven segments of k's; columns and rows within and around a tile.
  std::vector<Dims> all = {{17, 130, 1088}, {64, 72, 576}, {33, 20, 4160}, {50, 256, 1024}};
  // A range of two segments and one of one: of many columns, which are slow to emulate.
  if (TensorCores() && dtype() == DType::kBF16 && !kSanitizer) all.push_back({20, 11'300, 1088});
  for (const Dims& dims : all) {
    if (!TensorCores()) break;
    SCOPED_TRACE(testing::Message() << dims.rows << " x " << dims.n << " x " << dims.k);
    const Tensor x = device_.Random(dtype(), {dims.rows, dims.k}, 1),
                 w = device_.Random(dtype(), {dims.n, dims.k}, 2),
                 bias = device_.Random(dtype(), {dims.n}, 3);
    for (const Storage& stored :
         {Storage{dtype()}, Storage{DType::kE4M3}, Storage{DType::kE4M3, /*codes=*/true}}) {
      if (dims.n > 10'000 && stored.dtype != dtype()) continue;
      for (const LinearUse use : {LinearUse::kMatMul, LinearUse::kMatMulSwiGlu}) {
        if (dims.n > 10'000 && use != LinearUse::kMatMul) continue;
        const auto shared = Pack(device_, w, stored, use), whole = Pack(alone_, w, stored, use);
        EXPECT_GT(Reserve(device_, 64, *shared), 0);
        Reserve(alone_, 16, *whole);
        using Run = std::function<void(Stream&, const LinearWeight&, TensorView)>;
        std::vector<std::pair<DType, Run>> runs;
        const auto add = [&](DType out, auto op, ConstTensorView b) {
          runs.emplace_back(out, [&x, op, b](Stream& stream, const LinearWeight& weight,
                                             TensorView y) { op(stream, x.view(), weight, b, y); });
        };
        if (use == LinearUse::kMatMulSwiGlu) {
          add(dtype(), MatMulSwiGlu, bias.view());
        } else {
          add(DType::kF32, MatMul, {});
          add(dtype(), MatMul, bias.view());
          add(dtype(), MatMulGelu, bias.view());
        }
        const int64_t columns = use == LinearUse::kMatMul ? dims.n : dims.n / 2;
        for (const auto& [out, run] : runs) {
          const Tensor y = device_.Zeros(out, {dims.rows, columns}),
                       expected = device_.Zeros(out, {dims.rows, columns});
          run(device_.stream(), *shared, y.view());
          run(alone_.stream(), *whole, expected.view());
          ExpectSameBits(y.view(), expected.view());
        }
      }
    }
  }
}

#if defined(TRIREME_HOST_CUDA)
TEST_P(MatMulSplitTest, WhicheverBlockComesLast) {
  if (!GetParam().device.host_cuda || dtype() == DType::kF32) return;
  constexpr int64_t kRows = 40, kN = 130, kK = 2080;
  const Tensor x = device_.Random(dtype(), {kRows, kK}, 1),
               w = device_.Random(dtype(), {kN, kK}, 2),
               expected = device_.Zeros(DType::kF32, {kRows, kN});
  const auto shared = Pack(device_, w, {dtype()}), whole = Pack(alone_, w, {dtype()});
  Reserve(device_, 64, *shared);
  MatMul(alone_.stream(), x.view(), *whole, {}, expected.view());
  const host_cuda::Options before = host_cuda::DefaultOptions();
  for (const host_cuda::Order order :
       {host_cuda::Order::kForward, host_cuda::Order::kReverse, host_cuda::Order::kShuffled}) {
    for (int time = 0; time < 2; ++time) {
      host_cuda::DefaultOptions().order = order;
      host_cuda::DefaultOptions().seed += 1;
      const Tensor y = device_.Zeros(DType::kF32, {kRows, kN});
      MatMul(stream(), x.view(), *shared, {}, y.view());
      ExpectSameBits(y.view(), expected.view());
    }
  }
  host_cuda::DefaultOptions() = before;
}
#endif

TEST_P(MatMulSplitTest, RoomIsMadeAtLoadAndCounted) {
  const Tensor w = device_.Random(dtype(), {72, 1056}, 1),
               narrow = device_.Random(dtype(), {72, 96}, 2);
  const auto packed = Pack(device_, w, {dtype()}), one = Pack(device_, narrow, {dtype()});
  EXPECT_EQ(Reserve(device_, 16, *packed), 0) << "those go to another kernel";
  EXPECT_EQ(Reserve(device_, 64, *one), 0) << "k is one segment";
  const int64_t before = device_.device().allocated_bytes();
  const int64_t held = Reserve(device_, 17, *packed);
  if (!TensorCores()) {
    EXPECT_EQ(held, 0);
    return;
  }
  EXPECT_GT(held, 2 * 72 * 64 * 4);
  if (GetParam().device.host_cuda) {
    EXPECT_EQ(device_.device().allocated_bytes() - before, held);
  }
  EXPECT_EQ(Reserve(device_, 8192, *packed), held) << "there is room for that";
}

// Counters are as they were behind each launch, so a graph may be replayed, and another shape come
// in between.
TEST_P(MatMulSplitTest, ReplaysWhatItDoesEagerly) {
  if (!TensorCores()) return;
  const Tensor w = device_.Random(dtype(), {72, 1056}, 1),
               x = device_.Random(dtype(), {20, 1056}, 2), y = device_.Zeros(dtype(), {20, 72}),
               expected = device_.Zeros(dtype(), {20, 72});
  const auto packed = Pack(device_, w, {dtype()}), whole = Pack(alone_, w, {dtype()});
  Reserve(device_, 64, *packed);
  const int64_t before = device_.device().allocated_bytes();
  const auto graph = stream().Capture([&] { MatMul(stream(), x.view(), *packed, {}, y.view()); });
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (const uint64_t seed : {3, 4, 5}) {
    FillRandom(x.view(), seed);
    (*graph)->Replay(stream());
    ASSERT_TRUE(stream().Synchronize().ok());
    MatMul(alone_.stream(), x.view(), *whole, {}, expected.view());
    ExpectSameBits(y.view(), expected.view());
  }
  EXPECT_EQ(device_.device().allocated_bytes(), before);
}

INSTANTIATE_TEST_SUITE_P(Devices, MatMulSplitTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
