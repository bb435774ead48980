// Plans to all ranks of a replica and results back, in order; on the replica's leader, which runs
// its own stage in Dispatch. As many steps may be in flight as there are stages. One thread at a
// time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/worker.h"

namespace trireme {

class StepPipeline {
 public:
  // `worker` must be the leader's and outlive the pipeline.
  explicit StepPipeline(Worker& worker);
  // Takes back what is in flight and sends the other ranks the stop plan: they leave Worker::Run.
  ~StepPipeline();
  StepPipeline(const StepPipeline&) = delete;
  StepPipeline& operator=(const StepPipeline&) = delete;

  // One message to each other rank, then this rank's own stage: returns when that is done. A step
  // that this rank cannot begin has an error for its result; the other ranks hear nothing of it,
  // nor of the end, so that the failure detector finds this rank alone with an error, as it would
  // any other.
  void Dispatch(const StepPlan& plan);
  bool empty() const { return in_flight_ == 0; }
  int64_t in_flight() const { return static_cast<int64_t>(in_flight_); }
  // The result of the oldest step in flight, into memory that is used again; false while it is not
  // here. REQUIRES: !empty().
  bool TryTake(StepResult* result);
  void Take(StepResult* result);  // waits for it

 private:
  Worker& worker_;
  bool failed_ = false;     // a step could not begin, and somebody watches
  std::vector<int> peers_;  // the replica's other ranks
  struct Step {
    bool here = false;  // the result: this rank is the last stage
    StepResult result;
  };
  void Pop(StepResult* result);
  // The first in_flight_ of them, the oldest first; the others keep their memory.
  std::vector<Step> steps_;
  size_t in_flight_ = 0;
  std::string bytes_;
};

}  // namespace trireme
