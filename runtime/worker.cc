#include "runtime/worker.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "models/memory_plan.h"

namespace trireme {
namespace {

// Adds its own lifetime.
class Timer {
 public:
  explicit Timer(double& seconds) : seconds_(seconds) {}
  ~Timer() { seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  double& seconds_;
  const Clock::time_point begin_ = Clock::now();
};

}  // namespace

Worker::~Worker() = default;

int Worker::leader() const { return groups_.topology.RankOf(groups_.dp_index(), 0, 0); }
int Worker::result_rank() const {
  return groups_.topology.RankOf(groups_.dp_index(), groups_.topology.pp_size - 1, 0);
}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Load(ControlPlane& control,
                                                     const Topology& topology,
                                                     const std::string& model_dir,
                                                     WorkerOptions options) {
  std::unique_ptr<Worker> worker(new Worker(control));
  worker->options_ = std::move(options);
  absl::StatusOr<ModelConfig> config = LoadModelConfig(model_dir);
  absl::Status status = config.status();
  if (status.ok()) status = CheckTensorParallel(*config, topology);
  absl::StatusOr<std::unique_ptr<Device>> device = OpenDevice(worker->options_.device);
  if (status.ok()) status = device.status();
  // Groups are made collectively, so all ranks must have come this far.
  RETURN_IF_ERROR(control.Agree(status));
  worker->config_ = *std::move(config);
  worker->device_ = *std::move(device);
  ASSIGN_OR_RETURN(worker->groups_, CreateProcessGroups(control, topology, *worker->device_));
  RETURN_IF_ERROR(control.Agree(worker->LoadShard(model_dir)));
  return worker;
}

absl::Status Worker::LoadShard(const std::string& model_dir) {
  WorkerOptions& o = options_;
  if (!o.dtype) o.dtype = config_.dtype;
  if (o.max_model_len == 0) o.max_model_len = config_.max_positions;
  if (o.max_model_len > config_.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("--max-model-len ", o.max_model_len,
                                                   ": the model has ", config_.max_positions,
                                                   " positions (max_position_embeddings)"));
  }
  if (o.max_logit_rows == 0) o.max_logit_rows = o.max_num_seqs;
  const int64_t pages_per_sequence = (o.max_model_len + o.page_size - 1) / o.page_size;
  if (o.num_pages == 0) o.num_pages = o.max_num_seqs * pages_per_sequence;

