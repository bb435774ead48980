// The engine's own threads: planning and committing on one, executing on the other.

#include <sched.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/trace.h"
#include "runtime/engine.h"
#include "runtime/step_pipeline.h"

namespace trireme {
namespace {

constexpr size_t kTimelines = 1024;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int64_t kLongestWaitMicros = int64_t{3600} * 1'000'000;
// Looks at the network before a waiting thread offers its core to others.
constexpr int kSpins = 50;

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

// What ends a request whose logits are no finite numbers.
absl::Status NotFinite(const RequestTimeline& timeline) {
  return absl::DataLossError(absl::StrCat(
      "request id ", timeline.request_id, ": the model gave no finite logit for any token, after ",
      timeline.prompt_tokens, " tokens of prompt and ", timeline.output_tokens,
      " of output: its weights hold NaN or infinity, or overflow this --dtype (try bf16 or f32)"));
}

}  // namespace

// Waits for mail, but not beyond the scheduler's next time when no step is out.
void Engine::TakeMail(Mail* mail) {
  const int64_t next = steps_out_ > 0 ? kNever : scheduler_.NextTime();
  // The clock counts nanoseconds: further off is beyond its end, and a look in between costs
  // little.
  const int64_t time = next == kNever ? kNever : std::min(next, NowMicros() + kLongestWaitMicros);
  std::unique_lock lock(mutex_);
  const auto arrived = [this] { return !mail_.empty(); };
  if (time == kNever) {
    mail_arrived_.wait(lock, arrived);
  } else {
    mail_arrived_.wait_until(lock, begin_ + std::chrono::microseconds(time), arrived);
  }
  mail->Clear();
  std::swap(*mail, mail_);
}

void Engine::RunEngine() {
  Mail mail;
  while (true) {
    TakeMail(&mail);
    if (mail.drain) scheduler_.Drain();
    for (Submission& submission : mail.submissions) Start(std::move(submission));
    CountSamples();
    if (!failure_.ok()) FailOpen();  // accepted before Submit could know
    if (mail.stop) {
      for (const auto& [id, open] : open_) mail.cancels.push_back({id, open->submission.serial});
    }
    for (auto& step : mail.done) Take(std::move(step));
    scheduler_.AdvanceTime(NowMicros(), &events_);
    CountSamples();
    PlanSteps();
    // Text and callbacks' work come after planning: the ranks are busy meanwhile.
    if (!events_.empty()) {
      const TraceScope trace("text");
      for (const TokenEvent& event : events_) Handle(event);
      events_.clear();
    }
    for (const Cancellation& cancel : mail.cancels) CancelOpen(cancel);
    Publish();
    delivery_->Push(&outbox_);
    for (auto& [stream, output] : std::exchange(last_outputs_, {})) {
      Over(output.request_id);  // its id is free when the caller knows of the end
      stream->Push(std::move(output), true);
    }
    if (mail.stop) break;
  }
  {
    const std::lock_guard lock(mutex_);
    stop_steps_ = true;
  }
  plan_arrived_.notify_one();
}

void Engine::Start(Submission submission) {
  const Request& request = submission.request;
  const uint64_t id = request.id;
  auto open = std::make_unique<Open>();
  open->left = request.n;
  open->timeline.request_id = id;
  open->timeline.prompt_tokens = static_cast<int64_t>(request.prompt.size());
  open->timeline.arrival_us = request.arrival_us;
  for (int32_t i = 0; i < request.n; ++i)
    open->samples.push_back({TextStream(tokenizer_, request.prompt, request.stop)});
  // What the caller has of the text already comes out of the tokens once more, and goes nowhere.
  for (const TokenId token : request.output) open->samples[0].text.Append(token);
  // Submit has checked it, and that the id is free.
  const absl::Status added = scheduler_.Add(request);
  CHECK(added.ok()) << added.ToString();
  open->submission = std::move(submission);
  open_[id] = std::move(open);
}

void Engine::CancelOpen(const Cancellation& cancel) {
  const uint64_t id = cancel.request_id;
  const auto it = open_.find(id);
  // It has ended by itself, and a new one may have its id already.
  if (it == open_.end() || it->second->submission.serial != cancel.serial) return;
  for (int32_t i = 0; i < it->second->submission.request.n; ++i) {
    if (!it->second->samples[i].ended)
      events_.push_back({.request_id = id, .sample = i, .finish = FinishReason::kCancelled});
  }
  // A request that ended with this mail's steps is the scheduler's no more.
  scheduler_.Cancel(id).IgnoreError();
  for (const TokenEvent& event : std::exchange(events_, {})) Handle(event);
}

// Commits a step that is done.
void Engine::Take(std::unique_ptr<Step> step) {
  --steps_out_;
  stats_.execute_seconds += step->execute_seconds;
  stats_.communication_seconds += step->communication_seconds;
  stats_.graphs = step->graphs;
  if (failure_.ok() && !step->result.error.empty()) Fail(absl::AbortedError(step->result.error));
  if (failure_.ok()) {
    const TraceScope trace("commit", step->plan.step);
    scheduler_.Commit(step->plan, step->result, &events_);
    stats_.CountStep(step->plan, Seconds(step->done - last_commit_));
    last_commit_ = step->done;
    stats_.step_seconds.Observe(Seconds(step->done - step->planned));
    stats_.step_tokens.Observe(static_cast<double>(step->plan.num_tokens()));
    stats_.step_sequences.Observe(static_cast<double>(step->plan.chunks.size()));
  }
  spare_steps_.push_back(std::move(step));
}

void Engine::PlanSteps() {
  while (failure_.ok() && steps_out_ < depth_) {
    if (spare_steps_.empty()) spare_steps_.push_back(std::make_unique<Step>());
    std::unique_ptr<Step> step = std::move(spare_steps_.back());
    spare_steps_.pop_back();
    const TraceScope trace("plan");
    if (!scheduler_.Next(&step->plan)) {
      spare_steps_.push_back(std::move(step));
      return;
    }
    step->planned = Clock::now();
    if (steps_out_++ == 0) last_commit_ = step->planned;
    for (const uint64_t id : scheduler_.admitted()) {
      Open& open = *open_.at(id);
      if (open.admitted_us >= 0) continue;
      open.admitted_us = NowMicros();
      open.execute_before = stats_.execute_seconds;
      open.communication_before = stats_.communication_seconds;
      stats_.queue_seconds.Observe(1e-6 * (open.admitted_us - open.timeline.arrival_us));
    }
    {
      const std::lock_guard lock(mutex_);
      planned_.push_back(std::move(step));
      planned_count_.fetch_add(1, std::memory_order_release);
    }
    plan_arrived_.notify_one();
  }
}

// A rank could not do its part: nothing that follows would mean anything.
void Engine::Fail(const absl::Status& status) {
  {
    const std::lock_guard lock(mutex_);
    failure_ = status;
  }
  events_.clear();
  FailOpen();
}

void Engine::FailOpen() {
  for (const auto& [id, open] : open_) {
    scheduler_.Cancel(id).IgnoreError();
    for (int32_t i = 0; i < open->submission.request.n; ++i) {
      if (!open->samples[i].ended)
        events_.push_back({.request_id = id, .sample = i, .finish = FinishReason::kError});
    }
  }
}

void Engine::Handle(const TokenEvent& event) {
  const auto it = open_.find(event.request_id);
  // A stop string may have ended a sample of which another step was committed with this one.
  if (it == open_.end() || it->second->samples[event.sample].ended) return;
  Open& open = *it->second;
  Sample& sample = open.samples[event.sample];
  TokenOutput output{.request_id = event.request_id,
                     .sample = event.sample,
                     .sampled = event.sampled,
                     .finish = event.finish};
  if (event.finish == FinishReason::kError)
    output.status = failure_.ok() ? NotFinite(open.timeline) : failure_;
  if (event.sampled.token >= 0) {
    const int64_t now = NowMicros();
    if (open.first_token_us < 0) {
      open.first_token_us = now;
      stats_.first_token_seconds.Observe(1e-6 * (now - open.timeline.arrival_us));
    }
    if (sample.last_token_us >= 0) {
      ++stats_.decode_tokens;
      stats_.inter_token_seconds.Observe(1e-6 * (now - sample.last_token_us));
    }
    sample.last_token_us = now;
    ++open.timeline.output_tokens;
    // A stop token ends the text and is not part of it.
    if (event.finish != FinishReason::kStop) output.text = sample.text.Append(event.sampled.token);
    if (sample.text.stopped() && output.finish != FinishReason::kStop) {
      // The scheduler knows nothing of text, and may have ended the sample for a reason of its own.
      scheduler_.Cancel(event.request_id, event.sample).IgnoreError();
      output.finish = FinishReason::kStop;
    }
  }
  if (output.finish != FinishReason::kNone) output.text += sample.text.Finish();
  Emit(open, std::move(output));
}

void Engine::Emit(Open& open, TokenOutput output) {
  const uint64_t id = output.request_id;
  bool last = false;
  if (output.finish != FinishReason::kNone) {
    open.samples[output.sample].ended = true;
    last = --open.left == 0;
    open.timeline.finish = output.finish;
    if (!output.status.ok()) open.timeline.status = output.status;
    ++stats_.finished[static_cast<size_t>(output.finish)];
    const int64_t now = NowMicros();
    stats_.request_seconds.Observe(1e-6 * (now - open.timeline.arrival_us));
    // The last sample's are the request's.
    output.times = TimesUntil(open, now);
    static_cast<RequestTimes&>(open.timeline) = output.times;
  }
  if (open.submission.stream != nullptr && last) {
    last_outputs_.emplace_back(open.submission.stream, std::move(output));
  } else if (open.submission.stream != nullptr) {
    open.submission.stream->Push(std::move(output), false);
  } else {
    outbox_.push_back({open.submission.recipient, std::move(output), last});
  }
  if (last) Finish(id);
}

RequestTimes Engine::TimesUntil(const Open& open, int64_t now_us) const {
  const int64_t admitted = open.admitted_us < 0 ? now_us : open.admitted_us;
  const int64_t first = open.first_token_us < 0 ? now_us : open.first_token_us;
  RequestTimes times{.queue_us = admitted - open.timeline.arrival_us,
                     .prefill_us = first - admitted,
                     .decode_us = now_us - first};
  if (open.admitted_us >= 0) {
    const double execute = stats_.execute_seconds - open.execute_before;
    const double communication = stats_.communication_seconds - open.communication_before;
    times.communication_us =
        std::min<int64_t>(now_us - admitted, static_cast<int64_t>(1e6 * communication));
    times.overhead_us =
        std::max<int64_t>(0, now_us - admitted - static_cast<int64_t>(1e6 * execute));
  }
  return times;
}

void Engine::Finish(uint64_t id) {
  auto node = open_.extract(id);
  const std::lock_guard lock(mutex_);
  Open& open = *node.mapped();
  ended_.push_back({open.submission.serial, std::move(open.timeline)});
  if (ended_.size() > kTimelines) ended_.pop_front();
}

// Where their number has changed: it counts from now on.
void Engine::CountSamples() {
  const Clock::time_point now = Clock::now();
  stats_.sample_seconds += static_cast<double>(samples_) * Seconds(now - counted_);
  samples_ = scheduler_.waiting() + scheduler_.running();
  counted_ = now;
}

void Engine::Publish() {
  CountSamples();
  const SchedulerStats& scheduler = scheduler_.stats();
  stats_.preemptions = scheduler.preemptions;
  stats_.prompt_tokens = scheduler.prompt_tokens;
  stats_.cached_tokens = scheduler.cached_tokens;
  stats_.page_copies = scheduler.page_copies;
  stats_.computed_tokens = scheduler.computed_tokens;
  stats_.idle_slots = scheduler.idle_slots;
  stats_.wasted_tokens = scheduler.wasted_tokens;
  stats_.waiting = scheduler_.waiting();
  stats_.running = scheduler_.running();
  stats_.pages = scheduler_.options().num_pages;
  stats_.pages_free = scheduler_.free_pages();
  stats_.pages_cached = scheduler_.kept_pages();
  const std::lock_guard lock(mutex_);
  published_ = stats_;
}

// Sends plans and executes this rank's part of them as they come, and looks for results in between.
void Engine::RunSteps() {
  StepPipeline pipeline(worker_);
  FlightRecorder* const recorder = worker_.control().recorder();
  // What the failure detector sees of this thread when it waits: for a result, or for work.
  std::optional<FlightRecorder::Scope> waiting;
  std::vector<std::unique_ptr<Step>> out;  // as deep as the pipeline
  int polls = 0;
  while (true) {
    if (out.empty() || planned_count_.load(std::memory_order_acquire) > 0) {
      {
        const FlightRecorder::Outside idle(out.empty() ? recorder : nullptr);
        std::unique_lock lock(mutex_);
        plan_arrived_.wait(lock, [this] { return stop_steps_ || !planned_.empty(); });
        if (stop_steps_) return;  // the pipeline takes back what is in flight
        out.push_back(std::move(planned_.front()));
        planned_.erase(planned_.begin());
        planned_count_.fetch_sub(1, std::memory_order_release);
      }
      Step& step = *out.back();
      const Clock::time_point begin = Clock::now();
      const double communication = worker_.communication_seconds();
      waiting.reset();
      pipeline.Dispatch(step.plan);
      step.execute_seconds = Seconds(Clock::now() - begin);
      step.communication_seconds = worker_.communication_seconds() - communication;
      step.graphs = worker_.graph_stats();
    }
    if (!pipeline.TryTake(&out.front()->result)) {
      if (!waiting) waiting.emplace(recorder, CommOp::kReceive, 0, -1, worker_.result_rank());
      if (++polls > kSpins) sched_yield();
      continue;
    }
    polls = 0;
    waiting.reset();
    Step& done = *out.front();
    done.done = Clock::now();
    {
      const std::lock_guard lock(mutex_);
      mail_.done.push_back(std::move(out.front()));
    }
    out.erase(out.begin());
    mail_arrived_.notify_one();
  }
}

}  // namespace trireme
