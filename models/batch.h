// One packed micro-batch: T tokens of S sequences, prefill chunks and decodes side by side, without
// padding. Borrowed views of device memory; built by runtime/batch_builder.
#pragma once

#include "kernels/tensor.h"

namespace trireme {

struct Batch {
  ConstTensorView token_ids;     // [T] i32
  ConstTensorView positions;     // [T] i32: position of each token in its sequence
  ConstTensorView slot_mapping;  // [T] i64: where its key and value go: page * page_size + offset
  ConstTensorView cu_q_lens;     // [S + 1] i32: token range of each sequence
  ConstTensorView kv_lens;       // [S] i32: positions in the cache after this step
  ConstTensorView page_tables;   // [S, max_pages] i32
  ConstTensorView logit_rows;    // [R] i32: tokens whose logits are wanted; R may be 0
  int64_t min_q_len = 0, max_q_len = 0;  // of the sequences; 0 = unknown
  int64_t tokens() const { return token_ids.dim(0); }
  int64_t logit_count() const { return logit_rows.dim(0); }
};

}  // namespace trireme
