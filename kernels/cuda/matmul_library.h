// Matmuls of a stream by cuBLASLt instead of this backend's kernels, where the device was opened
// with DeviceOptions.cublas_lt: faster for many rows on chips whose full rate mma.sync does not
// reach, but the order of a sum, and so a row's bits, hangs on the rows beside it.
//
// The weights are those of the own kernels, no second copy: each stretch of 32 k's is permuted
// (matmul_launch.h). A dot product takes its k's in any order, so x's columns are permuted alike
// into a workspace first, which costs reading and writing x once. Codes of x (matmul_codes.h) are
// made in that order; cuBLASLt multiplies them with weights of e4m3, with a scale for each row of
// both, on chips of 9.0 only. Used by the stream's thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/matmul_codes.h"
#include "kernels/cuda/matmul_room.h"
#include "kernels/cuda/matmul_workspace.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace trireme::cuda {

class CublasLt;
class CublasLtPlans;

class MatMulLibrary {
 public:
  // `cublas` must outlive it.
  explicit MatMulLibrary(const CublasLt& cublas);
  ~MatMulLibrary();

  // Whether it has a way with such weights: of two-byte types, or of e4m3 with codes of x.
  bool Takes(const LinearWeight& w) const;
  // Room for `row_bytes` of `rows` rows, beside cuBLASLt's own. Gives the bytes held.
  absl::StatusOr<int64_t> Reserve(Device& device, int64_t rows, int64_t row_bytes);
  // Rows of so many bytes that there is room for.
  int64_t RowsWithRoom(int64_t row_bytes) const;

  // MatMul, or MatMulSwiGlu where the weight is for that, of weights that are stored permuted;
  // `codes` of x where they quantise activations.
  // False, and nothing is enqueued, where cuBLASLt has no algorithm for it. An error counts as
  // true and is the stream's: error(). REQUIRES: SelectMatMul has chosen it.
  bool MatMul(Stream& stream, ConstTensorView x, const Codes& codes, const LinearWeight& w,
              ConstTensorView bias, TensorView y);

  // The first error since the last TakeError.
  const absl::Status& error() const { return error_; }
  absl::Status TakeError();
  CublasLtPlans& plans() { return *plans_; }

 private:
  absl::StatusOr<bool> MatMulRows(Stream& stream, ConstTensorView x, const Codes& codes,
                                  const LinearWeight& w, ConstTensorView bias, TensorView y);

  std::unique_ptr<CublasLtPlans> plans_;
  const bool takes_codes_;  // the chip is of 9.0, and cuBLASLt of 12.9 or later
  Buffer scratch_;          // cuBLASLt's own
  MatMulRoom room_;
  absl::Status error_;
};

// As matmul_workspace.h has it.
int64_t LibraryRowBytes(const LinearWeight& w);

// The stream's, or null where the own kernels compute all; each device defines it.
MatMulLibrary* LibraryOf(Stream& stream);

// out [rows, k] contiguous = x with each stretch of 32 columns in the order of matmul_launch.h.
// x is of a two-byte type and k a multiple of 32.
void PermuteColumns(gpu::StreamHandle handle, ConstTensorView x, void* out);

}  // namespace trireme::cuda
