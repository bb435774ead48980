#include "kernels/cuda/cublas_lt.h"

#include <dlfcn.h>

#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

std::string Remedy() {
  return absl::StrCat("install the cuBLAS of CUDA ", CUBLAS_VER_MAJOR,
                      ", or add the folder of its libcublasLt.so.", CUBLAS_VER_MAJOR,
                      " to LD_LIBRARY_PATH");
}

}  // namespace

std::string CublasLt::DefaultFile() { return absl::StrCat("libcublasLt.so.", CUBLAS_VER_MAJOR); }

absl::StatusOr<std::unique_ptr<CublasLt>> CublasLt::Open(const std::string& file) {
  std::unique_ptr<CublasLt> library(new CublasLt);
  RETURN_IF_ERROR(library->Load(file));
  return library;
}

CublasLt::~CublasLt() {
  if (handle_ != nullptr) functions_.destroy(handle_);
}

absl::Status CublasLt::Load(const std::string& file) {
  // Never closed: the next device finds it loaded.
  void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cuBLASLt cannot be loaded (", std::string(dlerror()), "): ", Remedy()));
  }
  std::string missing;
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
    if (function == nullptr) missing = symbol;
  };
  find(functions_.create, "cublasLtCreate");
  find(functions_.destroy, "cublasLtDestroy");
  find(functions_.status_name, "cublasLtGetStatusName");
  find(functions_.desc_create, "cublasLtMatmulDescCreate");
  find(functions_.desc_destroy, "cublasLtMatmulDescDestroy");
  find(functions_.desc_set, "cublasLtMatmulDescSetAttribute");
  find(functions_.layout_create, "cublasLtMatrixLayoutCreate");
  find(functions_.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(functions_.preference_create, "cublasLtMatmulPreferenceCreate");
  find(functions_.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(functions_.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(functions_.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(functions_.matmul, "cublasLtMatmul");
  if (!missing.empty()) {
    return absl::UnavailableError(
        absl::StrCat(file, " is too old, it has no ", missing, ": ", Remedy()));
  }
  const cublasStatus_t created = functions_.create(&handle_);
  if (created != CUBLAS_STATUS_SUCCESS) handle_ = nullptr;
  return StatusOf(created, "cublasLtCreate");
}

absl::Status CublasLt::StatusOf(cublasStatus_t status, const char* call) const {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cuBLASLt: ", call, ": ", functions_.status_name(status),
                                          " (", static_cast<int>(status), ")"));
}

}  // namespace trireme::cuda
