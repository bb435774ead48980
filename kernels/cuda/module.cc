// The one door of libtrireme_cuda.so, which the program opens when a CUDA device is asked for: a
// process without a GPU never loads CUDA.
#include "kernels/cuda/device.h"
#include "kernels/cuda_module.h"
#include "kernels/module_identity.h"

extern "C" {
#pragma GCC visibility push(default)

const char* trireme_cuda_identity() { return TRIREME_MODULE_IDENTITY; }

void trireme_cuda_devices(absl::StatusOr<std::vector<std::string>>* identities) {
  *identities = trireme::cuda::UsableDevices();
}

void trireme_cuda_open(const trireme::DeviceOptions* options, trireme::CudaModuleHost host,
                       absl::StatusOr<std::unique_ptr<trireme::Device>>* device) {
  // The module has its own copy of check.cc: a failed CHECK in it must end the job all the same.
  trireme::SetFatalPrefix(host.fatal_prefix);
  trireme::SetFatalHandler(host.fatal_handler);
  *device = trireme::cuda::OpenCudaDevice(*options);
}
#pragma GCC visibility pop
}
