// Bulk conversion between the float types of checkpoints, on the host. Any thread.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace trireme {

// Converts `count` elements; rounds to nearest even, as FromFloat does. `from` and `to` are aligned
// to their types and do not overlap. REQUIRES: IsFloat(from_type) && IsFloat(to_type).
void ConvertFloats(DType from_type, const void* from, DType to_type, void* to, int64_t count);

}  // namespace trireme
