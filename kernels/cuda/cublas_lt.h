// cuBLASLt, found when first asked for: loading it costs a process 85 ms and 220 MB. Here it is the
// ceiling that matmuls are compared with.
#pragma once

#include <cublasLt.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace trireme::cuda {

class CublasLt {
 public:
  // The process's. Unavailable when the library is missing.
  static absl::StatusOr<CublasLt*> Open();

  // y [rows, n] = x [rows, k] w^T, all contiguous and of `dtype` (f32 as IEEE fp32), with the
  // algorithm that the heuristics put first. Enqueues.
  absl::Status MatMul(cudaStream_t stream, DType dtype, const void* x, const void* w, void* y,
                      int64_t rows, int64_t n, int64_t k);

 private:
  CublasLt() = default;
  absl::Status Load();

  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  decltype(&cublasLtCreate) create_;
  decltype(&cublasLtMatmulDescCreate) desc_create_;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy_;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set_;
  decltype(&cublasLtMatrixLayoutCreate) layout_create_;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy_;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create_;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy_;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set_;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic_;
  decltype(&cublasLtMatmul) matmul_;
};

}  // namespace trireme::cuda
