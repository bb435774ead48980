#include "runtime/sampler_visit.h"

#include <algorithm>

#include "kernels/check.h"
#include "kernels/sampling.h"
#include "kernels/status.h"
#include "parallel/topology.h"

namespace trireme {
namespace {

constexpr int64_t kPadding = 32 * 256;  // of so many tensors

int32_t ClampTo(int64_t room, int64_t wanted) {
  return static_cast<int32_t>(std::min(room, wanted));
}

}  // namespace

int64_t Sampler::VisitInputBytes(int64_t rows, int64_t penalties, int64_t ranks) {
  return kPadding + 112 * rows + 16 * penalties + 8 * ranks;
}
int64_t Sampler::VisitOutputBytes(int64_t rows, int64_t penalties, const Visit& visit) {
  // A choice has the raw logits of its candidates, and log-probabilities beside them.
  const int64_t candidate = visit.choose ? 12 : 8, raw_candidate = visit.choose ? 16 : 8;
  return kPadding +
         rows * (56 + candidate * visit.candidates + raw_candidate * visit.raw_candidates) +
         4 * penalties;
}

absl::Status Sampler::DeviceVisit::Ask(Stream& stream, std::span<const RowState> rows,
                                       int64_t padded, int64_t widest_shard) {
  penalties_ = 0;
  for (const RowState& row : rows) {
    penalties_ += visit_.penalize ? static_cast<int64_t>(row.penalties.size()) : 0;
  }
  logprobs_ = std::any_of(rows.begin(), rows.end(),
                          [](const RowState& row) { return row.params().logprobs >= 0; });
  places_room_ = visit_.choose ? kUsualPenalties * padded : penalties_;
  CHECK_LE(penalties_, places_room_);
  RETURN_IF_ERROR(Plan(stream.device(), padded, widest_shard));
  in_->Clear(in_->BytesUpTo(in_end_, 0));
  WriteInputs(rows);
  if (visit_.choose) WriteChoices(rows);
  WritePenalties(rows);
  // Penalties lie behind the rest: room that is not used is not moved.
  in_->ToDevice(stream, penalties_ > 0 ? in_->BytesUpTo(amounts_, 8 * penalties_)
                                       : in_->BytesUpTo(in_end_, 0));
  return absl::OkStatus();
}

// In the order in which they are moved: what was chosen, this shard's answers, what penalties take.
// Shards may differ by a token; their answers lie alike.
absl::Status Sampler::DeviceVisit::Plan(Device& device, int64_t rows, int64_t widest_shard) {
  const int64_t count = std::min(visit_.candidates, widest_shard),
                raw_count = std::min(visit_.raw_candidates, widest_shard);
  const int64_t ranks = tp_ != nullptr ? tp_->size() : 1;
  RETURN_IF_ERROR(in_->Reset(device, VisitInputBytes(rows, places_room_, ranks)));
  RETURN_IF_ERROR(out_->Reset(device, VisitOutputBytes(rows, places_room_, visit_)));
  if (visit_.choose) PlanChoice(rows, raw_count);
  if (visit_.draw) {
    seeds_ = in_->Add(DType::kI64, {rows, 2});
    limits_ = in_->Add(DType::kF64, {rows, 2});
    keys_ = out_->Add(DType::kF64, {rows});
    drawn_scores_ = out_->Add(DType::kF32, {rows});
    drawn_ = out_->Add(DType::kI32, {rows});
  }
  if (visit_.draw && visit_.again) largest_ = in_->Add(DType::kF32, {rows});
  if (visit_.candidates > 0) scored_ = PlanSummary(rows, count);
  if (visit_.choose) {
    scored_raw_ = out_->Add(DType::kF32, {rows, count});
    drawn_raw_ = out_->Add(DType::kF32, {rows});
  }
  if (Raw()) raw_ = PlanSummary(rows, raw_count);
  if (visit_.choose) answers_end_ = out_->Add(DType::kU8, {1});
  penalty_count_ = in_->Add(DType::kI32, {1});
  in_end_ = in_->Add(DType::kU8, {1});
  if (places_room_ > 0) {
    places_ = in_->Add(DType::kI32, {places_room_, 2});
    amounts_ = in_->Add(DType::kF32, {places_room_, 2});
    before_ = out_->Add(DType::kF32, {places_room_});
  }
  return absl::OkStatus();
}

void Sampler::DeviceVisit::PlanChoice(int64_t rows, int64_t raw_count) {
  shards_ = in_->Add(DType::kI32, {tp_->size(), 2});
  choices_ = in_->Add(DType::kI32, {rows});
  filters_ = in_->Add(DType::kF64, {rows, kTokenFilters});
  logprobs_wanted_ = in_->Add(DType::kI32, {rows});
  chosen_.tokens = out_->Add(DType::kI32, {rows});
  chosen_.logprobs = out_->Add(DType::kF32, {rows});
  chosen_.top_tokens = out_->Add(DType::kI32, {rows, raw_count});
  chosen_.top_logprobs = out_->Add(DType::kF32, {rows, raw_count});
  answers_begin_ = out_->Add(DType::kU8, {1});
}

Sampler::DeviceVisit::Summary Sampler::DeviceVisit::PlanSummary(int64_t rows, int64_t count) {
  return {.inverse_temperature = in_->Add(DType::kF64, {rows}),
          .counts = in_->Add(DType::kI32, {rows}),
          .largest = out_->Add(DType::kF32, {rows}),
          .sum = out_->Add(DType::kF64, {rows}),
          .scores = out_->Add(DType::kF32, {rows, count}),
          .columns = out_->Add(DType::kI32, {rows, count}),
          .count = count};
}

// Zeros ask nothing.
void Sampler::DeviceVisit::WriteInputs(std::span<const RowState> rows) {
  for (size_t r = 0; r < rows.size(); ++r) {
    const RowState& row = rows[r];
    const SamplingParams& params = row.params();
    if (Raw() && params.logprobs >= 0) {
      in_->host<double>(raw_.inverse_temperature)[r] = 1.0;
      in_->host<int32_t>(raw_.counts)[r] = ClampTo(raw_.count, params.logprobs);
    }
    if (visit_.candidates > 0) {
      if (row.NeedsSum())
        in_->host<double>(scored_.inverse_temperature)[r] = row.inverse_temperature();
      in_->host<int32_t>(scored_.counts)[r] = ClampTo(scored_.count, row.asked);
    }
    if (!visit_.draw || (visit_.again && !row.redraw)) continue;
    in_->host<int64_t>(seeds_)[2 * r] = static_cast<int64_t>(params.seed);
    in_->host<int64_t>(seeds_)[2 * r + 1] = static_cast<int64_t>(row.position());
    if (row.filtered()) continue;
    in_->host<double>(limits_)[2 * r] = row.inverse_temperature();
    in_->host<double>(limits_)[2 * r + 1] = row.MinPMargin();
    if (visit_.again) in_->host<float>(largest_)[r] = static_cast<float>(row.terms.max);
  }
}

void Sampler::DeviceVisit::WriteChoices(std::span<const RowState> rows) {
  for (int shard = 0; shard < tp_->size(); ++shard) {
    const Range ids = PieceOf(vocab_size_, tp_->size(), shard);
    in_->host<int32_t>(shards_)[2 * shard] = static_cast<int32_t>(ids.begin);
    in_->host<int32_t>(shards_)[2 * shard + 1] = static_cast<int32_t>(ids.size());
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    in_->host<int32_t>(choices_)[r] = static_cast<int32_t>(rows[r].choice());
    in_->host<TokenFilters>(filters_)[r] = rows[r].filters();
    in_->host<int32_t>(logprobs_wanted_)[r] = rows[r].params().logprobs;
  }
}

void Sampler::DeviceVisit::WritePenalties(std::span<const RowState> rows) {
  if (penalties_ == 0) return;
  in_->host<int32_t>(penalty_count_)[0] = static_cast<int32_t>(penalties_);
  int64_t p = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const RowState& row = rows[r];
    for (const RowState::Penalty& penalty : row.penalties) {
      in_->host<int32_t>(places_)[2 * p] = static_cast<int32_t>(r);
      in_->host<int32_t>(places_)[2 * p + 1] = penalty.id - row.first_id;
      in_->host<float>(amounts_)[2 * p] = row.params().repetition_penalty;
      in_->host<float>(amounts_)[2 * p + 1] = penalty.subtract;
      ++p;
    }
  }
}

