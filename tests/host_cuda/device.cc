#include "tests/host_cuda/device.h"

#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_ops.h"

namespace trireme {
namespace {

class HostCudaStream final : public Stream {
 public:
  explicit HostCudaStream(Device* device) : Stream(device, &cuda::kOps) {}
  void Copy(void* dst, const void* src, size_t bytes) override {
    if (bytes > 0) std::memmove(dst, src, bytes);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }
};

class HostCudaDevice final : public Device {
 public:
  HostCudaDevice() { spec_.name = "host_cuda"; }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override {
    constexpr size_t kAlignment = 256;
    const size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
    void* data = std::aligned_alloc(kAlignment, rounded);
    if (data == nullptr)
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
    std::memset(data, 0, rounded);
    return Buffer(data, bytes, [](void* memory, size_t) { std::free(memory); });
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return std::make_unique<HostCudaStream>(this);
  }
};

}  // namespace

std::unique_ptr<Device> NewHostCudaDevice() { return std::make_unique<HostCudaDevice>(); }

namespace cuda {
gpu::StreamHandle NativeHandle(Stream&) { return nullptr; }
}  // namespace cuda

}  // namespace trireme
