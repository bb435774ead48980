#include "runtime/sampler.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"
#include "kernels/sampling.h"
#include "kernels/status.h"
#include "runtime/sampler_row.h"
#include "runtime/timer.h"

namespace trireme {

namespace {

// What a visit sends to the device and has back: padding of all tensors, rows, penalties.
constexpr int64_t kPadding = 16 * 256;
int64_t InputBytes(int64_t rows, int64_t penalties) {
  return kPadding + 48 * rows + 16 * penalties;
}
int64_t OutputBytes(int64_t rows, int64_t penalties, int64_t candidates) {
  return kPadding + rows * (40 + 8 * candidates) + 4 * penalties;
}
// Of a row, on average: different tokens with a penalty, candidates for top-p and
// log-probabilities.
constexpr int64_t kUsualPenalties = 128, kUsualCandidates = 128;

// What ranks exchange of a row before its candidates.
struct RowHead {
  int64_t n;
  ShardTerms terms;
  DrawnToken drawn;
};

}  // namespace

int64_t Sampler::ReservedBytes(int64_t rows) {
  return 2 * (InputBytes(rows, kUsualPenalties * rows) +
              OutputBytes(rows, kUsualPenalties * rows, kUsualCandidates));
}

absl::Status Sampler::Reserve(Device& device, int64_t rows, int64_t tokens) {
  states_.resize(rows);
  for (RowState& state : states_) state.Reserve(kUsualCandidates, tokens);
  shards_.resize(tp_->size());
  for (ShardView& shard : shards_) shard.best.reserve(kUsualCandidates);
  const size_t bytes = rows * (sizeof(RowHead) + kUsualCandidates * sizeof(Candidate));
  send_.reserve(bytes);
  receive_.reserve(bytes * tp_->size());
  RETURN_IF_ERROR(inputs_.Reset(device, InputBytes(rows, kUsualPenalties * rows)));
  return outputs_.Reset(device, OutputBytes(rows, kUsualPenalties * rows, kUsualCandidates));
}

Sampler::Sampler(Communicator* tp, Range vocabulary, int64_t vocab_size)
    : tp_(tp), vocabulary_(vocabulary), widest_shard_(PieceOf(vocab_size, tp->size(), 0).size()) {}
Sampler::~Sampler() = default;

absl::Status Sampler::Staging::Reset(Device& device, size_t bytes) {
  if (bytes > arena_.capacity()) {
    ASSIGN_OR_RETURN(arena_, Arena::Create(device, 2 * bytes));
    host_.resize(arena_.capacity());
  }
  arena_.Reset();
  base_ = nullptr;
  return absl::OkStatus();
}

TensorView Sampler::Staging::Add(DType dtype, Shape shape) {
  const TensorView view = arena_.Allocate(dtype, shape);
  if (base_ == nullptr) base_ = view.as<char>();
  return view;
}

void Sampler::Staging::ToDevice(Stream& stream) {
  if (base_ != nullptr) stream.Copy(const_cast<char*>(base_), host_.data(), arena_.used());
}

void Sampler::Staging::ToHost(Stream& stream) {
  if (base_ != nullptr) stream.Copy(host_.data(), base_, arena_.used());
}

// The device's part: one upload, the ops, one download.
class Sampler::DeviceVisit {
 public:
  DeviceVisit(Sampler& sampler, TensorView logits, std::span<RowState> rows, const Visit& visit)
      : s_(sampler), logits_(logits), rows_(rows), visit_(visit) {}

  absl::Status Run(Stream& stream) {
    for (const RowState& row : rows_) {
      penalties_ += visit_.penalize ? static_cast<int64_t>(row.penalties.size()) : 0;
    }
    RETURN_IF_ERROR(Plan(stream));
    WriteInputs();
    s_.inputs_.ToDevice(stream);
    RETURN_IF_ERROR(RunOps(stream));
    ReadOutputs();
    return absl::OkStatus();
  }

 private:
  struct Summary {
    TensorView inverse_temperature, largest, sum, scores, columns;
    int64_t count = 0;
  };
  bool Raw() const { return visit_.raw_candidates > 0 || visit_.raw_terms; }
  int64_t R() const { return static_cast<int64_t>(rows_.size()); }

  absl::Status RunOps(Stream& stream) {
    const Timer timer(s_.op_seconds_);
    if (Raw()) Summarize(stream, raw_);
    if (penalties_ > 0) PenalizeLogits(stream, logits_, places_, amounts_, before_);
    if (visit_.candidates > 0) Summarize(stream, scored_);
    if (visit_.draw != Visit::kNoDraw) {
      DrawTokens(stream, logits_, seeds_, limits_, s_.vocabulary_.begin, keys_, drawn_scores_,
                 drawn_);
    }
    s_.outputs_.ToHost(stream);
    return stream.Synchronize();
  }

