// One rank's part of every step: builds the batch, runs its pipeline stage, and on the last stage
// samples. The leader of a replica (its first rank) drives its own Worker through the Engine; every
// other rank sits in Run(). One thread.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "models/decoder.h"
#include "parallel/control_plane.h"
#include "parallel/process_groups.h"
#include "runtime/batch_builder.h"
#include "runtime/graph_cache.h"
#include "runtime/ledger.h"
#include "runtime/sampler.h"
#include "runtime/step.h"

namespace trireme {

struct WorkerOptions {
  DeviceOptions device{};
  ProcessGroupOptions groups{};
  std::optional<DType>
      dtype{};  // of weights, activations and KV cache; the checkpoint's own when empty
  Quantization quantization = Quantization::kNone;
  int64_t max_model_len = 0;             // tokens of a sequence; 0 = the model's own limit
  int64_t max_num_seqs = 64;             // sequences running at once
  int64_t max_num_batched_tokens = 512;  // tokens of a micro-batch
  int64_t page_size = 16;                // tokens of a KV page
  int64_t num_pages = 0;     // 0 = room for max_num_seqs sequences of max_model_len, if it fits
  int64_t memory_limit = 0;  // bytes of a rank in all; what the tightest rank has left over is what
                             // KV pages may take; 0 = nine tenths of the device's memory where
                             // num_pages is 0, none where it is given
  int64_t max_logit_rows = 0;       // 0 = max_num_seqs
  std::vector<int64_t> pp_split{};  // layers of each stage; empty = balanced
  bool graphs = true;  // capture decode steps at start-up, where the device can, and replay them
  std::function<void(int64_t bytes, int64_t total)> progress{};
  // Takes a line about what is slower than it might be, with the ledger's behind it where memory is
  // why; of one rank for all. May be empty.
  std::function<void(const std::string& line)> warn{};
  // Opens the device; empty: OpenDevice.
  std::function<absl::StatusOr<std::unique_ptr<Device>>(const DeviceOptions&)> open_device{};
  // Puts a communicator before that of tensor parallelism; empty: none.
  std::function<std::unique_ptr<Communicator>(std::unique_ptr<Communicator>)> wrap_tp{};

  // KV pages of the longest sequence, and of max_num_seqs of them. REQUIRES: max_model_len is not
  // 0.
  int64_t pages_per_sequence() const { return (max_model_len + page_size - 1) / page_size; }
  int64_t most_pages() const { return max_num_seqs * pages_per_sequence(); }
  PlanBounds plan_bounds() const {
    return {.max_num_seqs = max_num_seqs,
            .max_num_batched_tokens = max_num_batched_tokens,
            .max_model_len = max_model_len,
            .page_size = page_size};
  }
};

LedgerOptions LedgerOptionsOf(const WorkerOptions& options, DType dtype);

class Worker {
 public:
  // Collective over all ranks: loads this rank's shard. When any rank fails, all ranks return that
  // error.
  static absl::StatusOr<std::unique_ptr<Worker>> Load(ControlPlane& control,
                                                      const Topology& topology,
                                                      const std::string& model_dir,
                                                      WorkerOptions options);
  ~Worker();

  // Says what this rank is about to do. Aborted when another rank has failed: nothing more can be
  // done.
  absl::Status Begin(const StepPlan& plan);
  // Runs this rank's stage of the plan, which was begun. True on the last stage: then the result is
  // there (the same on all its ranks), in memory that is used again; and on any whose device has
  // failed, with the result's error. Nothing else is allocated after the first steps.
  bool Execute(const StepPlan& plan, StepResult* result);
  // Executes the leader's plans until one says stop.
  absl::Status Run();

  const ModelConfig& config() const { return config_; }
  const WorkerOptions& options() const { return options_; }  // with every 0 resolved
  const ProcessGroups& groups() const { return groups_; }
  ControlPlane& control() const { return *control_; }
  Stream& stream() const { return *stream_; }
  int leader() const;       // this replica's first rank
  int result_rank() const;  // the rank that reports results to the leader
  // What this rank planned to hold on its device, and holds.
  Ledger planned_ledger() const;
  Ledger measured_ledger() const;
  int64_t weight_bytes() const { return decoder_->weight_bytes(); }
  int64_t kv_bytes() const { return kv_.bytes(); }
  int64_t checkpoint_bytes_read() const { return checkpoint_bytes_read_; }
  DType dtype() const { return *options_.dtype; }
  // Spent in the model's and the sampler's ops so far, the sums over tensor-parallel ranks
  // included: what is left of a step's time is the cost of everything around them.
  double op_seconds() const { return op_seconds_ + (sampler_ ? sampler_->op_seconds() : 0.0); }
  // Spent in communicators so far, those sums included.
  double communication_seconds() const { return communication_seconds_; }
  // Of this rank's steps so far. The thread that executes.
  const GraphStats& graph_stats() const { return graphs_.stats(); }
  std::string DescribeSums() const { return groups_.tp->DescribeSums(); }  // of tensor parallelism

