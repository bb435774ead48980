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

MatMulShape ShapeOf(const LinearWeight& w, bool by_cublas) {
  return {.n = w.n,
          .k = w.k,
          .permuted = static_cast<const CudaLinear&>(w).permuted,
          .gated = Gated(w),
          .codes = w.quantizes_activations,
          .by_cublas = by_cublas};
}

static_assert(kPlanAlignment == kRoomGap);
static_assert(CublasLtPlans::kWorkspaceBytes == kLibraryWorkspaceBytes);

}  // namespace

MatMulLibrary::MatMulLibrary(const CublasLt& cublas)
    : plans_(std::make_unique<CublasLtPlans>(cublas)), takes_codes_(cublas.scales_rows) {}
MatMulLibrary::~MatMulLibrary() = default;

int64_t LibraryRowBytes(const LinearWeight& w) { return LibraryRowBytes(ShapeOf(w, true)); }

bool MatMulLibrary::Takes(const LinearWeight& w) const {
  return w.dtype == DType::kE4M3 ? w.quantizes_activations && takes_codes_ : SizeOf(w.dtype) == 2;
}

absl::StatusOr<int64_t> MatMulLibrary::Reserve(Device& device, int64_t rows, int64_t row_bytes) {
  if (scratch_.data() == nullptr) {
    ASSIGN_OR_RETURN(scratch_, device.Allocate(CublasLtPlans::kWorkspaceBytes));
  }
  // One more for the gap between x's columns and gate and up.
  RETURN_IF_ERROR(room_.Reserve(device, rows * row_bytes + kPlanAlignment));
  return static_cast<int64_t>(scratch_.bytes()) + room_.held();
}

int64_t MatMulLibrary::RowsWithRoom(int64_t row_bytes) const {
  if (room_.bytes() == 0) return 0;
  return row_bytes == 0 ? kLibraryRows : (room_.bytes() - kPlanAlignment) / row_bytes;
}

bool MatMulLibrary::MatMul(Stream& stream, ConstTensorView x, const Codes& codes,
                           const LinearWeight& w, ConstTensorView bias, TensorView y) {
  const int64_t rows = x.dim(0), at_once = RowsWithRoom(LibraryRowBytes(w));
  // As equal as they can be: a last piece of a few rows would read all of W for them.
  const int64_t pieces = (rows + at_once - 1) / at_once, piece = (rows + pieces - 1) / pieces;
  for (int64_t row = 0; row < rows; row += piece) {
    const int64_t count = std::min(piece, rows - row);
    const Codes of_piece =
        w.quantizes_activations ? Codes{codes.codes + row * w.k, codes.scales + row} : Codes{};
    const absl::StatusOr<bool> done =
        MatMulRows(stream, x.Rows(row, count), of_piece, w, bias, y.Rows(row, count));
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
                                               const Codes& codes, const LinearWeight& w,
                                               ConstTensorView bias, TensorView y) {
  const gpu::StreamHandle handle = NativeHandle(stream);
  const bool quantized = codes.codes != nullptr;
  TensorView product = y;
  if (Gated(w)) {
    const int64_t x_bytes = quantized ? 0 : x.dim(0) * w.k * static_cast<int64_t>(SizeOf(x.dtype));
    product =
        TensorView(static_cast<char*>(room_.data()) + RoundedUp(x_bytes), x.dtype, {x.dim(0), w.n});
  }
  if (!quantized) PermuteColumns(handle, x, room_.data());
  const auto& stored = static_cast<const CudaLinear&>(w);
  const CublasLtShape shape{.in = w.dtype,
                            .out = product.dtype,
                            .rows = x.dim(0),
                            .n = w.n,
                            .k = w.k,
                            .x_stride = w.k,
                            .y_stride = product.stride0,
                            .x_alignment = AlignmentOf(quantized ? codes.codes : room_.data()),
                            .y_alignment = AlignmentOf(product.data),
                            .bias_alignment = bias ? AlignmentOf(bias.data) : 0};
  const absl::StatusOr<bool> done =
      plans_->MatMul(static_cast<cudaStream_t>(handle), shape,
                     {.x = quantized ? codes.codes : room_.data(),
                      .w = stored.buffer.data(),
                      .x_scales = codes.scales,
                      .w_scales = quantized ? stored.scales() : nullptr,
                      .bias = bias.data,
                      .y = product.data},
                     scratch_.data());
  if (!done.ok()) {
    return absl::InternalError(absl::StrCat(std::string(done.status().message()), " (matmul of ",
                                            x.dim(0), " x ", w.n, " x ", w.k, " ", Name(w.dtype),
                                            "); without --matmul cublaslt it is not used"));
  }
  if (*done && Gated(w)) cuda::SiluAndMul(stream, product, y);
  return *done;
}

absl::Status MatMulLibrary::TakeError() { return std::exchange(error_, absl::OkStatus()); }

namespace {

// `done`, or the error with what lacks memory.
absl::Status RoomFor(const std::string& what, const absl::Status& done) {
  if (done.ok()) return done;
  return absl::Status(done.code(),
                      absl::StrCat("workspace of ", what, ": ", std::string(done.message())));
}
// `held` where it is, else the error with what to do about it.
absl::StatusOr<int64_t> HeldFor(const char* flag, const absl::StatusOr<int64_t>& held) {
  if (held.ok()) return held;
  return RoomFor(absl::StrCat(flag, " (leave the flag out, or lower --max-num-batched-tokens)"),
                 held.status());
}

}  // namespace

absl::StatusOr<int64_t> ReserveMatMul(Stream& stream, int64_t rows,
                                      const std::vector<const LinearWeight*>& weights) {
  MatMulLibrary* const library = LibraryOf(stream);
  std::vector<MatMulShape> shapes;
  for (const LinearWeight* weight : weights)
    shapes.push_back(ShapeOf(*weight, library != nullptr && library->Takes(*weight)));
  const MatMulRooms rooms = RoomsOf(rows, shapes);
  int64_t held = 0;
  if (rooms.codes_k > 0) {
    ASSIGN_OR_RETURN(const int64_t codes, HeldFor("--quantization fp8-dynamic",
                                                  CodesRoomOf(stream).Reserve(
                                                      stream.device(), rooms.rows, rooms.codes_k)));
    held += codes;
  }
  if (rooms.cublas_row_bytes >= 0) {
    ASSIGN_OR_RETURN(const int64_t of_library,
                     HeldFor("--matmul cublaslt", library->Reserve(stream.device(), rooms.rows,
                                                                   rooms.cublas_row_bytes)));
    held += of_library;
  }
  if (rooms.parts > 0) {
    RETURN_IF_ERROR(RoomFor("matmuls of 17 to 64 rows",
                            PartsRoomOf(stream).Reserve(stream.device(), rooms.parts)));
    held += PartsRoomOf(stream).held();
  }
  return held;
}

}  // namespace trireme::cuda
