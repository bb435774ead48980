// What ops' checks of their shapes share.
#pragma once

#include "kernels/check.h"
#include "kernels/tensor.h"

namespace trireme {

// Our fault where it is another shape or type.
inline void CheckShape(const ConstTensorView& view, const Shape& shape, DType dtype,
                       const char* what) {
  CHECK(view.shape == shape) << what << " is " << view.shape.ToString() << ", must be "
                             << shape.ToString();
  CHECK(view.dtype == dtype) << what << " is " << Name(view.dtype) << ", must be " << Name(dtype);
}
// Nor may it have gaps.
inline void CheckTensor(const ConstTensorView& view, const Shape& shape, DType dtype,
                        const char* what) {
  CheckShape(view, shape, dtype, what);
  CHECK(view.contiguous()) << what << " must be contiguous";
}

}  // namespace trireme