 private:
  explicit Worker(ControlPlane& control) : control_(&control) {}
  // What is 0 in the options, but for num_pages.
  absl::Status ResolveOptions();
  // num_pages, by the memory of all ranks; once the decoder is loaded also by what kernels and a
  // GPU's communicators have taken. Collective.
  absl::Status SizePool();
  // Memory for the sums of tensor-parallel ranks, and how they travel. Collective.
  absl::Status ReserveSums();
  // The maxima of the whole rows of layers that tensor parallelism cuts within their rows, where
  // quantisation needs them. Collective.
  absl::StatusOr<std::vector<float>> GatherRowMaxima(WeightLoader& loader);
  absl::Status LoadDecoder(WeightLoader& loader, std::vector<float> row_maxima);
  absl::Status CreateBuffers();
  LedgerOptions ledger_options() const;
  // Out of memory: the same with what this rank has planned.
  absl::Status WithLedger(const absl::Status& status) const;
  int64_t communicator_bytes() const;
  // Captures the decode steps of all sizes; worker_graphs.cc.
  absl::Status CaptureGraphs();
  // Warns of steps that could not be captured. Collective.
  void TellOfGraphs() const;
  void FillTrial(int64_t sequences, int round, Batch* batch, TensorView hidden);
  // The questions of a trial to the sampler. Last stage only.
  void PrepareTrial(int64_t sequences, int round);
  // REQUIRES: IsDecodeStep(plan).
  GraphKey KeyOf(const StepPlan& plan) const;
  bool OnAllRanksOfGroup(bool here);
  bool RunStage(const StepPlan& plan, StepResult* result);
  TensorView ReceiveHidden(const Batch& batch, int64_t tokens);
  // What the last stage computes behind its layers: nothing yet, logits, or also the device's part
  // of what the sampler has prepared.
  enum class Ending : uint8_t { kHidden, kLogits, kSampled };
  // All of this stage that is neither sent nor received: what a graph holds.
  void Compute(const Batch& batch, TensorView hidden, Ending ending);
  // The rows that are sampled, into rows_. False where the plan asks for hidden states instead.
  bool CollectRows(const StepPlan& plan);
  void SampleRows(const Batch& batch, bool prepared, StepResult* result);
  absl::StatusOr<std::vector<float>> CollectLogits(TensorView logits);
  absl::StatusOr<std::vector<float>> CollectHidden(const Batch& batch, ConstTensorView hidden);
  void RememberSampled(const StepPlan& plan, const StepResult& result);

  ControlPlane* control_;
  WorkerOptions options_;
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  ProcessGroups groups_;
  std::unique_ptr<Decoder> decoder_;
  KvCache kv_;
  std::optional<BatchBuilder> batches_;
  std::optional<Sampler> sampler_;
  std::vector<SampleRow> rows_;  // of the step
  // The residual stream of the micro-batches in flight: a stage computes into one buffer while the
  // other is being sent.
  struct HiddenBuffer {
    Tensor data;  // [max_num_batched_tokens, H]
    int64_t send_ticket = -1;
  };
  std::vector<HiddenBuffer> hidden_;
  size_t next_hidden_ = 0;
  Tensor logits_;  // [max_logit_rows, V / tp] f32
  int64_t checkpoint_bytes_read_ = 0;
  int64_t allocated_bytes_ = 0;               // on the device, by loading and capturing
  int64_t communicator_allocated_bytes_ = 0;  // on the device, by reserving sums; not of the above
  double op_seconds_ = 0.0;
  double communication_seconds_ = 0.0;
  std::vector<int64_t> buckets_;  // sequences that decode steps are padded to
  GraphCache graphs_;             // last: gone before all that its graphs hold the addresses of
};

// Channels of the control plane's point-to-point messages.
inline constexpr int kPlanChannel = 1;
inline constexpr int kResultChannel = 2;
inline constexpr int kCompletionChannel = 3;

}  // namespace trireme
