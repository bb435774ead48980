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
#include "runtime/sampler.h"
#include "runtime/step.h"

namespace trireme {

struct WorkerOptions {
  DeviceOptions device;
  std::optional<DType>
      dtype;  // of weights, activations and KV cache; the checkpoint's own when empty
  int64_t max_model_len = 0;             // tokens of a sequence; 0 = the model's own limit
  int64_t max_num_seqs = 64;             // sequences running at once
  int64_t max_num_batched_tokens = 512;  // tokens of a micro-batch
  int64_t page_size = 16;                // tokens of a KV page
  int64_t num_pages = 0;                 // 0 = room for max_num_seqs sequences of max_model_len
  int64_t max_logit_rows = 0;            // 0 = max_num_seqs
  std::function<void(int64_t bytes, int64_t total)> progress;
};

class Worker {
 public:
  // Collective over all ranks: loads this rank's shard. When any rank fails, all ranks return that
  // error.
  static absl::StatusOr<std::unique_ptr<Worker>> Load(ControlPlane& control,
                                                      const Topology& topology,
                                                      const std::string& model_dir,
                                                      WorkerOptions options);
  ~Worker();

  // Runs this rank's stage of the plan. On the last stage gives the result (the same on all its
  // ranks).
  std::optional<StepResult> Execute(const StepPlan& plan);
  // Executes the leader's plans until one says stop.
  absl::Status Run();

  const ModelConfig& config() const { return config_; }
  const WorkerOptions& options() const { return options_; }  // with every 0 resolved
  const ProcessGroups& groups() const { return groups_; }
  ControlPlane& control() const { return *control_; }
  Stream& stream() const { return *stream_; }
  int leader() const;       // this replica's first rank
  int result_rank() const;  // the rank that reports results to the leader
  int64_t weight_bytes() const { return decoder_->weight_bytes(); }
  int64_t kv_bytes() const { return kv_.bytes(); }
  int64_t checkpoint_bytes_read() const { return checkpoint_bytes_read_; }
  DType dtype() const { return *options_.dtype; }
  // Spent in the model's ops so far, the sums over tensor-parallel ranks included: what is left of
  // a step's time is the cost of everything around them.
  double op_seconds() const { return op_seconds_; }

 private:
  explicit Worker(ControlPlane& control) : control_(&control) {}
  absl::Status LoadShard(const std::string& model_dir);
  TensorView ReceiveOrEmbed(const Batch& batch);
  StepResult SampleRows(const StepPlan& plan, const Batch& batch, TensorView logits);
  std::vector<float> CollectLogits(TensorView logits);

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
  double op_seconds_ = 0.0;
};

// Channels of the control plane's point-to-point messages.
inline constexpr int kPlanChannel = 1;
inline constexpr int kResultChannel = 2;
inline constexpr int kCompletionChannel = 3;

}  // namespace trireme