  absl::Status Plan(Stream& stream) {
    Staging &in = s_.inputs_, &out = s_.outputs_;
    const int64_t k = visit_.candidates + visit_.raw_candidates;
    RETURN_IF_ERROR(in.Reset(stream.device(), InputBytes(R(), penalties_)));
    RETURN_IF_ERROR(out.Reset(stream.device(), OutputBytes(R(), penalties_, k)));
    if (penalties_ > 0) {
      places_ = in.Add(DType::kI32, {penalties_, 2});
      amounts_ = in.Add(DType::kF32, {penalties_, 2});
      before_ = out.Add(DType::kF32, {penalties_});
    }
    if (Raw()) raw_ = PlanSummary(visit_.raw_candidates);
    if (visit_.candidates > 0) scored_ = PlanSummary(visit_.candidates);
    if (visit_.draw != Visit::kNoDraw) {
      seeds_ = in.Add(DType::kI64, {R(), 2});
      limits_ = in.Add(DType::kF64, {R(), 2});
      keys_ = out.Add(DType::kF64, {R()});
      drawn_scores_ = out.Add(DType::kF32, {R()});
      drawn_ = out.Add(DType::kI32, {R()});
    }
    return absl::OkStatus();
  }
  Summary PlanSummary(int64_t wanted) {
    Staging& out = s_.outputs_;
    const int64_t count = std::min(wanted, logits_.dim(1));  // the last shard may be narrower
    return {.inverse_temperature = s_.inputs_.Add(DType::kF64, {R()}),
            .largest = out.Add(DType::kF32, {R()}),
            .sum = out.Add(DType::kF64, {R()}),
            .scores = out.Add(DType::kF32, {R(), count}),
            .columns = out.Add(DType::kI32, {R(), count}),
            .count = count};
  }
  void Summarize(Stream& stream, const Summary& s) {
    SummarizeLogits(stream, logits_, s.inverse_temperature, s.largest, s.sum, s.scores, s.columns);
  }

  void WriteInputs() {
    Staging& in = s_.inputs_;
    int64_t p = 0;
    for (int64_t r = 0; r < R(); ++r) {
      const RowState& row = rows_[r];
      if (penalties_ > 0) {
        for (const RowState::Penalty& penalty : row.penalties) {
          in.host<int32_t>(places_)[2 * p] = static_cast<int32_t>(r);
          in.host<int32_t>(places_)[2 * p + 1] = penalty.id - row.first_id;
          in.host<float>(amounts_)[2 * p] = row.params().repetition_penalty;
          in.host<float>(amounts_)[2 * p + 1] = penalty.subtract;
          ++p;
        }
      }
      if (Raw()) {
        in.host<double>(raw_.inverse_temperature)[r] = row.params().logprobs >= 0 ? 1.0 : 0.0;
      }
      if (visit_.candidates > 0) {
        in.host<double>(scored_.inverse_temperature)[r] =
            row.NeedsSum() ? row.inverse_temperature() : 0.0;
      }
      if (visit_.draw == Visit::kNoDraw) continue;
      in.host<int64_t>(seeds_)[2 * r] = static_cast<int64_t>(row.params().seed);
      in.host<int64_t>(seeds_)[2 * r + 1] = static_cast<int64_t>(row.position());
      const bool now =
          !row.filtered() && (row.params().min_p > 0.0f) == (visit_.draw == Visit::kWithMinP);
      in.host<double>(limits_)[2 * r] = now ? row.inverse_temperature() : 0.0;
      in.host<double>(limits_)[2 * r + 1] = now ? row.MinPThreshold() : 0.0;
    }
  }

  void ReadOutputs() {
    Staging& out = s_.outputs_;
    int64_t p = 0;
    for (int64_t r = 0; r < R(); ++r) {
      RowState& row = rows_[r];
      if (penalties_ > 0) {
        for (RowState::Penalty& penalty : row.penalties)
          penalty.raw = out.host<float>(before_)[p++];
      }
      if (Raw()) {
        row.local.terms.raw_max = out.host<float>(raw_.largest)[r];
        row.local.terms.raw_sum = out.host<double>(raw_.sum)[r];
        ReadCandidates(row, raw_, r, row.local.raw_top);
      }
      if (visit_.candidates > 0) {
        row.local.terms.max = out.host<float>(scored_.largest)[r];
        row.local.terms.sum = out.host<double>(scored_.sum)[r];
        ReadCandidates(row, scored_, r, row.local.best);
      }
      row.local.drawn = {};
      if (visit_.draw == Visit::kNoDraw) continue;
      const int32_t column = out.host<int32_t>(drawn_)[r];
      if (column < 0) continue;
      const float score = out.host<float>(drawn_scores_)[r];
      row.local.drawn = {out.host<double>(keys_)[r], {score, score, row.first_id + column}};
      row.RestoreRaw(row.local.drawn.candidate);
    }
  }
  void ReadCandidates(const RowState& row, const Summary& s, int64_t r,
                      std::vector<Candidate>& to) {
    const float* scores = s_.outputs_.host<float>(s.scores) + r * s.count;
    const int32_t* columns = s_.outputs_.host<int32_t>(s.columns) + r * s.count;
    to.clear();
    for (int64_t i = 0; i < s.count; ++i) {
      if (columns[i] < 0) continue;
      Candidate candidate{scores[i], scores[i], row.first_id + columns[i]};
      if (&s == &scored_) row.RestoreRaw(candidate);
      to.push_back(candidate);
    }
  }

