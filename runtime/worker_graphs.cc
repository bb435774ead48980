// What a worker captures at start-up, and how it tries that.

#include <algorithm>
#include <ranges>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/float_convert.h"
#include "runtime/decode_graphs.h"
#include "runtime/worker.h"

namespace trireme {

// Buffers for what a stage sends take turns, so a step's addresses hang on its turn too.
GraphKey Worker::KeyOf(const StepPlan& plan) const {
  return {.work = "decode",
          .size = BucketOf(buckets_, static_cast<int64_t>(plan.chunks.size())),
          .variant = static_cast<int64_t>(next_hidden_)};
}

// Of those whose sums are part of what is captured.
bool Worker::OnAllRanksOfGroup(bool here) {
  Communicator& group = groups_.tp_of_host();
  if (group.size() == 1) return here;
  const uint8_t mine = here ? 1 : 0;
  std::vector<uint8_t> all(group.size());
  group.AllGather(*stream_, ConstTensorView(&mine, DType::kU8, {1}),
                  TensorView(all.data(), DType::kU8, {group.size()}));
  return std::find(all.begin(), all.end(), 0) == all.end();
}

void Worker::FillTrial(int64_t sequences, int round, Batch* batch, TensorView hidden) {
  if (groups_.last_stage()) PrepareTrial(sequences, round);
  *batch = batches_->BuildTrial(*stream_,
                                {.sequences = sequences,
                                 .vocab_size = config_.vocab_size,
                                 .num_pages = options_.num_pages,
                                 .max_positions = options_.max_model_len},
                                round);
  if (groups_.first_stage()) return;
  // What a stage before would have sent: no two rows and no two rounds alike.
  std::vector<float> values(hidden.elements());
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>((i * 37 + static_cast<size_t>(round) * 11) % 101) / 50.0f - 1.0f;
  std::vector<char> bytes(hidden.bytes());
  ConvertFloats(DType::kF32, values.data(), hidden.dtype, bytes.data(), hidden.elements());
  stream_->Copy(hidden.data, bytes.data(), bytes.size());
  stream_->Synchronize().IgnoreError();  // the bytes go; a fault waits for the trial's end
}

// Rows of all kinds, in the other round others. Each has said two tokens.
void Worker::PrepareTrial(int64_t sequences, int round) {
  std::vector<SamplingParams> params(sequences);
  std::vector<SampleRow> rows;
  const std::vector<TokenId> tokens = {0, static_cast<TokenId>(config_.vocab_size - 1)};
  for (int64_t s = 0; s < sequences; ++s) {
    SamplingParams& p = params[s];
    const int64_t kind = (s + round) % 7;
    p.temperature = kind == 0 ? 0.0f : 0.7f;
    if (kind == 2) p.repetition_penalty = 1.5f, p.frequency_penalty = 0.5f;
    if (kind == 3) p.top_k = 5;
    if (kind == 4) p.top_p = 0.9f;
    if (kind == 5) p.min_p = 0.1f;
    if (kind == 6) p.logprobs = 3;
    p.seed = static_cast<uint64_t>(s);
    rows.push_back({&p, tokens, 1});
  }
  sampler_->Prepare(*stream_, rows, sequences);
}

absl::Status Worker::CaptureGraphs() {
  GraphCache::Options options{.all_ranks = [this](bool here) { return OnAllRanksOfGroup(here); }};
  if (!options_.graphs) {
    options.never = EagerReason::kOff;
  } else if (!groups_.tp->capturable()) {
    options.never = EagerReason::kCommunicator;
  } else {
    options.never = GraphCache::WhyNever(*stream_);
  }
  const bool never = options.never.has_value();
  graphs_ = GraphCache(std::move(options));
  if (never) return absl::OkStatus();

  const absl::Status entered = control_->EnterPhase(Phase::kCapture);
  // One that goes on alone would wait in the sums it captures.
  if (!OnAllRanksOfGroup(entered.ok())) return entered;
  buckets_ = DecodeBuckets(
      std::min({options_.max_num_seqs, options_.max_num_batched_tokens, options_.max_logit_rows}));
  const int64_t allocated_before = device_->allocated_bytes();
  // The largest first: what it takes of the host's memory serves the others too.
  for (const int64_t sequences : buckets_ | std::views::reverse) {
    for (size_t turn = 0; turn < hidden_.size(); ++turn) {
      const TensorView hidden = hidden_[turn].data.view().Rows(0, sequences);
      Batch batch;
      GraphTrial trial{.fill = [&](int round) { FillTrial(sequences, round, &batch, hidden); },
                       .work = [&] { Compute(batch, hidden, Ending::kSampled); },
                       .outputs = {hidden}};
      if (groups_.last_stage()) {
        trial.outputs.push_back(logits_.view().Rows(0, sequences));
        PrepareTrial(sequences, 0);  // which finds the answers their place
        trial.outputs.push_back(sampler_->answers());
      }
      graphs_.Capture(*stream_,
                      {.work = "decode", .size = sequences, .variant = static_cast<int64_t>(turn)},
                      trial);
    }
  }
  allocated_bytes_ += device_->allocated_bytes() - allocated_before;
  return stream_->Fault();
}

void Worker::TellOfGraphs() const {
  absl::Status refusal = graphs_.refusal();
  if (absl::IsResourceExhausted(refusal)) {
    refusal = WithLedger(absl::ResourceExhaustedError(absl::StrCat(
        std::string(refusal.message()),
        "; lower --kv-cache-memory or --memory-limit to leave memory for graphs, or give "
        "--no-graphs")));
  }
  TellRefusal(control_, refusal, options_.warn);
}

}  // namespace trireme
