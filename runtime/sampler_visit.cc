#include "runtime/sampler_visit.h"

#include <algorithm>

#include "kernels/check.h"
#include "kernels/sampling.h"
#include "kernels/status.h"

namespace trireme {
namespace {

constexpr int64_t kPadding = 24 * 256;  // of so many tensors

int32_t ClampTo(int64_t room, int64_t wanted) {
  return static_cast<int32_t>(std::min(room, wanted));
}

}  // namespace

int64_t VisitInputBytes(int64_t rows, int64_t penalties) {
  return kPadding + 64 * rows + 16 * penalties;
}
int64_t VisitOutputBytes(int64_t rows, int64_t penalties, int64_t candidates) {
  return kPadding + rows * (40 + 8 * candidates) + 4 * penalties;
}

absl::Status Sampler::DeviceVisit::Ask(Stream& stream, std::span<const RowState> rows,
                                       int64_t padded, int64_t vocabulary) {
  penalties_ = 0;
  for (const RowState& row : rows) {
    penalties_ += visit_.penalize ? static_cast<int64_t>(row.penalties.size()) : 0;
  }
  logprobs_ = std::any_of(rows.begin(), rows.end(),
                          [](const RowState& row) { return row.params().logprobs >= 0; });
  places_room_ = fixed_ ? kUsualPenalties * padded : penalties_;
  CHECK_LE(penalties_, places_room_);
  RETURN_IF_ERROR(Plan(stream.device(), padded, vocabulary));
  in_->Clear(in_->BytesUpTo(in_end_, 0));
  WriteInputs(rows);
  WritePenalties(rows);
  // Penalties lie behind the rest: room that is not used is not moved.
  in_->ToDevice(stream, penalties_ > 0 ? in_->BytesUpTo(amounts_, 8 * penalties_)
                                       : in_->BytesUpTo(in_end_, 0));
  return absl::OkStatus();
}

// In the order in which they are moved: all there is, what penalties and log-probabilities take.
absl::Status Sampler::DeviceVisit::Plan(Device& device, int64_t rows, int64_t vocabulary) {
  const int64_t k = visit_.candidates + visit_.raw_candidates;
  RETURN_IF_ERROR(in_->Reset(device, VisitInputBytes(rows, places_room_)));
  RETURN_IF_ERROR(out_->Reset(device, VisitOutputBytes(rows, places_room_, k)));
  if (visit_.draw) {
    seeds_ = in_->Add(DType::kI64, {rows, 2});
    limits_ = in_->Add(DType::kF64, {rows, 2});
    keys_ = out_->Add(DType::kF64, {rows});
    drawn_scores_ = out_->Add(DType::kF32, {rows});
    drawn_ = out_->Add(DType::kI32, {rows});
  }
  if (visit_.draw && visit_.again) largest_ = in_->Add(DType::kF32, {rows});
  // The last shard may be narrower than the widest.
  if (visit_.candidates > 0) scored_ = PlanSummary(rows, std::min(visit_.candidates, vocabulary));
  if (Raw()) raw_ = PlanSummary(rows, std::min(visit_.raw_candidates, vocabulary));
  penalty_count_ = in_->Add(DType::kI32, {1});
  in_end_ = in_->Add(DType::kU8, {1});
  if (places_room_ > 0) {
    places_ = in_->Add(DType::kI32, {places_room_, 2});
    amounts_ = in_->Add(DType::kF32, {places_room_, 2});
    before_ = out_->Add(DType::kF32, {places_room_});
  }
  return absl::OkStatus();
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
    if (!visit_.draw || row.filtered() || (visit_.again && !row.redraw)) continue;
    in_->host<int64_t>(seeds_)[2 * r] = static_cast<int64_t>(params.seed);
    in_->host<int64_t>(seeds_)[2 * r + 1] = static_cast<int64_t>(row.position());
    in_->host<double>(limits_)[2 * r] = row.inverse_temperature();
    in_->host<double>(limits_)[2 * r + 1] = row.MinPMargin();
    if (visit_.again) in_->host<float>(largest_)[r] = static_cast<float>(row.terms.max);
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
}

void Sampler::DeviceVisit::Summarize(Stream& stream, TensorView logits, const Summary& s) {
  SummarizeLogits(stream, logits, s.inverse_temperature, s.counts, s.largest, s.sum, s.scores,
                  s.columns);
}

absl::Status Sampler::DeviceVisit::Wait(Stream& stream) {
  size_t bytes = out_->used();
  if (penalties_ == 0 && fixed_)
    bytes = logprobs_ ? out_->BytesUpTo(before_, 0) : out_->BytesUpTo(raw_.largest, 0);
  out_->ToHost(stream, bytes);
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
