#include "kernels/cuda/device.h"

#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cublas_lt.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/read_bandwidth.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

std::string CudaVersion(int version) {  // 13000 is 13.0
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

std::string IdentityOf(const cudaDeviceProp& properties) {
  return absl::StrFormat("GPU %04x:%02x:%02x", properties.pciDomainID, properties.pciBusID,
                         properties.pciDeviceID);
}

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, bool host_readable, const cudaDeviceProp& properties,
             std::unique_ptr<CublasLt> cublas)
      : index_(index), host_readable_(host_readable), cublas_(std::move(cublas)) {
    spec_.name = absl::StrCat("cuda:", index, " ", properties.name);
    spec_.host_memory = false;
    spec_.identity = IdentityOf(properties);
    spec_.multiprocessors = properties.multiProcessorCount;
    spec_.max_head_dim = kMaxHeadDim;
    spec_.max_cache_rows = kMaxCacheRows;
    spec_.max_page_reach = kMaxPageReach;
    spec_.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    void* data = nullptr;
    // Which GPU a call means is the calling thread's own setting.
    RETURN_IF_ERROR(StatusOf(cudaSetDevice(index_), spec_.name));
    const size_t at_least_one = bytes > 0 ? bytes : 1;
    const cudaError_t error =
        host_readable_ ? cudaMallocManaged(&data, at_least_one) : cudaMalloc(&data, at_least_one);
    if (error != cudaSuccess) cudaGetLastError();  // clears it
    if (error != cudaSuccess && error != cudaErrorMemoryAllocation)
      return StatusOf(error, absl::StrCat(spec_.name, ": ", bytes, " bytes of memory"));
    if (error == cudaErrorMemoryAllocation) {
      size_t free_bytes = 0, total = 0;
      cudaMemGetInfo(&free_bytes, &total);
      return absl::ResourceExhaustedError(
          absl::StrCat(spec_.name, ": no memory for ", bytes, " bytes; ", free_bytes, " of ", total,
                       " are free: lower --max-num-seqs, --max-model-len or --kv-cache-memory, or "
                       "use more ranks"));
    }
    allocated_bytes_ += static_cast<int64_t>(bytes);
    Buffer buffer(data, bytes, [](void* memory, size_t) { cudaFree(memory); });
    RETURN_IF_ERROR(StatusOf(cudaMemset(data, 0, at_least_one), spec_.name));
    // The zeros must lie there before anything else comes: streams of this device do not wait for
    // the one that cudaMemset enqueues on, and it returns before the device is done.
    RETURN_IF_ERROR(StatusOf(cudaStreamSynchronize(cudaStreamLegacy), spec_.name));
    return buffer;
  }
  absl::StatusOr<Buffer> AllocateHost(size_t bytes) override {
    void* data = nullptr;
    RETURN_IF_ERROR(StatusOf(cudaSetDevice(index_), spec_.name));
    if (const cudaError_t error =
            cudaHostAlloc(&data, std::max<size_t>(bytes, 1), cudaHostAllocDefault);
        error != cudaSuccess) {
      cudaGetLastError();  // clears it
      return StatusOf(error,
                      absl::StrCat(spec_.name, ": ", bytes, " bytes of the host, page-locked"));
    }
    std::memset(data, 0, bytes);
    return Buffer(data, bytes, [](void* memory, size_t) { cudaFreeHost(memory); });
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    cudaStream_t handle = nullptr;
    RETURN_IF_ERROR(StatusOf(cudaSetDevice(index_), spec_.name));
    RETURN_IF_ERROR(
        StatusOf(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), spec_.name));
    return std::make_unique<CudaStream>(this, index_, host_readable_, handle, cublas_.get());
  }

 private:
  const int index_;
  const bool host_readable_;
  const std::unique_ptr<CublasLt> cublas_;  // or null
};

// What a block of the largest tiles takes of shared memory, at the most (matmul_tiles.cu,
// mol_tile_loader.cuh): an A100's has 163 KiB, but that of other chips of 8.x 99.
constexpr size_t kSharedBytes = 160 << 10;

// The kernels are compiled for these chips.
bool Supported(const cudaDeviceProp& properties) {
  const bool known = properties.major == 8 || (properties.major == 9 && properties.minor == 0) ||
                     (properties.major == 10 && properties.minor == 0);
  return known && properties.sharedMemPerBlockOptin >= kSharedBytes;
}

