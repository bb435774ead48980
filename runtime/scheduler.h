// Decides which tokens of which requests go into the next micro-batch. Pure host logic: no device,
// MPI, clock or randomness; the same calls give the same plans. Single-threaded. What a request
// needs is allocated by Add, what a plan needs at its first Next: after that Next and Commit
// allocate nothing, but for log-probabilities and beyond kReservedTokens (step.h).
//
// Continuous batching (Yu et al., "Orca", OSDI 2022) over paged KV (Kwon et al., "PagedAttention",
// SOSP 2023) with chunked prefill (Agrawal et al., "Sarathi-Serve", OSDI 2024). A micro-batch takes
// the ready decodes first, then prompts, cut into chunks, up to the token budget. Nothing is
// reserved: a chunk takes the pages it needs. When they run out, the sequence that comes last by
// priority and age gives its pages back and waits, to be computed again; what it has sampled stays.
// A sequence whose last possible token is in flight gives its place to the next one at once.
//
// With pipeline parallelism the running sequences are dealt into `micro_batches` groups that are in
// flight on all stages at once. A sequence has one sampling step in flight, or two where the ranks
// sample themselves what the second one computes (`lookahead`); chunks of a prompt may follow each
// other through the pipeline, since stages work in plan order. For the same reason a page may be
// given to somebody else while a step that reads it is in flight.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "runtime/prefix_cache.h"
#include "runtime/request.h"
#include "runtime/sequence.h"
#include "runtime/step.h"

namespace trireme {

// When a waiting request may start: as soon as there is room; or with a whole batch, which ends
// before the next one begins, and is waited for for ever (static) or for a while (dynamic). The
// latter two are there to be compared with.
enum class BatchPolicy : uint8_t { kContinuous, kDynamic, kStatic };

struct SchedulerOptions {
  int64_t max_num_seqs = 64;             // sequences running at once
  int64_t max_num_batched_tokens = 512;  // tokens of a micro-batch
  int64_t micro_batches = 1;             // in flight at once: the pipeline's stages
  int64_t page_size = 16;                // tokens
  int64_t num_pages = 0;
  int64_t max_model_len = 0;   // tokens of prompt and output together
  int64_t sliding_window = 0;  // keys a query sees in every layer, itself included; 0 = all
  int64_t lookahead = 0;       // 1: plan a token while the step that samples its input is in flight
  bool prefix_cache = true;    // share full pages of equal beginnings
  int64_t ageing_steps = 64;   // steps of waiting that make up for one priority
  BatchPolicy policy = BatchPolicy::kContinuous;
  int64_t batch_window_us = 10'000;  // kDynamic: how long the first request waits for company
};

// One committed token of one sample, or its end without one (then sampled.token is -1): with
// kError its logits were no finite numbers.
struct TokenEvent {
  uint64_t request_id = 0;
  int32_t sample = 0;
  SampledToken sampled{};
  FinishReason finish = FinishReason::kNone;
};

struct SchedulerStats {
  int64_t preemptions = 0;
  int64_t prompt_tokens = 0;  // of admitted sequences, and how many of them
  int64_t cached_tokens = 0;  // were found computed, in the cache or at another sample
  int64_t page_copies = 0;
  // The token slots of a step: what it computes, and what it leaves empty although somebody waits
  // for it. With prompt tokens in it a step has its whole budget; without, one for each sequence
  // that may run. A step that has used up either has nothing left to give.
  int64_t computed_tokens = 0;
  int64_t idle_slots = 0;
  int64_t wasted_tokens = 0;  // of those computed: again after a preemption, or for who was over
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();

  // InvalidArgument when the request can never run; the line names the limit. AlreadyExists for a
  // duplicate id.
  absl::Status Add(Request request);
  // What Add says of a request for itself. Any thread.
  absl::Status Check(const Request& request) const;
  // Ends a request, or one of its samples, now. NotFound for an unknown id.
  absl::Status Cancel(uint64_t request_id);
  absl::Status Cancel(uint64_t request_id, int32_t sample);
  // Tells the time; requests whose deadline has passed end and are appended to `events`.
  void AdvanceTime(int64_t now_us, std::vector<TokenEvent>* events);
  // No more requests come: nobody waits for company.
  void Drain() { draining_ = true; }

  // The next micro-batch, into `plan`. False, and an empty plan, when nothing can be scheduled
  // before a Commit, an Add, or, with kDynamic, a later time.
  bool Next(StepPlan* plan);
  // The samples that the plan of the last Next begins with, by request id, preempted ones included.
  const std::vector<uint64_t>& admitted() const { return admitted_; }
  // The time at which AdvanceTime would change something: the first deadline, the end of the wait
  // for company. INT64_MAX when there is none.
  int64_t NextTime() const;
  // Takes back the oldest plan in flight; appends what it brought to `events`. The only place where
  // a request's state advances. A sample that got no token ends, and what it has computed is not
  // found by others, unless it was its last possible one: then its pages are others' already.
  void Commit(const StepPlan& plan, const StepResult& result, std::vector<TokenEvent>* events);

