#include "runtime/worker.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "kernels/trace.h"
#include "models/float_convert.h"
#include "models/memory_plan.h"
#include "parallel/timed_communicator.h"
#include "runtime/decode_graphs.h"
#include "runtime/timer.h"

namespace trireme {
namespace {

absl::Status CheckTakenBy(const DeviceSpec& spec, const ModelConfig& config) {
  if (spec.max_head_dim == 0 || config.head_dim <= spec.max_head_dim) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("head_dim ", config.head_dim, ": ", spec.name,
                                                 " takes up to ", spec.max_head_dim,
                                                 "; use --device cpu"));
}

// The cache's sizes, once num_pages is known.
absl::Status CheckCacheTakenBy(const DeviceSpec& spec, const ModelConfig& config, int tp_size,
                               const WorkerOptions& o) {
  const auto reach = [&o](int64_t page) {
    return (o.max_model_len + page - 1) / page * page * page;
  };
  if (spec.max_page_reach > 0 && reach(o.page_size) > spec.max_page_reach) {
    int64_t taken = o.page_size;
    while (taken > 1 && reach(taken) > spec.max_page_reach) --taken;
    return absl::InvalidArgumentError(absl::StrCat("--page-size ", o.page_size, ": ", spec.name,
                                                   " takes up to ", taken, " with sequences of ",
                                                   o.max_model_len, " tokens (--max-model-len)"));
  }
  const int64_t page_rows = o.page_size * std::max<int64_t>(1, config.num_kv_heads / tp_size);
  if (spec.max_cache_rows > 0 && o.num_pages > spec.max_cache_rows / page_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("a KV cache of ", o.num_pages, " pages of ", o.page_size,
                     " tokens: ", spec.name, " takes up to ", spec.max_cache_rows / page_rows,
                     " pages; lower --kv-cache-memory, --max-num-seqs or --max-model-len"));
  }
  return absl::OkStatus();
}

void TakeInto(absl::StatusOr<std::vector<float>> values, std::vector<float>* out,
              StepResult* result) {
  if (values.ok()) {
    *out = *std::move(values);
  } else {
    result->error = std::string(values.status().message());
  }
}

}  // namespace

Worker::~Worker() {
  // Of a failed job messages are still under way, and read memory that would be freed here. The
  // detector is about to end the process.
  if (!control_->JobStatus().ok()) control_->detector()->WaitForEnd();
}

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
  if (status.ok()) status = CheckSplit(*config, topology.pp_size, worker->options_.pp_split);
  const auto& open_device = worker->options_.open_device;
  absl::StatusOr<std::unique_ptr<Device>> device =
      open_device ? open_device(worker->options_.device) : OpenDevice(worker->options_.device);
  if (status.ok()) status = device.status();
  if (status.ok()) status = CheckTakenBy((*device)->spec(), *config);
  // Groups are made collectively, so all ranks must have come this far.
  RETURN_IF_ERROR(control.Agree(status));
  worker->config_ = *std::move(config);
  worker->device_ = *std::move(device);
  ASSIGN_OR_RETURN(worker->groups_, CreateProcessGroups(control, topology, *worker->device_,
                                                        worker->options_.groups));
  if (const auto& wrap = worker->options_.wrap_tp; wrap)
    worker->groups_.tp = wrap(std::move(worker->groups_.tp));
  for (auto* group : {&worker->groups_.tp, &worker->groups_.host_tp, &worker->groups_.pp}) {
    if (*group != nullptr)
      *group = NewTimedCommunicator(std::move(*group), &worker->communication_seconds_);
  }
  RETURN_IF_ERROR(control.Agree(worker->ResolveOptions()));
  RETURN_IF_ERROR(control.Agree(worker->SizePool()));  // before weights are read in vain
  RETURN_IF_ERROR(control.Agree(CheckCacheTakenBy(worker->device_->spec(), worker->config_,
                                                  topology.tp_size, worker->options_)));
  absl::StatusOr<std::unique_ptr<WeightLoader>> loader = WeightLoader::Open(model_dir);
  RETURN_IF_ERROR(control.Agree(loader.status()));
  ASSIGN_OR_RETURN(std::vector<float> row_maxima, worker->GatherRowMaxima(**loader));
  RETURN_IF_ERROR(
      control.Agree(worker->WithLedger(worker->LoadDecoder(**loader, std::move(row_maxima)))));
  RETURN_IF_ERROR(worker->ReserveSums());
  RETURN_IF_ERROR(control.Agree(worker->SizePool()));
  RETURN_IF_ERROR(control.Agree(worker->WithLedger(worker->CreateBuffers())));
  const auto compare = [&worker] {
    return CompareLedgers(worker->planned_ledger(), worker->measured_ledger());
  };
  RETURN_IF_ERROR(control.Agree(compare()));
  RETURN_IF_ERROR(control.Agree(worker->WithLedger(worker->CaptureGraphs())));
  RETURN_IF_ERROR(control.Agree(compare()));  // with what capturing has taken
  worker->TellOfGraphs();
  return worker;
}

