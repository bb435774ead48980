// Opens libtrireme_cuda.so (kernels/cuda), which lies beside the program.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/check.h"
#include "kernels/device.h"

namespace trireme {

// What the module takes over from the program that opens it.
struct CudaModuleHost {
  const char* fatal_prefix;
  FatalHandler fatal_handler;
};

// A function of the module, which is loaded with the first one. Unavailable says what is missing.
absl::StatusOr<void*> CudaModuleFunction(const char* name);

// Loads the file, once in a process, as the module of this program. Unavailable: it is missing, not
// whole (loading it would be a SIGBUS), no library, or not built with the headers, the compiler and
// the Abseil that this program was built with.
absl::StatusOr<void*> OpenCudaModule(const std::string& path);

// DeviceSpec.identity of the GPUs that the module can use, in the order of
// DeviceOptions.local_index. Unavailable says why there is none: no module, no driver, no GPU that
// it fits.
absl::StatusOr<std::vector<std::string>> CudaDevices();

// Loads the module, once in a process, and opens a device. Unavailable says what is missing.
absl::StatusOr<std::unique_ptr<Device>> OpenCudaModuleDevice(const DeviceOptions& options);

}  // namespace trireme
