#include "tests/testing.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/isa.h"
#include "kernels/cuda_module.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

// Calls f(row, column, T& element) for every element, rows being dims[0].
template <typename View, typename F>
void ForEach(const View& view, F&& f) {
  const int64_t columns = View::RowElements(view.shape);
  cpu::DispatchFloat(view.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < view.dim(0); ++r) {
      for (int64_t c = 0; c < columns; ++c) f(r * columns + c, view.template row<T>(r)[c]);
    }
  });
}

template <typename T>
Tensor FromHost(const TestDevice& device, const std::vector<T>& values) {
  Tensor tensor = device.Zeros(kDTypeOf<T>, {static_cast<int64_t>(values.size())});
  device.stream().Copy(tensor.view().data, values.data(), values.size() * sizeof(T));
  return tensor;
}

}  // namespace

double RandomValue(uint64_t seed, uint64_t i) {
  uint64_t z =
      seed * 0xd1342543de82ef95u + i * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u;  // splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-52 - 1.0;
}

TestDevice::TestDevice(const DeviceCase& device_case) {
#if defined(TRIREME_HOST_CUDA)
  if (device_case.host_cuda && device_case.cublas_lt) {
    auto device = NewHostCudaDeviceWithCublasLt();
    CHECK(device.ok()) << device.status().ToString();
    device_ = std::move(device).value();
  } else if (device_case.host_cuda) {
    device_ = NewHostCudaDevice();
  }
#endif
  if (device_ == nullptr) {
    auto device = OpenDevice({.name = device_case.cuda ? "cuda" : "cpu",
                              .threads = device_case.threads,
                              .cublas_lt = device_case.cublas_lt,
                              .host_readable = device_case.cuda});
    CHECK(device.ok()) << device.status().ToString();
    device_ = std::move(device).value();
  }
  auto stream = device_->NewStream();
  CHECK(stream.ok()) << stream.status().ToString();
  stream_ = std::move(stream).value();
}

Tensor TestDevice::Zeros(DType dtype, Shape shape) const {
  auto tensor = Tensor::Create(*device_, dtype, shape);
  CHECK(tensor.ok()) << tensor.status().ToString();
  return std::move(tensor).value();
}

Tensor TestDevice::Random(DType dtype, Shape shape, uint64_t seed, double scale) const {
  Tensor tensor = Zeros(dtype, shape);
  FillRandom(tensor.view(), seed, scale);
  return tensor;
}

Tensor TestDevice::From(const std::vector<int32_t>& values) const {
  return FromHost(*this, values);
}
Tensor TestDevice::From(const std::vector<int64_t>& values) const {
  return FromHost(*this, values);
}

std::vector<DeviceCase> DeviceCases() {
  std::vector<DeviceCase> cases = {{1, 0, std::string(cpu::IsaAt(0).name) + "_1thread"}};
  for (int i = 0; i < cpu::IsaCount(); ++i)
    cases.push_back({2, i, std::string(cpu::IsaAt(i).name) + "_2threads"});
#if defined(TRIREME_HOST_CUDA)
  cases.push_back({.threads = 1, .isa = 0, .name = "host_cuda", .host_cuda = true});
#endif
  if (CudaDevices().ok()) cases.push_back({.name = "cuda", .cuda = true});
  return cases;
}

namespace {

void AddCases(const DeviceCase& device, std::vector<DType> dtypes, std::vector<KernelCase>* cases) {
  if (kSanitizer && device.host_cuda) std::erase(dtypes, DType::kF16);
  for (const DType dtype : dtypes) cases->push_back({device, dtype});
}

}  // namespace

std::vector<KernelCase> KernelCases() {
  std::vector<KernelCase> cases;
  for (const DeviceCase& device : DeviceCases())
    AddCases(device, {DType::kF32, DType::kBF16, DType::kF16}, &cases);
  return cases;
}

std::vector<KernelCase> MatMulCases() {
  std::vector<KernelCase> cases = KernelCases();
  for (DeviceCase device : DeviceCases()) {
    if (!device.gpu()) continue;
    device.cublas_lt = true;
    device.name += "_cublaslt";
    if (device.cuda) {
      const auto opened = OpenDevice({.name = "cuda", .cublas_lt = true});
      if (!opened.ok()) {
        std::printf("SKIPPED: matmuls by cuBLASLt: %s\n", opened.status().ToString().c_str());
        continue;
      }
    }
    AddCases(device, {DType::kBF16, DType::kF16}, &cases);
  }
  return cases;
}

