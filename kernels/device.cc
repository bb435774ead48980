#include "kernels/device.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {
namespace {

constexpr size_t kAlignment = 256;

}  // namespace

absl::StatusOr<Buffer> Device::AllocateHost(size_t bytes) {
  void* const data = std::calloc(std::max<size_t>(bytes, 1), 1);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat(spec_.name, ": the host has no memory for ",
                                                     bytes, " bytes: lower --max-num-seqs"));
  }
  return Buffer(data, bytes, [](void* memory, size_t) { std::free(memory); });
}

absl::StatusOr<std::unique_ptr<Graph>> Stream::Capture(const std::function<void()>&) {
  return absl::UnimplementedError("this stream runs its work at once");
}

absl::StatusOr<Tensor> Tensor::Create(Device& device, DType dtype, Shape shape) {
  Tensor tensor;
  ASSIGN_OR_RETURN(tensor.buffer_,
                   device.Allocate(static_cast<size_t>(shape.elements()) * SizeOf(dtype)));
  tensor.view_ = TensorView(tensor.buffer_.data(), dtype, shape);
  return tensor;
}

absl::StatusOr<Arena> Arena::Create(Device& device, size_t bytes) {
  Arena arena;
  ASSIGN_OR_RETURN(arena.buffer_, device.Allocate(bytes));
  return arena;
}

size_t Arena::Footprint(DType dtype, const Shape& shape) {
  const size_t bytes = static_cast<size_t>(shape.elements()) * SizeOf(dtype);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

TensorView Arena::Allocate(DType dtype, Shape shape) {
  const size_t bytes = Footprint(dtype, shape);
  CHECK_LE(used_ + bytes, buffer_.bytes()) << "arena too small";
  void* data = static_cast<char*>(buffer_.data()) + used_;
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  return TensorView(data, dtype, shape);
}

}  // namespace trireme
