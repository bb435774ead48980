// Which kernel computes a matmul: a pure function, tested without a GPU.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace trireme::cuda {

struct MatMulDesc {
  DType dtype = DType::kBF16;  // of x and W
  int64_t rows = 1;
  int64_t n = 4096;
  bool permuted = true;      // W is stored for the tensor cores
  bool vectorizable = true;  // rows of x are whole 16-byte pieces
  // Of a device that was opened with cublas_lt: the stream has room for x in W's order, and for
  // gate and up; its result is rows of whole 16-byte pieces; the bias, if any, is on 16 bytes and
  // of the result's type, as cuBLASLt's epilogue wants it.
  bool cublas_lt = false, result_aligned = true, bias_fits = true;
};

enum class MatMulKernel : uint8_t {
  kStream,      // up to 16 rows: W straight into registers
  kTiles,       // 64 x 64 tiles
  kLargeTiles,  // 128 x 128 tiles
  kPlain,       // multiply-adds, any type and shape
  kLibrary,     // cuBLASLt: only where it was asked for
};

// An mma has 16 rows, so fewer cost the same.
inline constexpr int64_t kFewRowsLimit = 16;
// Large tiles where they fill an H100's 132 SMs; below, small ones are four times as many blocks.
inline constexpr int64_t kLargeTileBlocks = 132;

// The choice between the first three changes no bit of a result; that for kPlain hangs on the
// model's shapes only, not on the batch. kLibrary has sums of its own, which hang on the batch.
constexpr MatMulKernel SelectMatMul(const MatMulDesc& desc) {
  const bool tensor_type = desc.dtype == DType::kBF16 || desc.dtype == DType::kF16;
  if (!tensor_type || !desc.permuted) return MatMulKernel::kPlain;
  const bool many = desc.rows > kFewRowsLimit;
  if (many && desc.cublas_lt && desc.result_aligned && desc.bias_fits)
    return MatMulKernel::kLibrary;
  if (!desc.vectorizable) return MatMulKernel::kPlain;
  if (!many) return MatMulKernel::kStream;
  const int64_t large = (desc.rows + 127) / 128 * ((desc.n + 127) / 128);
  return large >= kLargeTileBlocks ? MatMulKernel::kLargeTiles : MatMulKernel::kTiles;
}

}  // namespace trireme::cuda