  ASSIGN_OR_RETURN(stream_, device_->NewStream());
  ASSIGN_OR_RETURN(std::unique_ptr<WeightLoader> loader, WeightLoader::Open(model_dir));
  ASSIGN_OR_RETURN(decoder_, Decoder::Load(config_, groups_, *loader, *stream_,
                                           {.dtype = *o.dtype,
                                            .max_batch_tokens = o.max_num_batched_tokens,
                                            .max_logit_rows = o.max_logit_rows,
                                            .max_positions = o.max_model_len,
                                            .progress = o.progress}));
  o.progress = nullptr;
  checkpoint_bytes_read_ = loader->bytes_read();
  ASSIGN_OR_RETURN(kv_, KvCache::Create(*device_, {.layers = decoder_->layers().size(),
                                                   .pages = o.num_pages,
                                                   .page_size = o.page_size,
                                                   .kv_heads = decoder_->kv_heads(),
                                                   .head_dim = config_.head_dim,
                                                   .dtype = *o.dtype}));
  ASSIGN_OR_RETURN(batches_,
                   BatchBuilder::Create(*device_, {.max_num_seqs = o.max_num_seqs,
                                                   .max_batch_tokens = o.max_num_batched_tokens,
                                                   .max_pages_per_sequence = pages_per_sequence,
                                                   .page_size = o.page_size}));
  hidden_.resize(groups_.last_stage() ? 1 : 2);
  for (HiddenBuffer& buffer : hidden_) {
    ASSIGN_OR_RETURN(buffer.data, Tensor::Create(*device_, *o.dtype,
                                                 {o.max_num_batched_tokens, config_.hidden_size}));
  }
  if (groups_.last_stage()) {
    sampler_.emplace(groups_.tp.get(), decoder_->vocabulary(), config_.vocab_size);
    ASSIGN_OR_RETURN(logits_, Tensor::Create(*device_, DType::kF32,
                                             {o.max_logit_rows, decoder_->vocabulary().size()}));
  }
  return absl::OkStatus();
}

TensorView Worker::ReceiveOrEmbed(const Batch& batch) {
  HiddenBuffer& buffer = hidden_[next_hidden_];
  const TensorView hidden = buffer.data.view().Rows(0, batch.tokens());
  if (buffer.send_ticket >= 0) groups_.pp->WaitSend(*stream_, buffer.send_ticket);
  buffer.send_ticket = -1;
  if (groups_.first_stage()) {
    const Timer timer(op_seconds_);
    decoder_->Embed(*stream_, batch, hidden);
  } else {
    groups_.pp->Recv(*stream_, hidden, groups_.pp->rank() - 1);
  }
  return hidden;
}

std::optional<StepResult> Worker::Execute(const StepPlan& plan) {
  const Batch batch = batches_->Build(*stream_, plan);
  const TensorView hidden = ReceiveOrEmbed(batch);
  {
    const Timer timer(op_seconds_);
    decoder_->Forward(*stream_, batch, kv_, hidden);
  }
  if (!groups_.last_stage()) {
    hidden_[next_hidden_].send_ticket = groups_.pp->Send(*stream_, hidden, groups_.pp->rank() + 1);
    next_hidden_ = (next_hidden_ + 1) % hidden_.size();
    return std::nullopt;
  }
  if (batch.logit_count() == 0) return StepResult{.step = plan.step};
  CHECK_LE(batch.logit_count(), options_.max_logit_rows);
  const TensorView logits = logits_.view().Rows(0, batch.logit_count());
  {
    const Timer timer(op_seconds_);
    decoder_->Logits(*stream_, batch, hidden, logits);
    const absl::Status status = stream_->Synchronize();
    CHECK(status.ok()) << status.ToString();
  }
  return SampleRows(plan, batch, logits);
}

StepResult Worker::SampleRows(const StepPlan& plan, const Batch& batch, TensorView logits) {
  StepResult result{.step = plan.step};
  std::vector<SampleRow> rows;
  bool evaluation = false;  // plans that ask for all logits hold nothing else
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.logit_rows == LogitRows::kLast) {
      const SequenceState& sequence = batches_->sequence(chunk.slot);
      rows.push_back({&sequence.info.sampling, sequence.tokens, sequence.info.prompt_tokens});
    }
    if (chunk.logit_rows == LogitRows::kAll) evaluation = true;
  }
  CHECK(rows.empty() || !evaluation) << "sampling and evaluation in one step";
  if (!rows.empty()) {
    auto sampled =
        sampler_->Sample(*stream_, logits.Rows(0, static_cast<int64_t>(rows.size())), rows);
    if (sampled.ok()) {
      result.sampled = *std::move(sampled);
    } else {
      result.error = std::string(sampled.status().message());
    }
  } else {
    result.logits = CollectLogits(logits.Rows(0, batch.logit_count()));
  }
  return result;
}

// [rows, V]: the shards' columns side by side. Shards differ by at most one column, so they are
// padded to the widest.
std::vector<float> Worker::CollectLogits(TensorView logits) {
  const int parts = groups_.tp->size();
  const int64_t rows = logits.dim(0), vocabulary = config_.vocab_size;
  const WeightSpec head = WeightSpecsOf(config_).head;
  const int64_t widest = PieceOfSpec(head, 0, parts).size();
  std::vector<float> mine(rows * widest), all(rows * widest * parts);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits.row<float>(r);
    std::copy(row, row + logits.dim(1), mine.begin() + r * widest);
  }
  groups_.tp->AllGather(*stream_, ConstTensorView(mine.data(), DType::kF32, {rows * widest}),
                        TensorView(all.data(), DType::kF32, {rows * widest * parts}));
  CHECK(stream_->Synchronize().ok());
  std::vector<float> out(rows * vocabulary);
  for (int part = 0; part < parts; ++part) {
    const Range piece = PieceOfSpec(head, part, parts);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = all.data() + (part * rows + r) * widest;
      std::copy(row, row + piece.size(), out.begin() + r * vocabulary + piece.begin);
    }
  }
  return out;
}

absl::Status Worker::Run() {
  CHECK_NE(control_->rank(), leader());
  while (true) {
    const StepPlan plan = ParseStepPlan(control_->Receive(leader(), kPlanChannel));
    if (plan.stop) break;
    const std::optional<StepResult> result = Execute(plan);
    if (result && control_->rank() == result_rank())
      control_->Send(leader(), kResultChannel, Serialize(*result));
  }
  for (HiddenBuffer& buffer : hidden_) {
    if (buffer.send_ticket >= 0) groups_.pp->WaitSend(*stream_, buffer.send_ticket);
    buffer.send_ticket = -1;
  }
  control_->FlushSends();
  return stream_->Synchronize();
}

}  // namespace trireme
