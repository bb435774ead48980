// Turns a StepPlan into a Batch on the device, and remembers on every rank what a sequence's later
// chunks need: its page table, its tokens and its sampling parameters. Used by one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "models/batch.h"
#include "runtime/step.h"

namespace trireme {

// A running sequence as a rank knows it.
struct SequenceState {
  NewSequence info;
  std::vector<int32_t> pages;
  std::vector<TokenId> tokens;  // everything fed so far
};

class BatchBuilder {
 public:
  struct Options {
    int64_t max_num_seqs = 0;
    int64_t max_batch_tokens = 0;
    int64_t max_pages_per_sequence = 0;
    int64_t page_size = 16;
  };
  static absl::StatusOr<BatchBuilder> Create(Device& device, const Options& options);

  // Updates the sequence states and fills the device buffers. The Batch is valid until the next
  // Build.
  Batch Build(Stream& stream, const StepPlan& plan);
  const SequenceState& sequence(int32_t slot) const { return sequences_[slot]; }

 private:
  void Pack(const StepPlan& plan);

  Options options_;
  std::vector<SequenceState> sequences_;  // by slot
  // Host side of the batch.
  std::vector<int32_t> token_ids_, positions_, cu_q_lens_, kv_lens_, page_tables_, logit_rows_;
  std::vector<int64_t> slot_mapping_;
  Tensor device_i32_;  // the i32 arrays, one after the other
  Tensor device_i64_;  // slot_mapping
};

}  // namespace trireme
