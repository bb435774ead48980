#include "kernels/cuda/matmul_library.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cublas_lt_plans.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/matmul_select.h"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

int64_t RoundedUp(int64_t bytes) {
  return (bytes + kPlanAlignment - 1) / kPlanAlignment * kPlanAlignment;
}

bool Gated(const LinearWeight& w) { return w.use == LinearUse::kMatMulSwiGlu; }

}  // namespace

MatMulLibrary::MatMulLibrary(const CublasLt& cublas)
    : plans_(std::make_unique<CublasLtPlans>(cublas)) {}
MatMulLibrary::~MatMulLibrary() = default;

int64_t LibraryRowBytes(const LinearWeight& w) {
  return (w.k + (Gated(w) ? w.n : 0)) * static_cast<int64_t>(SizeOf(w.dtype));
}

absl::StatusOr<int64_t> MatMulLibrary::Reserve(Device& device, int64_t rows, int64_t row_bytes) {
  if (RowsWithRoom(row_bytes) < rows) {
    if (scratch_.data() == nullptr) {
      ASSIGN_OR_RETURN(scratch_, device.Allocate(CublasLtPlans::kWorkspaceBytes));
    }
    // One for the gap between x's columns and gate and up.
    ASSIGN_OR_RETURN(Buffer room,
                     device.Allocate(static_cast<size_t>(rows * row_bytes + kPlanAlignment)));
    rooms_.push_back(std::move(room));
  }
  size_t held = scratch_.bytes();
  for (const Buffer& room : rooms_) held += room.bytes();
  return static_cast<int64_t>(held);
}

int64_t MatMulLibrary::RowsWithRoom(int64_t row_bytes) const {
  if (rooms_.empty()) return 0;
  return (static_cast<int64_t>(rooms_.back().bytes()) - kPlanAlignment) / row_bytes;
}

bool MatMulLibrary::MatMul(Stream& stream, ConstTensorView x, const LinearWeight& w,
                           ConstTensorView bias, TensorView y) {
  const int64_t rows = x.dim(0), at_once = RowsWithRoom(LibraryRowBytes(w));
  // As equal as they can be: a last piece of a few rows would read all of W for them.
  const int64_t pieces = (rows + at_once - 1) / at_once, piece = (rows + pieces - 1) / pieces;
  for (int64_t row = 0; row < rows; row += piece) {
    const int64_t count = std::min(piece, rows - row);
    const absl::StatusOr<bool> done =
        MatMulRows(stream, x.Rows(row, count), w, bias, y.Rows(row, count));
    if (!done.ok()) {
      if (error_.ok()) error_ = done.status();
      return true;
    }
    // The caller computes all rows then, those of the pieces before once more.
    if (!*done) return false;
  }
  return true;
}

absl::StatusOr<bool> MatMulLibrary::MatMulRows(Stream& stream, ConstTensorView x,
                                               const LinearWeight& w, ConstTensorView bias,
                                               TensorView y) {
  const gpu::StreamHandle handle = NativeHandle(stream);
  void* const permuted = rooms_.back().data();
  TensorView product = y;
  if (Gated(w)) {
    const int64_t offset = RoundedUp(x.dim(0) * w.k * static_cast<int64_t>(SizeOf(x.dtype)));
    product = TensorView(static_cast<char*>(permuted) + offset, x.dtype, {x.dim(0), w.n});
  }
  PermuteColumns(handle, x, permuted);
  const CublasLtShape shape{.in = x.dtype,
                            .out = product.dtype,
                            .rows = x.dim(0),
                            .n = w.n,
                            .k = w.k,
                            .x_stride = w.k,
                            .y_stride = product.stride0,
                            .y_alignment = AlignmentOf(product.data),
                            .bias_alignment = bias ? AlignmentOf(bias.data) : 0};
  const absl::StatusOr<bool> done =
      plans_->MatMul(static_cast<cudaStream_t>(handle), shape,
                     {.x = permuted,
                      .w = static_cast<const CudaLinear&>(w).buffer.data(),
                      .bias = bias.data,
                      .y = product.data},
                     scratch_.data());
  if (!done.ok()) {
    return absl::InternalError(absl::StrCat(std::string(done.status().message()), " (matmul of ",
                                            x.dim(0), " x ", w.n, " x ", w.k, " ", Name(x.dtype),
                                            "); without --matmul cublaslt it is not used"));
  }
  if (*done && Gated(w)) cuda::SiluAndMul(stream, product, y);
  return *done;
}

absl::Status MatMulLibrary::TakeError() { return std::exchange(error_, absl::OkStatus()); }

absl::StatusOr<int64_t> ReserveMatMul(Stream& stream, int64_t rows,
                                      const std::vector<const LinearWeight*>& weights) {
  MatMulLibrary* const library = LibraryOf(stream);
  if (library == nullptr || rows <= kFewRowsLimit) return 0;
  int64_t row_bytes = 0;
  for (const LinearWeight* weight : weights) {
    if (static_cast<const CudaLinear*>(weight)->permuted && SizeOf(weight->dtype) == 2)
      row_bytes = std::max(row_bytes, LibraryRowBytes(*weight));
  }
  if (row_bytes == 0) return 0;
  const absl::StatusOr<int64_t> held =
      library->Reserve(stream.device(), std::min(rows, kLibraryRows), row_bytes);
  if (held.ok()) return held;
  return absl::Status(held.status().code(),
                      absl::StrCat("workspace of --matmul cublaslt (leave the flag out, or lower "
                                   "--max-num-batched-tokens): ",
                                   std::string(held.status().message())));
}

}  // namespace trireme::cuda
