// What tests share: random tensors that are the same everywhere, tolerances with their arithmetic,
// the devices to run on, golden files and scratch directories.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"

namespace trireme {

// Whether this is a sanitizer's build, 5 to 15 times slower: a test may then run fewer cases of a
// kind, which it still runs all of without.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitizer = true;
#else
inline constexpr bool kSanitizer = kThreadSanitizer;
#endif

// Value i of stream `seed`, uniform in [-1, 1): a hash of (seed, i), so the order of drawing never
// matters.
double RandomValue(uint64_t seed, uint64_t i);

// A way to run the ops: on the CPU threads and an instruction set's loops, or the CUDA backend's
// kernels in the emulator of tests/host_cuda.
struct DeviceCase {
  int threads = 1;
  int isa = 0;
  std::string name;
  bool host_cuda = false;
  bool cuda = false;       // the GPU itself, where there is one
  bool cublas_lt = false;  // with matmuls by cuBLASLt, or in the emulator by its double
  bool gpu() const { return host_cuda || cuda; }
};
// All instruction sets of this processor with two threads, the best one with one, the emulator
// where the build found CUDA's headers, and the GPU where the CUDA module lies beside the program
// and finds one (CUDA_LAUNCH_BLOCKING=1 must be set: tests look at results without waiting).
std::vector<DeviceCase> DeviceCases();

// A device under test and its stream.
class TestDevice {
 public:
  explicit TestDevice(int threads = 1)
      : TestDevice(DeviceCase{.threads = threads, .name = "cpu"}) {}
  explicit TestDevice(const DeviceCase& device);
  Stream& stream() const { return *stream_; }
  Device& device() const { return *device_; }

  Tensor Zeros(DType dtype, Shape shape) const;
  // Uniform in [-scale, scale), rounded to dtype.
  Tensor Random(DType dtype, Shape shape, uint64_t seed, double scale = 1.0) const;
  Tensor From(const std::vector<int32_t>& values) const;  // [n] i32
  Tensor From(const std::vector<int64_t>& values) const;  // [n] i64

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

// Every (device case, activation dtype); under a sanitizer without the emulator's f16, whose
// kernels read and write what those of bf16 do. The fixture opens the device and selects the
// instruction set.
struct KernelCase {
  DeviceCase device;
  DType dtype = DType::kF32;
};
std::vector<KernelCase> KernelCases();
// For the matmuls: these, and those of GPUs in two-byte types once more with cuBLASLt.
std::vector<KernelCase> MatMulCases();
std::string CaseName(const ::testing::TestParamInfo<KernelCase>& info);
class KernelTest : public ::testing::TestWithParam<KernelCase> {
 protected:
  KernelTest();
  ~KernelTest() override;
  DType dtype() const { return GetParam().dtype; }
  Stream& stream() { return device_.stream(); }
  TestDevice device_;
};

// Row-major copy of a float view of any rank.
std::vector<double> ToDoubles(ConstTensorView view);
void FillRandom(TensorView view, uint64_t seed, double scale = 1.0);
void Fill(TensorView view, double value);

// What one rounding to `dtype` may cost, relative: half the distance between neighbours.
double UnitRoundoff(DType dtype);

// |actual - expected| <= u(dtype of actual) |expected| + terms * 2^-24 * magnitude: one rounding of
// the result and an fp32 sum of `terms` products of that magnitude. For random signs the error of
// such a sum grows with the square root of terms; the bound is linear, as if every product's
// rounding went the same way.
void ExpectClose(ConstTensorView actual, const std::vector<double>& expected, int64_t terms,
                 double magnitude);
void ExpectSameBits(ConstTensorView actual, ConstTensorView expected);

// The device whole models are tested on, and how its ranks talk: what TRIREME_TEST_DEVICE and
// TRIREME_TEST_COLLECTIVES say (tests/gpu.sh sets them), else "cpu" and "auto".
std::string ModelTestDevice();
std::string ModelTestCollectives();

// Opens it; also "host_cuda", the emulator. With TRIREME_TEST_MATMUL=cublaslt (ModelTestCublasLt)
// either GPU leaves matmuls of many rows to cuBLASLt, or to its double.
absl::StatusOr<std::unique_ptr<Device>> OpenModelTestDevice(DeviceOptions options);
bool ModelTestCublasLt();

// Directory of a golden model: models beside the program's folder (a bundle), examples/models,
// tests/golden, or shared/models beside the repository. Fails the test when it is nowhere.
std::string GoldenModel(const std::string& name);

// A directory that lives as long as the object.
class ScratchDir {
 public:
  ScratchDir();
  ~ScratchDir();
  ScratchDir(const ScratchDir&) = delete;
  ScratchDir& operator=(const ScratchDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace trireme