absl::Status Worker::ResolveOptions() {
  WorkerOptions& o = options_;
  if (!o.dtype) o.dtype = config_.dtype;
  if (o.max_model_len == 0) o.max_model_len = config_.max_positions;
  if (o.max_model_len > config_.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("--max-model-len ", o.max_model_len,
                                                   ": the model has ", config_.max_positions,
                                                   " positions (max_position_embeddings)"));
  }
  if (o.max_logit_rows == 0) o.max_logit_rows = o.max_num_seqs;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Worker::GatherRowMaxima(WeightLoader& loader) {
  const Topology& topology = groups_.topology;
  if (options_.quantization == Quantization::kNone || topology.tp_size == 1)
    return std::vector<float>();
  absl::StatusOr<std::vector<float>> mine =
      Decoder::RowMaxima(config_, groups_, loader, options_.pp_split);
  RETURN_IF_ERROR(control_->Agree(mine.status()));
  const std::vector<std::string> all = control_->AllGather(
      std::string(reinterpret_cast<const char*>(mine->data()), mine->size() * sizeof(float)));
  for (int tp = 0; tp < topology.tp_size; ++tp) {
    const std::string& theirs = all[topology.RankOf(groups_.dp_index(), groups_.pp_index(), tp)];
    CHECK_EQ(theirs.size(), mine->size() * sizeof(float)) << "ranks of a stage hold its layers";
    for (size_t i = 0; i < mine->size(); ++i) {
      float maximum;
      std::memcpy(&maximum, theirs.data() + i * sizeof(float), sizeof(float));
      (*mine)[i] = std::max((*mine)[i], maximum);
    }
  }
  return mine;
}

absl::Status Worker::LoadDecoder(WeightLoader& loader, std::vector<float> row_maxima) {
  WorkerOptions& o = options_;
  ASSIGN_OR_RETURN(stream_, device_->NewStream());
  ASSIGN_OR_RETURN(decoder_, Decoder::Load(config_, groups_, loader, *stream_,
                                           {.dtype = *o.dtype,
                                            .quantization = o.quantization,
                                            .row_maxima = std::move(row_maxima),
                                            .max_batch_tokens = o.max_num_batched_tokens,
                                            .max_logit_rows = o.max_logit_rows,
                                            .max_sequences = o.max_num_seqs,
                                            .max_positions = o.max_model_len,
                                            .max_kv_len = o.pages_per_sequence() * o.page_size,
                                            .pp_split = o.pp_split,
                                            .progress = o.progress}));
  o.progress = nullptr;
  checkpoint_bytes_read_ = loader.bytes_read();
  return absl::OkStatus();
}

absl::Status Worker::CreateBuffers() {
  const WorkerOptions& o = options_;
  ASSIGN_OR_RETURN(kv_, KvCache::Create(*device_, {.layers = decoder_->layers().size(),
                                                   .pages = o.num_pages,
                                                   .page_size = o.page_size,
                                                   .kv_heads = decoder_->kv_heads(),
                                                   .head_dim = config_.head_dim,
                                                   .dtype = *o.dtype}));
  ASSIGN_OR_RETURN(batches_,
                   BatchBuilder::Create(*device_, {.max_num_seqs = o.max_num_seqs,
                                                   .max_batch_tokens = o.max_num_batched_tokens,
                                                   .max_pages_per_sequence = o.pages_per_sequence(),
                                                   .page_size = o.page_size}));
  hidden_.resize(groups_.last_stage() ? 1 : 2);
  for (HiddenBuffer& buffer : hidden_) {
    ASSIGN_OR_RETURN(buffer.data, Tensor::Create(*device_, *o.dtype,
                                                 {o.max_num_batched_tokens, config_.hidden_size}));
  }
  if (groups_.last_stage()) {
    sampler_.emplace(groups_.tp.get(), &groups_.tp_of_host(), decoder_->vocabulary(),
                     config_.vocab_size);
    ASSIGN_OR_RETURN(logits_, Tensor::Create(*device_, DType::kF32,
                                             {o.max_logit_rows, decoder_->vocabulary().size()}));
  }
  if (sampler_) {
    RETURN_IF_ERROR(
        sampler_->Reserve(*device_, o.max_logit_rows, std::min(o.max_model_len, kReservedTokens)));
  }
  allocated_bytes_ = device_->allocated_bytes() - communicator_allocated_bytes_;
  return absl::OkStatus();
}