struct SupportedGpu {
  int index;  // CUDA's
  cudaDeviceProp properties;
};

// Those that the kernels fit, at least one. A display's GPU beside them is passed over.
absl::StatusOr<std::vector<SupportedGpu>> SupportedGpus() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return NoDriver(access("/proc/driver/nvidia/version", F_OK) == 0);
  if (driver / 1000 < runtime / 1000) {
    return absl::UnavailableError(absl::StrCat("--device cuda: the driver knows CUDA ",
                                               CudaVersion(driver), " and this build needs ",
                                               CudaVersion(runtime), "; update the driver"));
  }
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    return absl::UnavailableError(absl::StrCat("--device cuda: the driver shows no GPU (",
                                               cudaGetErrorString(error),
                                               "); see nvidia-smi and CUDA_VISIBLE_DEVICES"));
  }
  std::vector<SupportedGpu> gpus;
  cudaDeviceProp properties;
  for (int index = 0; index < count; ++index) {
    RETURN_IF_ERROR(StatusOf(cudaGetDeviceProperties(&properties, index),
                             "--device cuda: reading the GPU's properties"));
    if (Supported(properties)) gpus.push_back({index, properties});
  }
  if (!gpus.empty()) return gpus;
  return absl::UnavailableError(
      absl::StrCat("--device cuda: ", properties.name, " has compute capability ", properties.major,
                   ".", properties.minor, "; 8.0, 9.0 and 10.0 are supported"));
}

absl::StatusOr<std::unique_ptr<CublasLt>> OpenCublasLt(int index) {
  RETURN_IF_ERROR(StatusOf(cudaSetDevice(index), "--matmul cublaslt"));
  absl::StatusOr<std::unique_ptr<CublasLt>> library = CublasLt::Open();
  if (library.ok()) return library;
  return absl::Status(library.status().code(),
                      absl::StrCat("--matmul cublaslt: ", std::string(library.status().message())));
}

}  // namespace

absl::Status NoDriver(bool loaded) {
  return absl::UnavailableError(
      loaded ? "--device cuda: the NVIDIA driver is loaded, but its library libcuda.so.1 is not "
               "found: "
               "start the container with the NVIDIA runtime (docker run --gpus all), or add the "
               "library's folder to LD_LIBRARY_PATH"
             : "--device cuda: this machine has no NVIDIA driver");
}

absl::StatusOr<std::vector<std::string>> UsableDevices() {
  ASSIGN_OR_RETURN(const std::vector<SupportedGpu> gpus, SupportedGpus());
  std::vector<std::string> identities;
  for (const SupportedGpu& gpu : gpus) identities.push_back(IdentityOf(gpu.properties));
  return identities;
}

absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options) {
  ASSIGN_OR_RETURN(const std::vector<SupportedGpu> gpus, SupportedGpus());
  // A launcher may show each rank its own GPU alone. Whether two ranks have the same one they find
  // out together (parallel/process_groups.h).
  const auto& [index, properties] = gpus[static_cast<size_t>(options.local_index) % gpus.size()];
  // From here on this thread's calls mean this GPU, also those of libraries.
  RETURN_IF_ERROR(StatusOf(cudaSetDevice(index), absl::StrCat("--device cuda: ", properties.name)));
  if (const std::string why = WhyNoCode(); !why.empty()) {
    return absl::UnavailableError(
        absl::StrCat("--device cuda: this build has no kernels for ", properties.name, " (", why,
                     "): build with its architecture in CMAKE_CUDA_ARCHITECTURES (",
                     properties.major, properties.minor, properties.major >= 9 ? "a" : "", ")"));
  }
  gpu::DependentLaunches() = options.dependent_launches && properties.major >= 9;
  std::unique_ptr<CublasLt> cublas;
  if (options.cublas_lt) {
    ASSIGN_OR_RETURN(cublas, OpenCublasLt(index));
    cublas->scales_rows = TRIREME_CUBLAS_LT_SCALES_ROWS && properties.major == 9;
  }
  return std::make_unique<CudaDevice>(index, options.host_readable, properties, std::move(cublas));
}

}  // namespace trireme::cuda
