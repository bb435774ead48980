// Shapes and non-owning views of dense row-major arrays, passed by value. Abseil-free.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "kernels/check.h"
#include "kernels/dtype.h"

namespace trireme {

// Up to four extents, outermost first.
struct Shape {
  int rank = 0;
  std::array<int64_t, 4> dims{};

  Shape() = default;
  Shape(std::initializer_list<int64_t> extents) {
    CHECK_LE(extents.size(), dims.size());
    for (int64_t extent : extents) dims[rank++] = extent;
  }
  int64_t operator[](int i) const { return dims[i]; }
  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
  bool operator==(const Shape&) const = default;
  std::string ToString() const;  // "[2, 64]"
};

// Void is `void` (TensorView) or `const void` (ConstTensorView). The innermost dimensions are
// contiguous; rows of dims[0] lie `stride0` elements apart, so a view can be a column range of a
// wider matrix.
template <typename Void>
struct BasicTensorView {
  Void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;
  int64_t stride0 = 0;

  BasicTensorView() = default;
  BasicTensorView(Void* data_in, DType dtype_in, Shape shape_in)
      : data(data_in), dtype(dtype_in), shape(shape_in), stride0(RowElements(shape_in)) {}
  BasicTensorView(Void* data_in, DType dtype_in, Shape shape_in, int64_t stride0_in)
      : data(data_in), dtype(dtype_in), shape(shape_in), stride0(stride0_in) {}
  // A mutable view converts to a const one.
  template <typename Other>
  requires(std::is_const_v<Void> && !std::is_const_v<Other>)
      BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT: implicit on purpose
      : data(other.data), dtype(other.dtype), shape(other.shape), stride0(other.stride0) {}

  explicit operator bool() const { return data != nullptr; }
  int64_t dim(int i) const { return shape.dims[i]; }
  int64_t elements() const { return shape.elements(); }
  int64_t bytes() const { return elements() * static_cast<int64_t>(SizeOf(dtype)); }
  bool contiguous() const {
    return shape.rank == 0 || shape.dims[0] <= 1 || stride0 == RowElements(shape);
  }

  template <typename T>
  using Pointer = std::conditional_t<std::is_const_v<Void>, const T*, T*>;
  // First element of row `i` of dims[0].
  template <typename T>
  Pointer<T> row(int64_t i) const {
    return static_cast<Pointer<T>>(data) + i * stride0;
  }
  template <typename T>
  Pointer<T> as() const {
    return static_cast<Pointer<T>>(data);
  }

  // Rows [begin, begin + count) of dims[0].
  BasicTensorView Rows(int64_t begin, int64_t count) const {
    BasicTensorView out = *this;
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    out.data = static_cast<Byte*>(data) + begin * stride0 * static_cast<int64_t>(SizeOf(dtype));
    out.shape.dims[0] = count;
    return out;
  }
  // Columns [begin, begin + count) of a matrix.
  BasicTensorView Columns(int64_t begin, int64_t count) const {
    CHECK_EQ(shape.rank, 2);
    BasicTensorView out = *this;
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    out.data = static_cast<Byte*>(data) + begin * static_cast<int64_t>(SizeOf(dtype));
    out.shape.dims[1] = count;
    return out;
  }
  static int64_t RowElements(const Shape& shape) {
    int64_t n = 1;
    for (int i = 1; i < shape.rank; ++i) n *= shape.dims[i];
    return n;
  }
};
using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

}  // namespace trireme
