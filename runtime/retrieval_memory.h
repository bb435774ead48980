// The host's arrays as arguments of a device's ops. Where the host can read the device's memory
// they are the arrays themselves, and nothing is copied.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/device.h"

namespace trireme {

// Memory for an op's arguments; where a device lacks it in the middle of a collective call the job
// ends: the other ranks would wait for ever.
inline Tensor ArgumentMemory(Stream& stream, DType dtype, const Shape& shape) {
  auto tensor = Tensor::Create(stream.device(), dtype, shape);
  CHECK(tensor.ok()) << tensor.status().ToString();
  return std::move(tensor).value();
}

// What an op reads. The array must stay as it is until the stream has been waited for.
template <typename T>
class OpInput {
 public:
  OpInput() = default;
  OpInput(Stream& stream, const T* data, const Shape& shape) : view_(data, kDTypeOf<T>, shape) {
    // Never null, so that an empty list is still there.
    static const T kNone{};
    if (data == nullptr) view_.data = &kNone;
    if (stream.device().spec().host_memory) return;
    memory_ = ArgumentMemory(stream, view_.dtype, shape);
    stream.Copy(memory_.view().data, data, view_.bytes());
    view_ = memory_.view();
  }
  ConstTensorView view() const { return view_; }

 private:
  Tensor memory_;
  ConstTensorView view_;
};

// A host array that an op fills.
template <typename T>
class OpOutput {
 public:
  OpOutput(Stream& stream, T* data, DType dtype, const Shape& shape)
      : host_(data), view_(data, dtype, shape) {
    if (stream.device().spec().host_memory) return;
    memory_ = ArgumentMemory(stream, dtype, shape);
    view_ = memory_.view();
  }
  TensorView view() const { return view_; }
  // Enqueues the way to the host, after the op.
  void Fetch(Stream& stream) const {
    if (view_.data != host_) stream.Copy(host_, view_.data, view_.bytes());
  }

 private:
  T* host_;
  Tensor memory_;
  TensorView view_;
};

}  // namespace trireme