void Sampler::DeviceVisit::Enqueue(Stream& stream, TensorView logits, int64_t first_id) {
  if (Raw()) Summarize(stream, logits, raw_);
  if (places_room_ > 0) PenalizeLogits(stream, logits, penalty_count_, places_, amounts_, before_);
  if (visit_.candidates > 0) Summarize(stream, logits, scored_);
  if (visit_.draw) {
    DrawTokens(stream, logits, seeds_, limits_, visit_.again ? largest_ : scored_.largest, first_id,
               keys_, drawn_scores_, drawn_);
  }
  if (visit_.choose) EnqueueChoice(stream);
}

void Sampler::DeviceVisit::EnqueueChoice(Stream& stream) {
  ShardAnswers answers{scored_.largest, scored_.sum, scored_.scores, scored_.columns, keys_,
                       drawn_scores_,   drawn_,      raw_.largest,   raw_.sum,        raw_.scores,
                       raw_.columns,    scored_raw_, drawn_raw_};
  RestoreLogits(stream, penalty_count_, places_, before_, answers);
  const char* begin = answers_begin_.as<char>();
  const int64_t bytes = answers_end_.as<char>() - begin;
  if (tp_->size() > 1) {
    char* all = gathered_.as<char>();
    CHECK_LE(tp_->size() * bytes, gathered_.bytes());
    tp_->AllGather(stream, ConstTensorView(begin, DType::kU8, {bytes}),
                   TensorView(all, DType::kU8, {tp_->size() * bytes}));
    for (ConstTensorView* view :
         {&answers.largest, &answers.sum, &answers.scores, &answers.columns, &answers.keys,
          &answers.drawn_scores, &answers.drawn, &answers.raw_largest, &answers.raw_sum,
          &answers.raw_scores, &answers.raw_columns})
      view->data = all + (view->as<char>() - begin);
    for (TensorView* view : {&answers.raw, &answers.drawn_raw})
      view->data = all + (view->as<char>() - begin);
  }
  ChooseTokens(stream, answers, bytes,
               {shards_, choices_, filters_, seeds_, scored_.counts, logprobs_wanted_}, chosen_);
}

