#include "kernels/cuda/device.h"

#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

absl::Status StatusOf(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

std::string CudaVersion(int version) {  // 13000 is 13.0
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

class CudaStream final : public Stream {
 public:
  CudaStream(Device* device, cudaStream_t handle) : Stream(device, &kOps), handle_(handle) {}
  ~CudaStream() override { cudaStreamDestroy(handle_); }
  void Copy(void* dst, const void* src, size_t bytes) override {
    if (bytes == 0) return;
    const cudaError_t error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, handle_);
    if (error_ == cudaSuccess) error_ = error;  // surfaces in Synchronize
  }
  absl::Status Synchronize() override {
    const cudaError_t error = cudaStreamSynchronize(handle_);
    return StatusOf(error_ != cudaSuccess ? error_ : error, device().spec().name);
  }
  cudaStream_t handle() const { return handle_; }

 private:
  cudaStream_t handle_;
  cudaError_t error_ = cudaSuccess;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, const cudaDeviceProp& properties) : index_(index) {
    spec_.name = absl::StrCat("cuda:", index, " ", properties.name);
    spec_.host_memory = false;
    spec_.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    void* data = nullptr;
    // Which GPU a call means is the calling thread's own setting.
    RETURN_IF_ERROR(StatusOf(cudaSetDevice(index_), spec_.name));
    const size_t at_least_one = bytes > 0 ? bytes : 1;
    if (cudaMalloc(&data, at_least_one) != cudaSuccess) {
      cudaGetLastError();  // clears it
      size_t free_bytes = 0, total = 0;
      cudaMemGetInfo(&free_bytes, &total);
      return absl::ResourceExhaustedError(
          absl::StrCat(spec_.name, ": no memory for ", bytes, " bytes; ", free_bytes, " of ", total,
                       " are free: lower --max-num-seqs, --max-model-len or --kv-cache-memory, or "
                       "use more ranks"));
    }
    Buffer buffer(data, bytes, [](void* memory, size_t) { cudaFree(memory); });
    RETURN_IF_ERROR(StatusOf(cudaMemset(data, 0, at_least_one), spec_.name));
    return buffer;
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    cudaStream_t handle = nullptr;
    RETURN_IF_ERROR(StatusOf(cudaSetDevice(index_), spec_.name));
    RETURN_IF_ERROR(
        StatusOf(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), spec_.name));
    return std::make_unique<CudaStream>(this, handle);
  }

 private:
  const int index_;
};

// The kernels are compiled for these chips and run on later ones of the same major version.
bool Supported(const cudaDeviceProp& properties) {
  return properties.major == 8 || (properties.major == 9 && properties.minor == 0) ||
         (properties.major == 10 && properties.minor == 0);
}

}  // namespace

gpu::StreamHandle NativeHandle(Stream& stream) { return static_cast<CudaStream&>(stream).handle(); }

absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options) {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0)
    return absl::UnavailableError("--device cuda: this machine has no NVIDIA driver");
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
  if (options.local_index >= count) {
    return absl::UnavailableError(absl::StrCat("--device cuda: this host has ", count,
                                               " GPUs and more ranks; start at most ", count,
                                               " ranks a host"));
  }
  cudaDeviceProp properties;
  RETURN_IF_ERROR(StatusOf(cudaGetDeviceProperties(&properties, options.local_index),
                           "--device cuda: reading the GPU's properties"));
  if (!Supported(properties)) {
    return absl::UnavailableError(absl::StrCat(
        "--device cuda: ", properties.name, " has compute capability ", properties.major, ".",
        properties.minor, "; this build supports 8.x, 9.0 and 10.0"));
  }
  return std::make_unique<CudaDevice>(options.local_index, properties);
}

}  // namespace trireme::cuda