// The first stage's buffer is only free again; Compute fills it. Rows behind those of the batch's
// `tokens` belong to padding: they hold what was there before.
TensorView Worker::ReceiveHidden(const Batch& batch, int64_t tokens) {
  HiddenBuffer& buffer = hidden_[next_hidden_];
  const TensorView hidden = buffer.data.view().Rows(0, batch.tokens());
  if (buffer.send_ticket >= 0) groups_.pp->WaitSend(*stream_, buffer.send_ticket);
  buffer.send_ticket = -1;
  if (!groups_.first_stage())
    groups_.pp->Recv(*stream_, hidden.Rows(0, tokens), groups_.pp->rank() - 1);
  return hidden;
}

void Worker::Compute(const Batch& batch, TensorView hidden, Ending ending) {
  if (groups_.first_stage()) decoder_->Embed(*stream_, batch, hidden);
  decoder_->Forward(*stream_, batch, kv_, hidden);
  if (!groups_.last_stage() || batch.logit_count() == 0) return;
  CHECK_LE(batch.logit_count(), options_.max_logit_rows);
  if (ending == Ending::kHidden) return;
  const TensorView logits = logits_.view().Rows(0, batch.logit_count());
  decoder_->Logits(*stream_, batch, hidden, logits);
  if (ending == Ending::kSampled) sampler_->Enqueue(*stream_, logits);
}

absl::Status Worker::Begin(const StepPlan& plan) {
  const bool decode = std::all_of(plan.chunks.begin(), plan.chunks.end(),
                                  [](const Chunk& chunk) { return chunk.decode; });
  return control_->BeginStep(decode ? Phase::kDecode : Phase::kPrefill, plan.step,
                             groups_.pp_index());
}

bool Worker::Execute(const StepPlan& plan, StepResult* result) {
  result->Clear();
  result->step = plan.step;
  const bool last = RunStage(plan, result);
  // A stage that waits for nothing hears of its device's faults here.
  if (const absl::Status fault = stream_->Fault(); !fault.ok() && result->error.empty())
    result->error = std::string(fault.message());
  control_->EndStep();
  return last || !result->error.empty();
}

bool Worker::RunStage(const StepPlan& plan, StepResult* result) {
  const TraceScope trace("step", plan.step);
  for (const PageCopy& copy : plan.page_copies) kv_.CopyPage(*stream_, copy.source, copy.target);
  const bool decode = IsDecodeStep(plan);
  const GraphKey key = decode ? KeyOf(plan) : GraphKey{};
  const bool replays = decode && graphs_.Holds(key);
  const Batch batch = batches_->Build(*stream_, plan, replays ? key.size : 0);
  Ending ending = replays ? Ending::kSampled : Ending::kLogits;
  if (sampler_ && !CollectRows(plan)) ending = Ending::kHidden;
  if (sampler_ && replays) sampler_->Prepare(*stream_, rows_, key.size);
  const TensorView hidden = ReceiveHidden(batch, plan.num_tokens());
  {
    const Timer timer(op_seconds_);
    const TraceScope forward("forward", plan.step);
    const auto compute = [&] { Compute(batch, hidden, ending); };
    if (decode) {
      graphs_.Run(*stream_, key, compute);
    } else {
      graphs_.RunEagerly(EagerReason::kPrompt, compute);
    }
  }
  if (!groups_.last_stage()) {
    hidden_[next_hidden_].send_ticket =
        groups_.pp->Send(*stream_, hidden.Rows(0, plan.num_tokens()), groups_.pp->rank() + 1);
    next_hidden_ = (next_hidden_ + 1) % hidden_.size();
    return false;
  }
  if (batch.logit_count() == 0) return true;
  if (ending == Ending::kHidden) {
    TakeInto(CollectHidden(batch, hidden), &result->hidden, result);
    return true;
  }
  const TraceScope sample("sample", plan.step);
  SampleRows(batch, replays, result);
  RememberSampled(plan, *result);
  return true;
}

