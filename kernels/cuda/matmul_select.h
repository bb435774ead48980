// Which kernel computes a matmul: a pure function, tested without a GPU.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace trireme::cuda {

struct MatMulDesc {
  DType dtype = DType::kBF16;  // of x and W
  int64_t rows = 1;
  bool vectorizable = true;  // rows of x and W are whole 16-byte pieces
};

enum class MatMulKernel : uint8_t {
  kFewRows,   // tensor cores, 16 x 64 tiles: bound by reading W, which it does once
  kManyRows,  // tensor cores, 64 x 64 tiles
  kPlain,     // multiply-adds, any type and shape
};

// An mma has 16 rows, so fewer cost the same.
inline constexpr int64_t kFewRowsLimit = 16;

// The choice between the first two changes no bit of a result; that for kPlain hangs on the model's
// shapes only, not on the batch.
constexpr MatMulKernel SelectMatMul(const MatMulDesc& desc) {
  const bool tensor_type = desc.dtype == DType::kBF16 || desc.dtype == DType::kF16;
  if (!tensor_type || !desc.vectorizable) return MatMulKernel::kPlain;
  return desc.rows <= kFewRowsLimit ? MatMulKernel::kFewRows : MatMulKernel::kManyRows;
}

}  // namespace trireme::cuda
