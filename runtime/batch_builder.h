// Turns a StepPlan into a Batch on the device, and remembers on every rank what a sequence's later
// chunks need: its page table, its tokens and its sampling parameters. Used by one thread.
#pragma once

#include <cstdint>
#include <span>
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
  TokenId sampled = -1;         // by the last step that sampled for it
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
  // Build. A decode step of fewer sequences than `padded` gets rows that do nothing to make up for
  // them: no token, one key of whatever is in page 0, nothing stored. The Batch's addresses and
  // shapes are then the same for all steps padded alike.
  Batch Build(Stream& stream, const StepPlan& plan, int64_t padded = 0);
  // A decode step of so many sequences that nobody asked for, to try work on. Rounds 0 and 1 differ
  // in tokens, positions, lengths and page tables, and store to the same slots, where whatever was
  // is lost.
  struct Trial {
    int64_t sequences = 0;
    int64_t vocab_size = 0, num_pages = 0, max_positions = 0;
  };
  Batch BuildTrial(Stream& stream, const Trial& trial, int round);
  int64_t device_bytes() const { return device_i32_.bytes() + device_i64_.bytes(); }
  const SequenceState& sequence(int32_t slot) const { return sequences_[slot]; }
  // What the next chunk of the sequence means by kSampledBefore. Only its sampling ranks know.
  void SetSampled(int32_t slot, TokenId token) { sequences_[slot].sampled = token; }

 private:
  void Reserve();
  void Update(const StepPlan& plan);
  void Pack(const StepPlan& plan);
  // Another sequence of one token, sampled for, at the end of what is packed.
  void PackDecode(int32_t token, int64_t position, int64_t slot,
                  std::span<const int32_t> page_table);
  // Of the sequence that comes next. What lies behind them in its row nobody reads.
  void SetPages(std::span<const int32_t> pages);
  void Clear();
  Batch Upload(Stream& stream);

  Options options_;
  std::vector<SequenceState> sequences_;  // by slot
  // Host side of the batch.
  std::vector<int32_t> token_ids_, positions_, cu_q_lens_, kv_lens_, logit_rows_;
  std::vector<int32_t> upload_;       // those, one after the other
  std::vector<int32_t> page_tables_;  // [sequences, max_pages_per_sequence]
  int64_t most_pages_ = 0;            // of a sequence of the batch
  std::vector<int64_t> slot_mapping_;
  std::vector<int32_t> page_table_;  // of a trial's sequence
  Tensor device_i32_;                // the i32 arrays, one after the other
  Tensor device_i64_;                // slot_mapping
};

}  // namespace trireme
