// What the ranks of a replica would do with the scheduler's plans, without a model: a page holds,
// for each position, a hash of all tokens up to it, and the next token is drawn from the last hash.
// A page shared wrongly, given away too early or copied too late, and a token lost or doubled, all
// show as a hash that is not the sequence's own.
#pragma once

#include <string>
#include <vector>

#include "runtime/scheduler.h"

namespace trireme {

class FakeRanks {
 public:
  explicit FakeRanks(const SchedulerOptions& options);

  // Runs a step at once; its result may be committed later.
  void Execute(const StepPlan& plan, StepResult* result);
  void Commit(const StepPlan& plan);  // REQUIRES: plans come in order
  // The first rule that was broken; empty as long as none was.
  const std::string& error() const { return error_; }

  // The tokens of one sample of a request that has the ranks to itself.
  static std::vector<TokenId> Alone(const Request& request, int32_t sample,
                                    const SchedulerOptions& options);

 private:
  struct Slot {
    uint64_t seed = 0;
    uint64_t generation = 0;
    TokenId sampled = -1;
    int64_t sampling = 0;          // steps in flight that sample for it
    std::vector<uint64_t> hashes;  // by position
    std::vector<int32_t> pages;
  };
  struct Sampling {
    int32_t slot;
    uint64_t generation;
  };
  void Fail(const char* what) {
    if (error_.empty()) error_ = what;
  }
  void Start(const NewSequence& added, const TokenId* tokens, const int32_t* pages);
  void Compute(const Chunk& chunk, const TokenId* tokens, const int32_t* pages);

  SchedulerOptions options_;
  std::vector<Slot> slots_;
  std::vector<uint64_t> cells_;  // [pages, page_size]
  std::vector<int64_t> last_plan_of_slot_;
  std::vector<std::vector<Sampling>> in_flight_;  // of the plans not committed yet
  uint64_t next_generation_ = 1;
  std::string error_;
};

}  // namespace trireme
