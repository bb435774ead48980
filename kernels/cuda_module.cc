#include "kernels/cuda_module.h"

#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/module_identity.h"
#include "kernels/status.h"

namespace trireme {
namespace {

using IdentityFunction = const char* (*)();
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

absl::Status Unusable(const std::string& path, const std::string& why) {
  return absl::UnavailableError(absl::StrCat(
      "--device cuda: ", path, " ", why,
      ": copy it again from the build that this program comes from, or build the preset cuda; "
      "--device cpu needs none"));
}

// The end of what the file's own headers say it holds. The section headers come last where linkers
// write them; who strips them leaves the segments.
int64_t WholeBytes(std::ifstream& file, const Elf64_Ehdr& header) {
  auto end = static_cast<int64_t>(header.e_shoff + uint64_t{header.e_shnum} * header.e_shentsize);
  file.seekg(static_cast<std::streamoff>(header.e_phoff));
  for (int i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    if (!file.read(reinterpret_cast<char*>(&segment), sizeof(segment))) break;
    end = std::max(end, static_cast<int64_t>(segment.p_offset + segment.p_filesz));
  }
  return end;
}

absl::Status CheckWhole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Elf64_Ehdr header;
  if (!file.read(reinterpret_cast<char*>(&header), sizeof(header)) ||
      std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0)
    return Unusable(path, "is no library");
  const int64_t whole = WholeBytes(file, header);
  file.clear();
  file.seekg(0, std::ios::end);
  const auto bytes = static_cast<int64_t>(file.tellg());
  if (bytes >= whole) return absl::OkStatus();
  return Unusable(path, absl::StrCat("is not whole, ", bytes, " of ", whole, " bytes"));
}

}  // namespace

absl::StatusOr<void*> OpenCudaModule(const std::string& path) {
  if (access(path.c_str(), F_OK) != 0) {
    return absl::UnavailableError(absl::StrCat("--device cuda: this build has no CUDA backend (",
                                               path, " is missing); use --device cpu"));
  }
  RETURN_IF_ERROR(CheckWhole(path));
  // Never closed: its code may be on the stack of any device it made.
  void* const module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    return Unusable(path, absl::StrCat("cannot be loaded (", std::string(dlerror()), ")"));
  }
  const auto identity = reinterpret_cast<IdentityFunction>(dlsym(module, "trireme_cuda_identity"));
  if (identity == nullptr || std::string(identity()) != TRIREME_MODULE_IDENTITY) {
    return Unusable(path, absl::StrCat("belongs to another build (",
                                       identity == nullptr ? "without identity" : identity(),
                                       ") than this program (", TRIREME_MODULE_IDENTITY, ")"));
  }
  return module;
}

absl::StatusOr<void*> CudaModuleFunction(const char* name) {
  const std::string path = ProgramFolder() + "libtrireme_cuda.so";
  ASSIGN_OR_RETURN(void* const module, OpenCudaModule(path));
  void* const function = dlsym(module, name);
  if (function == nullptr) return Unusable(path, absl::StrCat("lacks ", name));
  return function;
}

absl::StatusOr<std::vector<std::string>> CudaDevices() {
  ASSIGN_OR_RETURN(void* const function, CudaModuleFunction("trireme_cuda_devices"));
  absl::StatusOr<std::vector<std::string>> identities = absl::UnknownError("not asked");
  reinterpret_cast<void (*)(absl::StatusOr<std::vector<std::string>>*)>(function)(&identities);
  return identities;
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
