#include "kernels/cuda_module.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme {
namespace {

using VersionFunction = const char* (*)();
using OpenFunction = void (*)(const DeviceOptions*, CudaModuleHost,
                              absl::StatusOr<std::unique_ptr<Device>>*);

// The folder of the running program, with a slash.
std::string ProgramFolder() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path));
  if (length <= 0) return "";
  const std::string program(path, static_cast<size_t>(length));
  return program.substr(0, program.rfind('/') + 1);
}

}  // namespace

absl::StatusOr<void*> CudaModuleFunction(const char* name) {
  const std::string path = ProgramFolder() + "libtrireme_cuda.so";
  if (access(path.c_str(), F_OK) != 0) {
    return absl::UnavailableError(absl::StrCat("--device cuda: this build has no CUDA backend (",
                                               path, " is missing); use --device cpu"));
  }
  // Never closed: its code may be on the stack of any device it made.
  void* const module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    return absl::UnavailableError(absl::StrCat("--device cuda: ", std::string(dlerror())));
  }
  const auto version = reinterpret_cast<VersionFunction>(dlsym(module, "trireme_cuda_version"));
  void* const function = dlsym(module, name);
  if (version == nullptr || function == nullptr || std::string(version()) != TRIREME_VERSION) {
    return absl::UnavailableError(
        absl::StrCat("--device cuda: ", path, " belongs to another version than this program"));
  }
  return function;
}

int CudaDeviceCount() {
  const absl::StatusOr<void*> function = CudaModuleFunction("trireme_cuda_device_count");
  return function.ok() ? reinterpret_cast<int (*)()>(*function)() : 0;
}

absl::StatusOr<std::unique_ptr<Device>> OpenCudaModuleDevice(const DeviceOptions& options) {
  ASSIGN_OR_RETURN(void* const function, CudaModuleFunction("trireme_cuda_open"));
  absl::StatusOr<std::unique_ptr<Device>> device = absl::UnknownError("not opened");
  const std::string prefix = FatalPrefix();
  reinterpret_cast<OpenFunction>(function)(&options, {prefix.c_str(), CurrentFatalHandler()},
                                           &device);
  return device;
}

}  // namespace trireme
