// The one place that knows all backends.
#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cuda_module.h"
#include "kernels/device.h"

namespace trireme {

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const DeviceOptions& options) {
  if (options.name == "cpu") return NewCpuDevice(options.threads);
  if (options.name == "cuda") return OpenCudaModuleDevice(options);
  return absl::InvalidArgumentError(
      absl::StrCat("--device ", options.name, ": no such device; there are cpu and cuda"));
}

}  // namespace trireme