std::string CaseName(const ::testing::TestParamInfo<KernelCase>& info) {
  return info.param.device.name + "_" + Name(info.param.dtype);
}

KernelTest::KernelTest() : device_(GetParam().device) { cpu::UseIsa(GetParam().device.isa); }
KernelTest::~KernelTest() { cpu::UseIsa(0); }

std::vector<double> ToDoubles(ConstTensorView view) {
  std::vector<double> out(view.elements());
  ForEach(view, [&](int64_t i, const auto& element) { out[i] = ToFloat(element); });
  return out;
}

void FillRandom(TensorView view, uint64_t seed, double scale) {
  ForEach(view, [&](int64_t i, auto& element) {
    element = FromFloat<std::decay_t<decltype(element)>>(
        static_cast<float>(scale * RandomValue(seed, i)));
  });
}

void Fill(TensorView view, double value) {
  ForEach(view, [&](int64_t, auto& element) {
    element = FromFloat<std::decay_t<decltype(element)>>(static_cast<float>(value));
  });
}

double UnitRoundoff(DType dtype) {
  return dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-24;
}

void ExpectClose(ConstTensorView actual, const std::vector<double>& expected, int64_t terms,
                 double magnitude) {
  const std::vector<double> values = ToDoubles(actual);
  ASSERT_EQ(values.size(), expected.size());
  // Half-precision subnormals are 2^-24 apart.
  const double tiny = actual.dtype == DType::kF16 ? 0x1p-25 : 0.0;
  int reported = 0;
  for (size_t i = 0; i < values.size() && reported < 5; ++i) {
    const double allowed = UnitRoundoff(actual.dtype) * std::abs(expected[i]) +
                           static_cast<double>(terms) * 0x1p-24 * magnitude + tiny;
    if (std::abs(values[i] - expected[i]) <= allowed) continue;  // false for NaN
    ADD_FAILURE() << "element " << i << " is " << values[i] << ", must be " << expected[i] << " +- "
                  << allowed;
    ++reported;
  }
}

void ExpectSameBits(ConstTensorView actual, ConstTensorView expected) {
  ASSERT_TRUE(actual.shape == expected.shape)
      << actual.shape.ToString() << " against " << expected.shape.ToString();
  ASSERT_TRUE(actual.dtype == expected.dtype);
  const size_t row_bytes = ConstTensorView::RowElements(actual.shape) * SizeOf(actual.dtype);
  for (int64_t r = 0; r < actual.dim(0); ++r) {
    const ConstTensorView a = actual.Rows(r, 1), b = expected.Rows(r, 1);
    ASSERT_EQ(std::memcmp(a.data, b.data, row_bytes), 0) << "row " << r << " differs";
  }
}

std::string ModelTestDevice() {
  const char* name = std::getenv("TRIREME_TEST_DEVICE");
  return name == nullptr ? "cpu" : name;
}
std::string ModelTestCollectives() {
  const char* name = std::getenv("TRIREME_TEST_COLLECTIVES");
  return name == nullptr ? "auto" : name;
}

bool ModelTestCublasLt() {
  const char* name = std::getenv("TRIREME_TEST_MATMUL");
  return name != nullptr && std::string(name) == "cublaslt";
}

absl::StatusOr<std::unique_ptr<Device>> OpenModelTestDevice(DeviceOptions options) {
  options.cublas_lt = ModelTestCublasLt();
#if defined(TRIREME_HOST_CUDA)
  if (options.name == "host_cuda") {
    return options.cublas_lt ? NewHostCudaDeviceWithCublasLt()
                             : absl::StatusOr<std::unique_ptr<Device>>(NewHostCudaDevice());
  }
#endif
  return OpenDevice(options);
}

std::string GoldenModel(const std::string& name) {
  const std::string root = TRIREME_SOURCE_DIR;
  std::error_code ignored;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", ignored);
  const std::string bundle = program.parent_path().parent_path().string() + "/models/";
  for (const std::string& folder :
       {bundle, root + "/examples/models/", root + "/tests/golden/", root + "/../shared/models/"}) {
    if (std::filesystem::exists(folder + name)) return folder + name;
  }
  ADD_FAILURE() << "golden model " << name
                << " is in none of examples/models, tests/golden, ../shared/models";
  return root + "/tests/golden/" + name;
}

ScratchDir::ScratchDir() {
  std::string pattern = ::testing::TempDir() + "/trireme_XXXXXX";
  const char* made = mkdtemp(pattern.data());
  CHECK(made != nullptr) << "no temporary directory " << pattern;
  path_ = made;
}
ScratchDir::~ScratchDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace trireme
