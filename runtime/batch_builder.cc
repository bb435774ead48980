#include "runtime/batch_builder.h"

#include <algorithm>

#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {

absl::StatusOr<BatchBuilder> BatchBuilder::Create(Device& device, const Options& options) {
  BatchBuilder builder;
  builder.options_ = options;
  builder.Reserve();
  const int64_t tokens = options.max_batch_tokens, sequences = options.max_num_seqs;
  const int64_t i32 = 3 * tokens + 2 * sequences + 1 + sequences * options.max_pages_per_sequence;
  ASSIGN_OR_RETURN(builder.device_i32_, Tensor::Create(device, DType::kI32, {i32}));
  ASSIGN_OR_RETURN(builder.device_i64_, Tensor::Create(device, DType::kI64, {tokens}));
  return builder;
}

// No list grows in the middle of a step.
void BatchBuilder::Reserve() {
  sequences_.resize(options_.max_num_seqs);
  for (SequenceState& sequence : sequences_) {
    sequence.pages.reserve(options_.max_pages_per_sequence);
    sequence.tokens.reserve(
        std::min(options_.max_pages_per_sequence * options_.page_size, kReservedTokens));
  }
  for (auto* list : {&token_ids_, &positions_, &logit_rows_})
    list->reserve(options_.max_batch_tokens);
  slot_mapping_.reserve(options_.max_batch_tokens);
  kv_lens_.reserve(options_.max_num_seqs);
  cu_q_lens_.reserve(options_.max_num_seqs + 1);
  upload_.reserve(3 * options_.max_batch_tokens + 2 * options_.max_num_seqs + 1);
  page_tables_.resize(options_.max_num_seqs * options_.max_pages_per_sequence);
}

void BatchBuilder::Clear() {
  token_ids_.clear();
  positions_.clear();
  slot_mapping_.clear();
  kv_lens_.clear();
  logit_rows_.clear();
  cu_q_lens_.assign(1, 0);
  most_pages_ = 0;
}

void BatchBuilder::Pack(const StepPlan& plan) {
  Clear();
  for (size_t s = 0; s < plan.chunks.size(); ++s) {
    const Chunk& chunk = plan.chunks[s];
    const SequenceState& sequence = sequences_[chunk.slot];
    const int32_t count = chunk.num_tokens;
    const int32_t first_row = static_cast<int32_t>(token_ids_.size());
    for (int32_t i = 0; i < count; ++i) {
      const int64_t position = chunk.position + i;
      token_ids_.push_back(sequence.tokens[position]);
      positions_.push_back(static_cast<int32_t>(position));
      slot_mapping_.push_back(sequence.pages[position / options_.page_size] * options_.page_size +
                              position % options_.page_size);
      if (chunk.logit_rows == LogitRows::kAll) logit_rows_.push_back(first_row + i);
    }
    if (chunk.logit_rows == LogitRows::kLast || chunk.logit_rows == LogitRows::kHidden)
      logit_rows_.push_back(first_row + count - 1);
    cu_q_lens_.push_back(first_row + count);
    SetPages(sequence.pages);
    kv_lens_.push_back(chunk.position + count);
  }
}

void BatchBuilder::PackDecode(int32_t token, int64_t position, int64_t slot,
                              std::span<const int32_t> page_table) {
  const auto row = static_cast<int32_t>(token_ids_.size());
  token_ids_.push_back(token);
  positions_.push_back(static_cast<int32_t>(position));
  slot_mapping_.push_back(slot);
  logit_rows_.push_back(row);
  cu_q_lens_.push_back(row + 1);
  SetPages(page_table);
  kv_lens_.push_back(static_cast<int32_t>(position) + 1);
}

void BatchBuilder::SetPages(std::span<const int32_t> pages) {
  static constexpr int32_t kPadding[] = {0};  // its one token has a place, too
  if (pages.empty()) pages = kPadding;
  const auto row = static_cast<int64_t>(kv_lens_.size());
  CHECK_LT(row, options_.max_num_seqs);
  std::copy(pages.begin(), pages.end(),
            page_tables_.begin() + row * options_.max_pages_per_sequence);
  most_pages_ = std::max(most_pages_, static_cast<int64_t>(pages.size()));
}