  Sampler& s_;
  TensorView logits_;
  std::span<RowState> rows_;
  const Visit& visit_;
  int64_t penalties_ = 0;
  TensorView places_, amounts_, before_, seeds_, limits_, keys_, drawn_scores_, drawn_;
  Summary raw_, scored_;
};

// One all-gather: every rank's terms, draw and best candidates of the rows, then the same merge
// everywhere.
void Sampler::Exchange(Stream& stream, std::span<RowState> rows, const Visit& visit) {
  const int64_t ranks = tp_->size(), candidates = visit.candidates, raw = visit.raw_candidates;
  const size_t row_bytes = sizeof(RowHead) + (candidates + raw) * sizeof(Candidate);
  send_.assign(rows.size() * row_bytes, 0);
  receive_.resize(send_.size() * ranks);
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& row = rows[r];
    char* out = send_.data() + r * row_bytes;
    const RowHead head{row.n, row.local.terms, row.local.drawn};
    std::memcpy(out, &head, sizeof(head));
    row.local.best.resize(candidates);
    row.local.raw_top.resize(raw);
    char* list = out + sizeof(head);
    if (candidates > 0) {
      std::memcpy(list, row.local.best.data(), candidates * sizeof(Candidate));
    }
    if (raw > 0) {
      std::memcpy(list + candidates * sizeof(Candidate), row.local.raw_top.data(),
                  raw * sizeof(Candidate));
    }
  }
  const int64_t bytes = static_cast<int64_t>(send_.size());
  tp_->AllGather(stream, ConstTensorView(send_.data(), DType::kU8, {bytes}),
                 TensorView(receive_.data(), DType::kU8, {bytes * ranks}));
  CHECK(stream.Synchronize().ok());

  shards_.resize(ranks);
  for (size_t r = 0; r < rows.size(); ++r) {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const char* in = receive_.data() + rank * bytes + r * row_bytes;
      RowHead head;
      std::memcpy(&head, in, sizeof(head));
      ShardView& shard = shards_[rank];
      shard.n = head.n;
      shard.terms = head.terms;
      shard.drawn = head.drawn;
      shard.best.resize(candidates);
      shard.raw_top.resize(raw);
      const char* list = in + sizeof(head);
      if (candidates > 0) {
        std::memcpy(shard.best.data(), list, candidates * sizeof(Candidate));
      }
      if (raw > 0) {
        std::memcpy(shard.raw_top.data(), list + candidates * sizeof(Candidate),
                    raw * sizeof(Candidate));
      }
    }
    rows[r].Merge(shards_);
  }
}

absl::Status Sampler::VisitAndMerge(Stream& stream, TensorView logits, std::span<RowState> rows,
                                    const Visit& visit) {
  RETURN_IF_ERROR(DeviceVisit(*this, logits, rows, visit).Run(stream));
  Exchange(stream, rows, visit);
  return absl::OkStatus();
}

absl::Status Sampler::Sample(Stream& stream, TensorView logits, std::span<const SampleRow> rows,
                             std::vector<SampledToken>* sampled) {
  sampled->clear();
  if (rows.empty()) return absl::OkStatus();
  if (states_.size() < rows.size()) states_.resize(rows.size());
  const std::span<RowState> states(states_.data(), rows.size());
  Visit visit{.penalize = true, .candidates = 1};
  bool min_p_draws = false;
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& state = states[r];
    state.Start(rows[r], vocabulary_);
    const SamplingParams& params = state.params();
    visit.candidates = std::max(visit.candidates, state.CandidatesWanted());
    visit.raw_candidates = std::max<int64_t>(visit.raw_candidates, params.logprobs);
    visit.raw_terms = visit.raw_terms || params.logprobs >= 0;
    if (state.filtered()) continue;
    if (params.min_p > 0.0f) {
      min_p_draws = true;
    } else {
      visit.draw = Visit::kWithoutMinP;
    }
  }
  visit.candidates = std::min(visit.candidates, widest_shard_);
  visit.raw_candidates = std::min(visit.raw_candidates, widest_shard_);
  RETURN_IF_ERROR(VisitAndMerge(stream, logits, states, visit));
  const auto choose = [&] {
    bool all = true;
    for (RowState& state : states) all = state.Choose() && all;
    return all;
  };
  // A nucleus may hold more tokens than were sent.
  for (int64_t count = visit.candidates; !choose();) {
    count = std::min(8 * count, widest_shard_);
    RETURN_IF_ERROR(VisitAndMerge(stream, logits, states, {.candidates = count}));
  }
  if (min_p_draws) {
    RETURN_IF_ERROR(VisitAndMerge(stream, logits, states, {.draw = Visit::kWithMinP}));
    choose();
  }

  for (const RowState& state : states) sampled->push_back(state.Result());
  return absl::OkStatus();
}

}  // namespace trireme
