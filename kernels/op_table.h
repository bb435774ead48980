// One function pointer per op and backend. Only ops.cc calls through it, after the shapes were
// checked.
#pragma once

#include "kernels/ops.h"
#include "kernels/sampling.h"
#include "kernels/token_choice.h"

namespace trireme {

struct MolOpTable;

struct OpTable {
  decltype(&Embedding) embedding;
  decltype(&Norm) norm;
  decltype(&AddNorm) add_norm;
  decltype(&Add) add;
  decltype(&MatMul) matmul;
  decltype(&MatMulSwiGlu) matmul_swiglu;
  decltype(&MatMulGelu) matmul_gelu;
  decltype(&ReserveMatMul) reserve_matmul;  // null = none needed
  decltype(&RopeAndStoreKv) rope_and_store_kv;
  decltype(&PagedAttention) paged_attention;
  int64_t (*attention_workspace_bytes)(const AttentionLimits& limits);  // null = none needed
  decltype(&Gelu) gelu;
  decltype(&SiluAndMul) silu_and_mul;
  decltype(&GatherRows) gather_rows;
  decltype(&PenalizeLogits) penalize_logits;
  decltype(&SummarizeLogits) summarize_logits;
  decltype(&DrawTokens) draw_tokens;
  decltype(&RestoreLogits) restore_logits;
  decltype(&ChooseTokens) choose_tokens;
  decltype(&PackLinearFrom) pack_linear;
  // Mixture-of-Logits retrieval; null on a device that lacks it (RequireMol says so).
  const MolOpTable* mol = nullptr;
};

}  // namespace trireme
