#include "kernels/cuda/cublas_lt.h"

#include <dlfcn.h>

#include <string>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/device.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;

absl::Status StatusOf(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("cuBLASLt ", what, ": status ", static_cast<int>(status)));
}

}  // namespace

absl::StatusOr<CublasLt*> CublasLt::Open() {
  static CublasLt* const library = new CublasLt;
  static const absl::Status status = library->Load();
  RETURN_IF_ERROR(status);
  return library;
}

absl::Status CublasLt::Load() {
  const std::string name = absl::StrCat("libcublasLt.so.", CUBLAS_VER_MAJOR);
  void* const file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (file == nullptr) {
    return absl::UnavailableError(
        absl::StrCat(std::string(dlerror()), "; add the folder of ", name, " to LD_LIBRARY_PATH"));
  }
  std::string missing;
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(file, symbol));
    if (function == nullptr) missing = symbol;
  };
  find(create_, "cublasLtCreate");
  find(desc_create_, "cublasLtMatmulDescCreate");
  find(desc_destroy_, "cublasLtMatmulDescDestroy");
  find(desc_set_, "cublasLtMatmulDescSetAttribute");
  find(layout_create_, "cublasLtMatrixLayoutCreate");
  find(layout_destroy_, "cublasLtMatrixLayoutDestroy");
  find(preference_create_, "cublasLtMatmulPreferenceCreate");
  find(preference_destroy_, "cublasLtMatmulPreferenceDestroy");
  find(preference_set_, "cublasLtMatmulPreferenceSetAttribute");
  find(heuristic_, "cublasLtMatmulAlgoGetHeuristic");
  find(matmul_, "cublasLtMatmul");
  if (!missing.empty()) return absl::UnavailableError(absl::StrCat(name, " has no ", missing));
  RETURN_IF_ERROR(StatusOf(create_(&handle_), "cublasLtCreate"));
  return cuda::StatusOf(cudaMalloc(&workspace_, kWorkspaceBytes), "cuBLASLt workspace");
}

absl::Status CublasLt::MatMul(cudaStream_t stream, DType dtype, const void* x, const void* w,
                              void* y, int64_t rows, int64_t n, int64_t k) {
  const cudaDataType_t type = dtype == DType::kBF16  ? CUDA_R_16BF
                              : dtype == DType::kF16 ? CUDA_R_16F
                                                     : CUDA_R_32F;
  // Column-major: y^T [n, rows] = (w as [k, n])^T (x as [k, rows]).
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  const cublasOperation_t transpose = CUBLAS_OP_T;
  const auto run = [&]() -> absl::Status {
    RETURN_IF_ERROR(StatusOf(desc_create_(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor"));
    RETURN_IF_ERROR(StatusOf(
        desc_set_(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)), "descriptor"));
    RETURN_IF_ERROR(StatusOf(layout_create_(&a, type, k, n, k), "layout"));
    RETURN_IF_ERROR(StatusOf(layout_create_(&b, type, k, rows, k), "layout"));
    RETURN_IF_ERROR(StatusOf(layout_create_(&d, type, n, rows, n), "layout"));
    RETURN_IF_ERROR(StatusOf(preference_create_(&preference), "preference"));
    const size_t workspace_bytes = kWorkspaceBytes;
    RETURN_IF_ERROR(StatusOf(preference_set_(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace_bytes, sizeof(workspace_bytes)),
                             "preference"));
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    RETURN_IF_ERROR(
        StatusOf(heuristic_(handle_, desc, a, b, d, d, preference, 1, &result, &found), "search"));
    if (found == 0) return absl::UnimplementedError("cuBLASLt knows no algorithm for this matmul");
    const float one = 1.0f, zero = 0.0f;
    return StatusOf(matmul_(handle_, desc, &one, w, a, x, b, &zero, y, d, y, d, &result.algo,
                            workspace_, kWorkspaceBytes, stream),
                    "matmul");
  };
  const absl::Status status = run();
  if (preference != nullptr) preference_destroy_(preference);
  for (cublasLtMatrixLayout_t layout : {a, b, d}) {
    if (layout != nullptr) layout_destroy_(layout);
  }
  if (desc != nullptr) desc_destroy_(desc);
  return status;
}

}  // namespace trireme::cuda