void Sampler::DeviceVisit::Summarize(Stream& stream, TensorView logits, const Summary& s) {
  SummarizeLogits(stream, logits, s.inverse_temperature, s.counts, s.largest, s.sum, s.scores,
                  s.columns);
}

absl::Status Sampler::DeviceVisit::WaitForChosen(Stream& stream) {
  out_->ToHost(stream, out_->BytesUpTo(logprobs_ ? answers_begin_ : chosen_.top_tokens, 0));
  return stream.Synchronize();
}

bool Sampler::DeviceVisit::TakeChosen(std::span<const RowState> rows,
                                      std::vector<SampledToken>* sampled) {
  const int32_t* tokens = out_->host<int32_t>(chosen_.tokens);
  if (std::any_of(tokens, tokens + rows.size(), [](int32_t token) { return token < 0; }))
    return false;
  const int64_t room = chosen_.top_tokens.dim(1);
  for (size_t r = 0; r < rows.size(); ++r) {
    SampledToken token;
    token.token = tokens[r];
    const int32_t wanted = rows[r].params().logprobs;
    if (wanted >= 0) token.logprob = out_->host<float>(chosen_.logprobs)[r];
    const int32_t* top = out_->host<int32_t>(chosen_.top_tokens) + r * room;
    const float* logprobs = out_->host<float>(chosen_.top_logprobs) + r * room;
    for (int64_t i = 0; i < std::min<int64_t>(wanted, room) && top[i] >= 0; ++i)
      token.top.emplace_back(top[i], logprobs[i]);
    sampled->push_back(std::move(token));
  }
  return true;
}

absl::Status Sampler::DeviceVisit::WaitForAnswers(Stream& stream) {
  out_->ToHost(stream,
               penalties_ == 0 && visit_.choose ? out_->BytesUpTo(before_, 0) : out_->used());
  return stream.Synchronize();
}

void Sampler::DeviceVisit::Take(std::span<RowState> rows) {
  int64_t p = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& row = rows[r];
    if (penalties_ > 0) {
      for (RowState::Penalty& penalty : row.penalties)
        penalty.raw = out_->host<float>(before_)[p++];
    }
    if (Raw() && row.params().logprobs >= 0) {
      row.local.terms.raw_max = out_->host<float>(raw_.largest)[r];
      row.local.terms.raw_sum = out_->host<double>(raw_.sum)[r];
      ReadCandidates(row, raw_, r, row.local.raw_top);
    }
    if (visit_.candidates > 0) {
      row.local.terms.max = out_->host<float>(scored_.largest)[r];
      row.local.terms.sum = out_->host<double>(scored_.sum)[r];
      ReadCandidates(row, scored_, r, row.local.best);
    }
    row.local.drawn = {};
    if (!visit_.draw) continue;
    const int32_t column = out_->host<int32_t>(drawn_)[r];
    if (column < 0) continue;
    const float score = out_->host<float>(drawn_scores_)[r];
    row.local.drawn = {out_->host<double>(keys_)[r], {score, score, row.first_id + column}};
    row.RestoreRaw(row.local.drawn.candidate);
  }
}

void Sampler::DeviceVisit::ReadCandidates(const RowState& row, const Summary& s, int64_t r,
                                          std::vector<Candidate>& to) {
  const float* scores = out_->host<float>(s.scores) + r * s.count;
  const int32_t* columns = out_->host<int32_t>(s.columns) + r * s.count;
  to.clear();
  for (int64_t i = 0; i < s.count; ++i) {
    if (columns[i] < 0) continue;
    Candidate candidate{scores[i], scores[i], row.first_id + columns[i]};
    if (&s == &scored_) row.RestoreRaw(candidate);
    to.push_back(candidate);
  }
}

}  // namespace trireme