  bool idle() const { return waiting_.empty() && running() == 0; }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t running() const { return static_cast<int64_t>(running_.size()) + ending_; }
  int64_t free_pages() const { return cache_.free_pages(); }  // kept ones included
  int64_t kept_pages() const { return cache_.pages().kept_pages(); }
  const SchedulerStats& stats() const { return stats_; }
  const SchedulerOptions& options() const { return options_; }

 private:
  struct ByKey {
    bool operator()(const Sequence* a, const Sequence* b) const { return a->Key() < b->Key(); }
  };
  // A chunk in flight, by the sequence's number at the time: it may be over when the chunk is.
  struct Planned {
    Sequence* sequence;
    uint64_t number;
  };
  struct InFlight {
    int64_t step = 0;
    std::vector<Planned> chunks;
  };

  int64_t PagesFor(int64_t tokens) const {
    return (tokens + options_.page_size - 1) / options_.page_size;
  }
  Sequence* NewSequenceObject();
  void Wait(Sequence* sequence);
  void WaitNoMore(Sequence* sequence);
  // scheduler.cc: ending.
  void End(Sequence* sequence);
  void ReleasePages(Sequence* sequence);
  void LeaveRunning(Sequence* sequence);
  void ReleaseEnding();
  void CachePages(Sequence* sequence);
  void ForgetPages(const Sequence& sequence);
  // schedule_plan.cc: what Next does.
  void AddDecodes(StepPlan* plan);
  void AddPrefills(StepPlan* plan);
  void AddWaiting(StepPlan* plan);
  bool OpenBatch();
  bool Admit(Sequence* sequence, StepPlan* plan);
  void DropPages(Sequence* sequence);
  bool WaitsForParent(const Sequence& sequence) const;
  bool Fork(Sequence* sequence);
  int64_t GroupSize() const;
  int64_t SparePages() const;
  int64_t CopiesFor(const Sequence& sequence) const;
  int64_t TokensThatFit(const Sequence& sequence, int64_t spare_pages) const;
  bool MakeRoom(Sequence* sequence, int64_t pages);
  void Preempt(Sequence* sequence);
  void AddChunk(Sequence* sequence, int64_t tokens, StepPlan* plan);
  int64_t IdleSlots(const StepPlan& plan) const;
  bool Full(const StepPlan& plan) const {
    return budget_ == 0 || static_cast<int64_t>(plan.chunks.size()) >= group_;
  }

  SchedulerOptions options_;
  PrefixCache cache_;
  SchedulerStats stats_;
  int64_t now_us_ = 0;
  int64_t next_step_ = 0;
  uint64_t next_number_ = 1;
  bool draining_ = false;
  // Objects never move and are used again. Many in one piece of memory: each on a page of its own
  // would cost a look-up of the page's address at every look.
  static constexpr size_t kSlab = 256;
  std::vector<std::unique_ptr<Sequence[]>> slabs_;
  std::vector<Sequence*> unused_;  // a stack
  std::set<Sequence*, ByKey> waiting_;
  // Of waiting_, at least as many as run: whoever is preempted has one.
  std::vector<std::set<Sequence*, ByKey>::node_type> spare_nodes_;
  std::vector<Sequence*> running_;                               // in order of admission
  int64_t ending_ = 0;                                           // sequences in kEnding
  std::vector<int32_t> free_slots_;                              // a stack
  absl::flat_hash_map<uint64_t, std::vector<Sequence*>> by_id_;  // by sample; null when over
  int64_t with_deadline_ = 0;                                    // open sequences that have one
  std::vector<InFlight> in_flight_;  // the oldest first; a handful at most
  std::vector<InFlight> spare_in_flight_;
  // Of the plan being made.
  int64_t budget_ = 0, group_ = 0;
  int64_t held_back_ = 0;          // tokens of running sequences that got no pages
  size_t first_decode_ = 0;        // in running_: where a full micro-batch stopped
  bool preempted_ = false;         // by this plan: then nobody is admitted
  int64_t batch_left_ = 0;         // kStatic, kDynamic: places of the open batch
  bool prefills_left_ = false;     // some running sequence has prompt to compute
  std::vector<Planned> order_;     // the sequences of its chunks
  std::vector<Sequence*> passes_;  // running_ as it was when the pass began
  std::vector<uint64_t> admitted_;
  std::vector<TokenId> chunk_tokens_;
  std::vector<int32_t> chunk_pages_;
};

}  // namespace trireme
