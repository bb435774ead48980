// Decides which tokens of which requests go into the next micro-batch. Pure host logic: no device,
// MPI, clock or randomness; the same calls give the same plans. Single-threaded.
//
// First come, first served. A request is admitted when a sequence slot and the pages for its
// longest possible length are free, so an admitted request always finishes. A micro-batch takes the
// ready decodes first, then prefill chunks, up to the token budget. With pipeline parallelism the
// running sequences are dealt into `micro_batches` groups that are in flight on all stages at once.
// A sequence has at most one sampling step in flight; consecutive prefill chunks of a prompt may
// follow each other through the pipeline, since stages work in plan order.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "runtime/page_allocator.h"
#include "runtime/request.h"
#include "runtime/step.h"

namespace trireme {

struct SchedulerOptions {
  int64_t max_num_seqs = 64;             // sequences running at once
  int64_t max_num_batched_tokens = 512;  // tokens of a micro-batch
  int64_t micro_batches = 1;             // in flight at once: the pipeline's stages
  int64_t page_size = 16;                // tokens
  int64_t num_pages = 0;
  int64_t max_model_len = 0;  // tokens of prompt and output together
};

// One committed token of one request.
struct TokenEvent {
  uint64_t request_id = 0;
  SampledToken sampled{};
  FinishReason finish = FinishReason::kNone;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();

  // InvalidArgument when the request can never run; the line names the limit. AlreadyExists for a
  // duplicate id.
  absl::Status Add(Request request);
  // Ends a request early; its pages are free once nothing of it is in flight. NotFound for an
  // unknown id.
  absl::Status Cancel(uint64_t request_id);
  // The next micro-batch; empty when nothing can be scheduled before a Commit or an Add.
  StepPlan Next();
  // Takes back the oldest plan in flight. The only place where a request's state advances.
  std::vector<TokenEvent> Commit(const StepPlan& plan, const StepResult& result);

  bool idle() const { return waiting_.empty() && running_.empty(); }
  int64_t free_pages() const { return pages_.free_pages(); }

 private:
  struct Sequence;
  bool Admit(StepPlan& plan);
  void AddDecodes(StepPlan& plan, int64_t& budget, int64_t limit);
  void AddPrefills(StepPlan& plan, int64_t& budget, int64_t limit);
  Chunk MakeChunk(Sequence& sequence, int64_t tokens);
  int64_t MaxLength(const Request& request) const;
  int64_t PagesFor(int64_t tokens) const;
  void RemoveIfDone(Sequence* sequence);

  SchedulerOptions options_;
  PageAllocator pages_;
  int64_t reserved_pages_ = 0;  // promised to running sequences, allocated or not
  int64_t next_step_ = 0;
  std::deque<Request> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::vector<Sequence*> by_slot_;
  absl::flat_hash_map<uint64_t, Sequence*> by_id_;  // null while waiting
};

}  // namespace trireme