void BatchBuilder::Update(const StepPlan& plan) {
  auto token = plan.tokens.begin();
  auto page = plan.pages.begin();
  for (const NewSequence& added : plan.new_sequences) {
    SequenceState& sequence = sequences_[added.slot];
    sequence.info = added;
    sequence.tokens.assign(token, token + added.computed_tokens);
    sequence.pages.assign(page, page + added.num_pages);
    token += added.computed_tokens;
    page += added.num_pages;
  }
  for (const Chunk& chunk : plan.chunks) {
    SequenceState& sequence = sequences_[chunk.slot];
    CHECK_EQ(static_cast<int64_t>(sequence.tokens.size()), chunk.position);
    const size_t pages =
        std::max<size_t>(sequence.pages.size(), chunk.page_index + chunk.num_pages);
    CHECK_LE(static_cast<int64_t>(pages), options_.max_pages_per_sequence);
    sequence.pages.resize(pages);
    std::copy_n(page, chunk.num_pages, sequence.pages.begin() + chunk.page_index);
    sequence.tokens.insert(sequence.tokens.end(), token, token + chunk.num_tokens);
    if (*token == kSampledBefore) {
      CHECK_GE(sequence.sampled, 0);
      sequence.tokens.back() = sequence.sampled;
    }
    token += chunk.num_tokens;
    page += chunk.num_pages;
  }
  CHECK(token == plan.tokens.end() && page == plan.pages.end());
}

Batch BatchBuilder::Build(Stream& stream, const StepPlan& plan, int64_t padded) {
  Update(plan);
  Pack(plan);
  // Token -1 is in no shard's vocabulary: its row is zeros.
  while (static_cast<int64_t>(kv_lens_.size()) < padded) PackDecode(-1, 0, -1, {});
  return Upload(stream);
}

Batch BatchBuilder::BuildTrial(Stream& stream, const Trial& trial, int round) {
  constexpr int64_t kTokens = 1024;  // of the longest sequence: several splits of decode attention
  const int64_t page = options_.page_size, slots = trial.num_pages * page;
  const int64_t longest =
      std::min({kTokens / page + 1, options_.max_pages_per_sequence, trial.max_positions / page});
  Clear();
  for (int64_t s = 0; s < trial.sequences; ++s) {
    // Sequence s stores to slot s, on its last page; in round 1 it has others before that one.
    const bool stores = s < slots;
    const int64_t before =
        round == 0 ? 0 : std::max<int64_t>(0, longest * (s + 1) / trial.sequences - 1);
    page_table_.clear();
    for (int64_t i = 0; i < before; ++i)
      page_table_.push_back(static_cast<int32_t>((s + 1 + 7 * i) % trial.num_pages));
    page_table_.push_back(static_cast<int32_t>(stores ? s / page : 0));
    const int64_t position = before * page + (stores ? s % page : 0);
    PackDecode(static_cast<int32_t>((s * 31 + round * 17 + 1) % trial.vocab_size),
               std::min(position, trial.max_positions - 1), stores ? s : -1, page_table_);
  }
  return Upload(stream);
}

Batch BatchBuilder::Upload(Stream& stream) {
  const auto sequences = static_cast<int64_t>(kv_lens_.size());
  CHECK_LE(static_cast<int64_t>(token_ids_.size()), options_.max_batch_tokens);
  CHECK_LE(sequences, options_.max_num_seqs);

  // One copy of all but the page tables: a short copy costs what its launch costs. Of the tables
  // what is used: they have room for the longest sequence that may come.
  int32_t* const device = device_i32_.view().as<int32_t>();
  upload_.clear();
  const auto place = [&](const std::vector<int32_t>& values) {
    const ConstTensorView view(device + upload_.size(), DType::kI32,
                               {static_cast<int64_t>(values.size())});
    upload_.insert(upload_.end(), values.begin(), values.end());
    return view;
  };
  Batch batch;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t q_len = cu_q_lens_[s + 1] - cu_q_lens_[s];
    batch.min_q_len = s == 0 ? q_len : std::min(batch.min_q_len, q_len);
    batch.max_q_len = std::max(batch.max_q_len, q_len);
  }
  batch.token_ids = place(token_ids_);
  batch.positions = place(positions_);
  batch.cu_q_lens = place(cu_q_lens_);
  batch.kv_lens = place(kv_lens_);
  batch.logit_rows = place(logit_rows_);
  stream.Copy(device, upload_.data(), upload_.size() * sizeof(int32_t));
  int32_t* const tables = device + upload_.size();
  const size_t row_bytes = options_.max_pages_per_sequence * sizeof(int32_t);
  stream.CopyRows(tables, row_bytes, page_tables_.data(), row_bytes, most_pages_ * sizeof(int32_t),
                  static_cast<size_t>(sequences));
  batch.page_tables =
      ConstTensorView(tables, DType::kI32, {sequences, options_.max_pages_per_sequence});
  stream.Copy(device_i64_.view().data, slot_mapping_.data(),
              slot_mapping_.size() * sizeof(int64_t));
  batch.slot_mapping = ConstTensorView(device_i64_.view().data, DType::kI64,
                                       {static_cast<int64_t>(slot_mapping_.size())});
  return batch;
}

}  // namespace trireme