// For the chunks of later steps that name these tokens by kSampledBefore. Where there is none, such
// a step may be on its way all the same, and any token will do: nobody takes its result.
void Worker::RememberSampled(const StepPlan& plan, const StepResult& result) {
  size_t next = 0;
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.logit_rows != LogitRows::kLast) continue;
    batches_->SetSampled(chunk.slot,
                         result.error.empty() ? std::max(0, result.sampled[next++].token) : 0);
  }
}

bool Worker::CollectRows(const StepPlan& plan) {
  rows_.clear();
  bool evaluation = false, states = false;  // plans that ask for those hold nothing else
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.logit_rows == LogitRows::kLast) {
      const SequenceState& sequence = batches_->sequence(chunk.slot);
      rows_.push_back({&sequence.info.sampling, sequence.tokens, sequence.info.prompt_tokens});
    }
    if (chunk.logit_rows == LogitRows::kAll) evaluation = true;
    if (chunk.logit_rows == LogitRows::kHidden) states = true;
  }
  CHECK((rows_.empty() ? 0 : 1) + (evaluation ? 1 : 0) + (states ? 1 : 0) <= 1)
      << "sampling, evaluation and hidden states in one step";
  return !states;
}

// What was prepared has been answered behind the logits.
void Worker::SampleRows(const Batch& batch, bool prepared, StepResult* result) {
  if (rows_.empty()) {
    TakeInto(CollectLogits(logits_.view().Rows(0, batch.logit_count())), &result->logits, result);
    return;
  }
  const TensorView logits = logits_.view().Rows(0, static_cast<int64_t>(rows_.size()));
  const absl::Status status = prepared
                                  ? sampler_->Finish(*stream_, logits, &result->sampled)
                                  : sampler_->Sample(*stream_, logits, rows_, &result->sampled);
  if (!status.ok()) result->error = std::string(status.message());
}

// [rows, V]: the shards' columns side by side. Shards differ by at most one column, so they are
// padded to the widest.
absl::StatusOr<std::vector<float>> Worker::CollectLogits(TensorView logits) {
  const int parts = groups_.tp->size();
  const int64_t rows = logits.dim(0), vocabulary = config_.vocab_size;
  const WeightSpec head = WeightSpecsOf(config_).head;
  const int64_t widest = PieceOfSpec(head, 0, parts).size();
  std::vector<float> mine(rows * widest), all(rows * widest * parts);
  for (int64_t r = 0; r < rows; ++r) {
    stream_->Copy(mine.data() + r * widest, logits.row<float>(r),
                  static_cast<size_t>(logits.dim(1)) * sizeof(float));
  }
  RETURN_IF_ERROR(stream_->Synchronize());
  groups_.tp_of_host().AllGather(*stream_,
                                 ConstTensorView(mine.data(), DType::kF32, {rows * widest}),
                                 TensorView(all.data(), DType::kF32, {rows * widest * parts}));
  RETURN_IF_ERROR(stream_->Synchronize());
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

// The same on all ranks of tensor parallelism.
absl::StatusOr<std::vector<float>> Worker::CollectHidden(const Batch& batch,
                                                         ConstTensorView hidden) {
  const ConstTensorView rows = decoder_->NormedRows(*stream_, batch, hidden);
  std::vector<char> bytes(rows.bytes());
  stream_->Copy(bytes.data(), rows.data, bytes.size());
  RETURN_IF_ERROR(stream_->Synchronize());
  std::vector<float> out(rows.elements());
  ConvertFloats(rows.dtype, bytes.data(), DType::kF32, out.data(), rows.elements());
  return out;
}

absl::Status Worker::Run() {
  CHECK_NE(control_->rank(), leader());
  StepPlan plan;
  StepResult result;
  std::string bytes;
  plan.Reserve(options_.plan_bounds());
  bytes.reserve(ReservedBytes(options_.plan_bounds()));
  while (true) {
    control_->Receive(leader(), kPlanChannel, &bytes);
    Parse(bytes, &plan);
    if (plan.stop) break;
    RETURN_IF_ERROR(Begin(plan));
    if (!Execute(plan, &result)) continue;
    if (control_->rank() != result_rank()) {
      // The ranks beside say the same of what all met; what this one met alone they wait for.
      if (!result.error.empty()) return absl::InternalError(result.error);
      continue;
    }
    Serialize(result, &bytes);
    control_->Send(leader(), kResultChannel, bytes);
  }
  for (HiddenBuffer& buffer : hidden_) {
    if (buffer.send_ticket >= 0) groups_.pp->WaitSend(*stream_, buffer.send_ticket);
    buffer.send_ticket = -1;
  }
  control_->FlushSends();
  return stream_->Synchronize();
}

}  // namespace trireme
