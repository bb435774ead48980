// Opens libtrireme_cuda.so (kernels/cuda), which lies beside the program.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/check.h"
#include "kernels/device.h"

namespace trireme {

// What the module takes over from the program that opens it.
struct CudaModuleHost {
  const char* fatal_prefix;
  FatalHandler fatal_handler;
};

// Loads the module, once in a process, and opens a device. Unavailable says what is missing.
absl::StatusOr<std::unique_ptr<Device>> OpenCudaModuleDevice(const DeviceOptions& options);

}  // namespace trireme
