// What a worker plans to hold on its device, and holds.

#include <algorithm>
#include <limits>
#include <string>

#include "kernels/status.h"
#include "runtime/worker.h"

namespace trireme {

LedgerOptions LedgerOptionsOf(const WorkerOptions& options, DType dtype) {
  return {.dtype = dtype,
          .quantization = options.quantization,
          .max_model_len = options.max_model_len,
          .max_num_seqs = options.max_num_seqs,
          .max_num_batched_tokens = options.max_num_batched_tokens,
          .max_logit_rows = options.max_logit_rows,
          .page_size = options.page_size,
          .num_pages = options.num_pages,
          .pp_split = options.pp_split,
          .cublas_lt = options.device.cublas_lt};
}

LedgerOptions Worker::ledger_options() const {
  LedgerOptions options = LedgerOptionsOf(options_, *options_.dtype);
  options.host_memory = device_->spec().host_memory;
  options.spans_hosts = groups_.tp->spans_hosts();
  return options;
}

absl::Status Worker::SizePool() {
  WorkerOptions& o = options_;
  if (o.num_pages > 0 && o.memory_limit == 0) return absl::OkStatus();
  const DeviceSpec& spec = device_->spec();
  // The rest is for what is planned by nobody: the program itself, libraries, other processes.
  const int64_t sharing = spec.host_memory || o.device.allow_shared ? control_->local_size() : 1;
  constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();
  int64_t own = o.memory_limit;
  if (own == 0) own = spec.memory_bytes > 0 ? spec.memory_bytes / sharing * 9 / 10 : kUnknown;
  // What no plan knows.
  int64_t taken = decoder_ == nullptr ? 0 : decoder_->workspace_bytes();
  if (!spec.host_memory) taken += communicator_bytes();
  int64_t limit = kUnknown, most_taken = 0;
  for (const std::string& bytes : control_->AllGather(std::to_string(own)))
    limit = std::min<int64_t>(limit, std::stoll(bytes));
  for (const std::string& bytes : control_->AllGather(std::to_string(taken)))
    most_taken = std::max<int64_t>(most_taken, std::stoll(bytes));
  if (o.num_pages == 0) o.num_pages = o.most_pages();
  ASSIGN_OR_RETURN(const int64_t fit, PagesWithinLimit(config_, groups_.topology, ledger_options(),
                                                       limit, most_taken));
  o.num_pages = std::min(o.num_pages, fit);
  return absl::OkStatus();
}

absl::Status Worker::ReserveSums() {
  const int64_t bytes = LargestSumBytes(config_, ledger_options());
  const int64_t allocated_before = device_->allocated_bytes();
  RETURN_IF_ERROR(control_->Agree(WithLedger(groups_.tp->Reserve(bytes))));
  groups_.tp->ChooseSums(bytes);
  communicator_allocated_bytes_ = device_->allocated_bytes() - allocated_before;
  return absl::OkStatus();
}

int64_t Worker::communicator_bytes() const {
  return groups_.tp->buffer_bytes() + groups_.pp->buffer_bytes();
}

absl::Status Worker::WithLedger(const absl::Status& status) const {
  return WithTable(status, control_->rank(), control_->host(), "holds at the most",
                   LedgerTable(planned_ledger(), nullptr));
}

Ledger Worker::planned_ledger() const {
  Ledger planned = PlanLedgers(config_, groups_.topology, ledger_options())[groups_.rank];
  // What the device's kernels, NCCL's sums and captures ask for; not known before they are loaded.
  if (decoder_ != nullptr) planned[Owner::kWorkspace] = decoder_->workspace_bytes();
  if (!device_->spec().host_memory) planned[Owner::kCommunicator] = communicator_bytes();
  planned[Owner::kGraphs] = graphs_.stats().bytes;
  return planned;
}

Ledger Worker::measured_ledger() const {
  Ledger held;
  held[Owner::kWeights] = decoder_->weight_bytes();
  held[Owner::kKvCache] = kv_.bytes();
  held[Owner::kActivations] = decoder_->activation_bytes() + logits_.bytes();
  for (const HiddenBuffer& buffer : hidden_) held[Owner::kActivations] += buffer.data.bytes();
  held[Owner::kWorkspace] = decoder_->workspace_bytes();
  held[Owner::kBatch] = batches_->device_bytes() + (sampler_ ? sampler_->device_bytes() : 0);
  held[Owner::kCommunicator] = communicator_bytes();
  held[Owner::kGraphs] = graphs_.stats().bytes;
  AccountFor(allocated_bytes_, &held);
  return held;
}

}  // namespace trireme
