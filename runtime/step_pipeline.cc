#include "runtime/step_pipeline.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace trireme {

StepPipeline::StepPipeline(Worker& worker) : worker_(worker) {
  CHECK_EQ(worker.control().rank(), worker.leader());
  const Topology& topology = worker.groups().topology;
  for (int i = 1; i < topology.tp_size * topology.pp_size; ++i)
    peers_.push_back(worker.leader() + i);
  bytes_.reserve(ReservedBytes(worker.options().plan_bounds()));
}

StepPipeline::~StepPipeline() {
  // After a failure nobody answers.
  if (failed_ || !worker_.control().JobStatus().ok()) return;
  StepResult dropped;
  while (!empty()) Take(&dropped);
  StepPlan stop;
  stop.stop = true;
  Serialize(stop, &bytes_);
  for (const int peer : peers_) worker_.control().Send(peer, kPlanChannel, bytes_);
  worker_.control().FlushSends();
}

void StepPipeline::Dispatch(const StepPlan& plan) {
  if (in_flight_ == steps_.size()) steps_.emplace_back();
  Step& step = steps_[in_flight_++];
  if (const absl::Status status = worker_.Begin(plan); !status.ok()) {
    step.result.Clear();
    step.result.step = plan.step;
    step.result.error = std::string(status.message());
    step.here = true;
    failed_ = worker_.control().detector() != nullptr;
    return;
  }
  if (!peers_.empty()) {
    Serialize(plan, &bytes_);
    for (const int peer : peers_) worker_.control().Send(peer, kPlanChannel, bytes_);
  }
  step.here = worker_.Execute(plan, &step.result);
  // The ranks behind wait for what does not come any more.
  if (!worker_.stream().Fault().ok()) failed_ = worker_.control().detector() != nullptr;
}

bool StepPipeline::TryTake(StepResult* result) {
  CHECK(!empty());
  Step& oldest = steps_.front();
  if (!oldest.here) {
    if (!worker_.control().TryReceive(worker_.result_rank(), kResultChannel, &bytes_)) return false;
    Parse(bytes_, &oldest.result);
  }
  Pop(result);
  return true;
}

void StepPipeline::Take(StepResult* result) {
  CHECK(!empty());
  Step& oldest = steps_.front();
  if (!oldest.here) {
    worker_.control().Receive(worker_.result_rank(), kResultChannel, &bytes_);
    Parse(bytes_, &oldest.result);
  }
  Pop(result);
}

void StepPipeline::Pop(StepResult* result) {
  std::swap(*result, steps_.front().result);
  std::rotate(steps_.begin(), steps_.begin() + 1, steps_.begin() + in_flight_--);
}

}  // namespace trireme
