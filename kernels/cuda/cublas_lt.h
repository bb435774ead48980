// cuBLASLt, found when first asked for: loading it costs a process 85 ms and 220 MB. The ceiling
// that matmuls are compared with, and on request what computes them (matmul_library.h).
#pragma once

#include <cublasLt.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Whether this version can multiply matrices of e4m3 with scales for their rows; chips of 9.0 can.
#define TRIREME_CUBLAS_LT_SCALES_ROWS (CUBLAS_VERSION >= 120900)

namespace trireme::cuda {

class CublasLt {
 public:
  // Opens the library `file`, where dlopen finds it, for the GPU that is the thread's current one.
  // Unavailable says which library is missing or too old and what to do.
  static absl::StatusOr<std::unique_ptr<CublasLt>> Open(const std::string& file = DefaultFile());
  // libcublasLt.so of the major version that this was compiled with.
  static std::string DefaultFile();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // The library's own functions.
  struct Functions {
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtGetStatusName) status_name;
    decltype(&cublasLtMatmulDescCreate) desc_create;
    decltype(&cublasLtMatmulDescDestroy) desc_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) preference_create;
    decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    decltype(&cublasLtMatmul) matmul;
  };
  const Functions& functions() const { return functions_; }
  cublasLtHandle_t handle() const { return handle_; }
  // Whether it multiplies matrices of e4m3 with scales for their rows, set by who knows the chip.
  bool scales_rows = false;
  // Internal names the call and the library's own name of the status.
  absl::Status StatusOf(cublasStatus_t status, const char* call) const;

 private:
  CublasLt() = default;
  absl::Status Load(const std::string& file);

  Functions functions_{};
  cublasLtHandle_t handle_ = nullptr;
};

}  // namespace trireme::cuda
