#include "runtime/batch_builder.h"

#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {

absl::StatusOr<BatchBuilder> BatchBuilder::Create(Device& device, const Options& options) {
  BatchBuilder builder;
  builder.options_ = options;
  builder.sequences_.resize(options.max_num_seqs);
  const int64_t tokens = options.max_batch_tokens, sequences = options.max_num_seqs;
  const int64_t i32 = 3 * tokens + 2 * sequences + 1 + sequences * options.max_pages_per_sequence;
  ASSIGN_OR_RETURN(builder.device_i32_, Tensor::Create(device, DType::kI32, {i32}));
  ASSIGN_OR_RETURN(builder.device_i64_, Tensor::Create(device, DType::kI64, {tokens}));
  return builder;
}

void BatchBuilder::Pack(const StepPlan& plan) {
  token_ids_.clear();
  positions_.clear();
  slot_mapping_.clear();
  kv_lens_.clear();
  logit_rows_.clear();
  cu_q_lens_.assign(1, 0);
  page_tables_.assign(plan.chunks.size() * options_.max_pages_per_sequence, 0);
  for (size_t s = 0; s < plan.chunks.size(); ++s) {
    const Chunk& chunk = plan.chunks[s];
    const SequenceState& sequence = sequences_[chunk.slot];
    const int32_t count = static_cast<int32_t>(chunk.tokens.size());
    const int32_t first_row = static_cast<int32_t>(token_ids_.size());
    for (int32_t i = 0; i < count; ++i) {
      const int64_t position = chunk.position + i;
      token_ids_.push_back(chunk.tokens[i]);
      positions_.push_back(static_cast<int32_t>(position));
      slot_mapping_.push_back(sequence.pages[position / options_.page_size] * options_.page_size +
                              position % options_.page_size);
      if (chunk.logit_rows == LogitRows::kAll) logit_rows_.push_back(first_row + i);
    }
    if (chunk.logit_rows == LogitRows::kLast) logit_rows_.push_back(first_row + count - 1);
    cu_q_lens_.push_back(first_row + count);
    kv_lens_.push_back(chunk.position + count);
    std::copy(sequence.pages.begin(), sequence.pages.end(),
              page_tables_.begin() + static_cast<int64_t>(s) * options_.max_pages_per_sequence);
  }
}

Batch BatchBuilder::Build(Stream& stream, const StepPlan& plan) {
  for (const NewSequence& added : plan.new_sequences) {
    sequences_[added.slot].info = added;
    sequences_[added.slot].pages.clear();
    sequences_[added.slot].tokens.clear();
  }
  for (const Chunk& chunk : plan.chunks) {
    SequenceState& sequence = sequences_[chunk.slot];
    CHECK_EQ(static_cast<int64_t>(sequence.tokens.size()), chunk.position);
    sequence.pages.insert(sequence.pages.end(), chunk.new_pages.begin(), chunk.new_pages.end());
    CHECK_LE(static_cast<int64_t>(sequence.pages.size()), options_.max_pages_per_sequence);
    sequence.tokens.insert(sequence.tokens.end(), chunk.tokens.begin(), chunk.tokens.end());
  }
  Pack(plan);
  CHECK_LE(static_cast<int64_t>(token_ids_.size()), options_.max_batch_tokens);
  CHECK_LE(static_cast<int64_t>(plan.chunks.size()), options_.max_num_seqs);

  int32_t* next = device_i32_.view().as<int32_t>();
  const auto upload = [&](const std::vector<int32_t>& values) {
    const ConstTensorView view(next, DType::kI32, {static_cast<int64_t>(values.size())});
    if (!values.empty()) stream.Copy(next, values.data(), values.size() * sizeof(int32_t));
    next += values.size();
    return view;
  };
  Batch batch;
  batch.token_ids = upload(token_ids_);
  batch.positions = upload(positions_);
  batch.cu_q_lens = upload(cu_q_lens_);
  batch.kv_lens = upload(kv_lens_);
  batch.logit_rows = upload(logit_rows_);
  batch.page_tables = upload(page_tables_);
  batch.page_tables.shape =
      Shape{static_cast<int64_t>(plan.chunks.size()), options_.max_pages_per_sequence};
  batch.page_tables.stride0 = options_.max_pages_per_sequence;
  stream.Copy(device_i64_.view().data, slot_mapping_.data(),
              slot_mapping_.size() * sizeof(int64_t));
  batch.slot_mapping = ConstTensorView(device_i64_.view().data, DType::kI64,
                                       {static_cast<int64_t>(slot_mapping_.size())});
  return batch;
}

}  // namespace trireme
