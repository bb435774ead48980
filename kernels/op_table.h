// One function pointer per op and backend. Only ops.cc calls through it, after the shapes were
// checked.
#pragma once

#include "kernels/ops.h"

namespace trireme {

struct OpTable {
  decltype(&Embedding) embedding;
  decltype(&RmsNorm) rms_norm;
  decltype(&AddRmsNorm) add_rms_norm;
  decltype(&Add) add;
  decltype(&MatMul) matmul;
  decltype(&RopeAndStoreKv) rope_and_store_kv;
  decltype(&PagedAttention) paged_attention;
  decltype(&SiluAndMul) silu_and_mul;
  decltype(&GatherRows) gather_rows;
  decltype(&PackLinearFrom) pack_linear;
};

}  // namespace trireme
