#include "runtime/sampler.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "runtime/sampler_row.h"
#include "runtime/sampler_visit.h"
#include "runtime/timer.h"

namespace trireme {

namespace {

// Of a row, for top-p and log-probabilities.
constexpr int64_t kUsualCandidates = 128;

// What ranks exchange of a row before its candidates.
struct RowHead {
  int64_t code;  // of the rank's visit: an absl::StatusCode
  int64_t n;
  ShardTerms terms;
  DrawnToken drawn;
};

}  // namespace

const Sampler::Visit Sampler::kUsual{.candidates = kUsualCandidates, .draw = true};
constexpr Sampler::Visit Sampler::kCaptured{.penalize = true,
                                            .raw_candidates = kCapturedLogprobs,
                                            .raw_terms = true,
                                            .candidates = kCapturedCandidates,
                                            .draw = true,
                                            .choose = true};

int64_t Sampler::ReservedBytes(int64_t rows, int64_t ranks) {
  const int64_t penalties = kUsualPenalties * rows;
  const int64_t gathered = ranks > 1 ? ranks * VisitOutputBytes(rows, 0, kCaptured) : 0;
  return 2 * (VisitInputBytes(rows, penalties, 1) + VisitInputBytes(rows, penalties, ranks) +
              VisitOutputBytes(rows, penalties, kUsual) +
              VisitOutputBytes(rows, penalties, kCaptured)) +
         gathered;
}

absl::Status Sampler::Reserve(Device& device, int64_t rows, int64_t tokens) {
  states_.resize(rows);
  for (RowState& state : states_) state.Reserve(kUsualCandidates, tokens);
  shards_.resize(host_tp_->size());
  for (ShardView& shard : shards_) shard.best.reserve(kUsualCandidates);
  const size_t bytes = rows * (sizeof(RowHead) + kUsualCandidates * sizeof(Candidate));
  send_.reserve(bytes);
  receive_.reserve(bytes * host_tp_->size());
  const int64_t penalties = kUsualPenalties * rows;
  RETURN_IF_ERROR(inputs_.Reset(device, VisitInputBytes(rows, penalties, 1)));
  RETURN_IF_ERROR(outputs_.Reset(device, VisitOutputBytes(rows, penalties, kUsual)));
  RETURN_IF_ERROR(captured_inputs_.Reset(device, VisitInputBytes(rows, penalties, tp_->size())));
  RETURN_IF_ERROR(captured_outputs_.Reset(device, VisitOutputBytes(rows, penalties, kCaptured)));
  if (tp_->size() > 1) {
    ASSIGN_OR_RETURN(
        gathered_,
        Tensor::Create(device, DType::kU8, {tp_->size() * VisitOutputBytes(rows, 0, kCaptured)}));
  }
  captured_ = std::make_unique<DeviceVisit>(kCaptured, &captured_inputs_, &captured_outputs_,
                                            vocab_size_, tp_, gathered_.view());
  reserved_rows_ = rows;
  return absl::OkStatus();
}

Sampler::Sampler(Communicator* tp, Communicator* host_tp, Range vocabulary, int64_t vocab_size)
    : tp_(tp),
      host_tp_(host_tp),
      vocabulary_(vocabulary),
      vocab_size_(vocab_size),
      widest_shard_(PieceOf(vocab_size, tp->size(), 0).size()) {}
Sampler::~Sampler() = default;

absl::Status Sampler::Staging::Reset(Device& device, size_t bytes) {
  if (bytes > arena_.capacity()) {
    ASSIGN_OR_RETURN(Arena arena, Arena::Create(device, 2 * bytes));
    if (to_host_) {
      ASSIGN_OR_RETURN(answers_, device.AllocateHost(arena.capacity()));
    } else {
      questions_.resize(arena.capacity());
    }
    arena_ = std::move(arena);
    host_ = to_host_ ? static_cast<char*>(answers_.data()) : questions_.data();
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

void Sampler::Staging::Clear(size_t bytes) { std::fill_n(host_, bytes, 0); }

void Sampler::Staging::ToDevice(Stream& stream, size_t bytes) {
  if (base_ != nullptr) stream.Copy(const_cast<char*>(base_), host_, bytes);
}

void Sampler::Staging::ToHost(Stream& stream, size_t bytes) {
  if (base_ != nullptr) stream.Copy(host_, base_, bytes);
}

// One all-gather: every rank's terms, draw and best candidates of the rows, then the same merge
// everywhere. A rank whose visit has failed takes part all the same, so that none waits for it, and
// all hear of it.
absl::Status Sampler::Exchange(Stream& stream, std::span<RowState> rows, const Visit& visit,
                               const absl::Status& visited) {
  const int64_t ranks = host_tp_->size(), candidates = visit.candidates, raw = visit.raw_candidates;
  const size_t row_bytes = sizeof(RowHead) + (candidates + raw) * sizeof(Candidate);
  send_.assign(rows.size() * row_bytes, 0);
  receive_.resize(send_.size() * ranks);
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& row = rows[r];
    char* out = send_.data() + r * row_bytes;
    const RowHead head{static_cast<int64_t>(visited.code()), row.n, row.local.terms,
                       row.local.drawn};
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
  host_tp_->AllGather(stream, ConstTensorView(send_.data(), DType::kU8, {bytes}),
                      TensorView(receive_.data(), DType::kU8, {bytes * ranks}));
  // Of host memory. A fault of the device stays with the stream, and the step ends with it.
  stream.Synchronize().IgnoreError();
  RETURN_IF_ERROR(visited);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    RowHead head;
    std::memcpy(&head, receive_.data() + rank * bytes, sizeof(head));
    if (head.code == 0) continue;
    return absl::Status(
        static_cast<absl::StatusCode>(head.code),
        absl::StrCat("sampling failed on tensor-parallel rank ", rank, ": its line says why"));
  }

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
  return absl::OkStatus();
}

absl::Status Sampler::VisitAndMerge(Stream& stream, TensorView logits, std::span<RowState> rows,
                                    const Visit& visit) {
  DeviceVisit device(visit, &inputs_, &outputs_, vocab_size_);
  for (RowState& row : rows) {
    if (visit.again && visit.candidates > 0) row.asked = visit.candidates;
  }
  absl::Status visited = device.Ask(stream, rows, static_cast<int64_t>(rows.size()), widest_shard_);
  if (visited.ok()) {
    const Timer timer(op_seconds_);
    device.Enqueue(stream, logits, vocabulary_.begin);
    visited = device.WaitForAnswers(stream);
  }
  if (visited.ok()) device.Take(rows);
  return Exchange(stream, rows, visit, visited);
}

Sampler::Begun Sampler::Begin(std::span<const SampleRow> rows, int64_t padded) {
  if (states_.size() < rows.size()) states_.resize(rows.size());
  Begun begun{.rows = rows.size(), .visit = {.penalize = true, .candidates = 1}};
  Visit& visit = begun.visit;
  int64_t penalties = 0, most_logprobs = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& state = states_[r];
    state.Start(rows[r], vocabulary_);
    const SamplingParams& params = state.params();
    state.asked = std::min(state.CandidatesWanted(tp_->size() > 1), widest_shard_);
    penalties += static_cast<int64_t>(state.penalties.size());
    visit.candidates = std::max(visit.candidates, state.asked);
    most_logprobs = std::max<int64_t>(most_logprobs, params.logprobs);
    visit.raw_terms = visit.raw_terms || params.logprobs >= 0;
    visit.draw = visit.draw || !state.filtered();
  }
  visit.raw_candidates = std::min(most_logprobs, widest_shard_);
  // Penalties are this shard's: where one rank's do not fit, it alone asks later, and the exchange
  // is the same.
  begun.fits = captured_ != nullptr && padded <= reserved_rows_ &&
               most_logprobs <= std::min(kCaptured.raw_candidates, widest_shard_) &&
               visit.candidates <= kCaptured.candidates;
  begun.captured = begun.fits && penalties <= kUsualPenalties * padded;
  return begun;
}

absl::Status Sampler::Sample(Stream& stream, TensorView logits, std::span<const SampleRow> rows,
                             std::vector<SampledToken>* sampled) {
  sampled->clear();
  if (rows.empty()) return absl::OkStatus();
  prepared_ = Begin(rows, static_cast<int64_t>(rows.size()));
  if (prepared_.fits) {
    AskCaptured(stream, static_cast<int64_t>(rows.size()));
    const Timer timer(op_seconds_);
    Enqueue(stream, logits);
  }
  return Finish(stream, logits, sampled);
}

void Sampler::Prepare(Stream& stream, std::span<const SampleRow> rows, int64_t padded) {
  CHECK_LE(static_cast<int64_t>(rows.size()), padded);
  CHECK_LE(padded, reserved_rows_);
  prepared_ = Begin(rows, padded);
  AskCaptured(stream, padded);
}

// Rows that are asked about later ask nothing now: their draws would be for nothing. Where other
// shards' do ask, they learn from the lack of an answer here that they cannot tell.
void Sampler::AskCaptured(Stream& stream, int64_t padded) {
  const std::span<RowState> asking(states_.data(), prepared_.captured ? prepared_.rows : 0);
  CHECK(captured_->Ask(stream, asking, padded, widest_shard_).ok());
}

void Sampler::Enqueue(Stream& stream, TensorView logits) {
  captured_->Enqueue(stream, logits, vocabulary_.begin);
}

absl::Status Sampler::Finish(Stream& stream, TensorView logits,
                             std::vector<SampledToken>* sampled) {
  sampled->clear();
  const std::span<RowState> states(states_.data(), prepared_.rows);
  if (prepared_.captured) {
    {
      const Timer timer(op_seconds_);
      RETURN_IF_ERROR(captured_->WaitForChosen(stream));
    }
    if (captured_->TakeChosen(states, sampled)) return absl::OkStatus();
    absl::Status visited;
    {
      const Timer timer(op_seconds_);
      visited = captured_->WaitForAnswers(stream);
    }
    if (visited.ok()) captured_->Take(states);
    RETURN_IF_ERROR(Exchange(stream, states, prepared_.visit, visited));
  } else {
    RETURN_IF_ERROR(VisitAndMerge(stream, logits, states, prepared_.visit));
  }
  return Choose(stream, logits, prepared_, sampled);
}

absl::Status Sampler::Choose(Stream& stream, TensorView logits, const Begun& begun,
                             std::vector<SampledToken>* sampled) {
  ++host_choices_;
  const std::span<RowState> states(states_.data(), begun.rows);
  const auto choose = [&] {
    bool all = true;
    for (RowState& state : states) all = state.Choose() && all;
    return all;
  };
  if (std::any_of(states.begin(), states.end(), [](const RowState& row) { return row.redraw; }))
    RETURN_IF_ERROR(VisitAndMerge(stream, logits, states, {.draw = true, .again = true}));
  // A nucleus may hold more tokens than were sent.
  for (int64_t count = begun.visit.candidates; !choose();) {
    count = std::min(8 * count, widest_shard_);
    RETURN_IF_ERROR(VisitAndMerge(stream, logits, states, {.candidates = count, .again = true}));
  }
  for (const RowState& state : states) sampled->push_back(state.Result());
  return absl::OkStatus();
}

}  // namespace trireme
