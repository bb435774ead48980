#include "kernels/tensor.h"

namespace trireme {

std::string Shape::ToString() const {
  std::string out = "[";
  for (int i = 0; i < rank; ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

}  // namespace trireme
