#include "runtime/engine.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"

namespace trireme {
namespace {

bool Overlaps(const Worker& worker, const EngineOptions& options) {
  // Only ranks that sample know the token a step takes from the one before.
  return options.overlap && worker.groups().topology.pp_size == 1;
}

SchedulerOptions SchedulerOptionsOf(const Worker& worker, const EngineOptions& engine) {
  const WorkerOptions& options = worker.options();
  const ModelConfig& config = worker.config();
  return {.max_num_seqs = options.max_num_seqs,
          .max_num_batched_tokens = options.max_num_batched_tokens,
          .micro_batches = worker.groups().topology.pp_size,
          .page_size = options.page_size,
          .num_pages = options.num_pages,
          .max_model_len = options.max_model_len,
          // Where one layer sees everything, nothing can be given back.
          .sliding_window = config.sliding_window_from_layer == 0 ? config.sliding_window : 0,
          .lookahead = Overlaps(worker, engine) ? 1 : 0,
          .prefix_cache = engine.prefix_cache,
          .ageing_steps = engine.ageing_steps,
          .policy = engine.policy};
}

}  // namespace

std::optional<TokenOutput> OutputStream::Next() {
  std::unique_lock lock(mutex_);
  arrived_.wait(lock, [this] { return ended_ || !outputs_.empty(); });
  if (outputs_.empty()) return std::nullopt;
  TokenOutput output = std::move(outputs_.front());
  outputs_.pop_front();
  return output;
}

std::optional<TokenOutput> OutputStream::TryNext() {
  const std::lock_guard lock(mutex_);
  if (outputs_.empty()) return std::nullopt;
  TokenOutput output = std::move(outputs_.front());
  outputs_.pop_front();
  return output;
}

void OutputStream::Push(TokenOutput output, bool last) {
  {
    const std::lock_guard lock(mutex_);
    outputs_.push_back(std::move(output));
    ended_ = last;
  }
  arrived_.notify_all();
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(Worker& worker, const Tokenizer* tokenizer,
                                                       const EngineOptions& options) {
  if (worker.control().rank() != worker.leader()) {
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", worker.control().rank(), " is not its replica's leader, which rank ",
                     worker.leader(), " is: it calls Worker::Run"));
  }
  if (options.ageing_steps < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("ageing_steps is ", options.ageing_steps, "; it must be at least 1"));
  }
  if (options.max_queue < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_queue is ", options.max_queue, "; it must be at least 0 (no limit)"));
  }
  return std::unique_ptr<Engine>(new Engine(worker, tokenizer, options));
}

Engine::Engine(Worker& worker, const Tokenizer* tokenizer, const EngineOptions& options)
    : worker_(worker),
      tokenizer_(tokenizer),
      options_(options),
      depth_(worker.groups().topology.pp_size + (Overlaps(worker, options) ? 1 : 0)),
      scheduler_(SchedulerOptionsOf(worker, options)) {
  stats_.graphs = worker.graph_stats();  // of start-up
  Publish();
  delivery_ = std::make_unique<Delivery>(
      Delivery::Hooks{.threw = [this](uint64_t id, const std::string& what) { Threw(id, what); },
                      .over = [this](uint64_t id) { Over(id); }});
  step_thread_ = std::thread([this] { RunSteps(); });
  engine_thread_ = std::thread([this] { RunEngine(); });
}

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    draining_ = true;
    mail_.stop = true;
  }
  mail_arrived_.notify_one();
  engine_thread_.join();
  step_thread_.join();
  delivery_.reset();
}

int64_t Engine::NowMicros() const {
  return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin_).count();
}

// Samples that may be open at once.
int64_t Engine::Room() const {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  const int64_t running = worker_.options().max_num_seqs;
  if (options_.max_queue == 0) return kNoLimit;
  return running + std::min(options_.max_queue, kNoLimit - running);
}

absl::Status Engine::CheckRequest(const Request& request) const {
  const int64_t vocabulary = worker_.config().vocab_size;
  const auto unknown = [vocabulary](TokenId token) { return token < 0 || token >= vocabulary; };
  for (const std::vector<TokenId>* tokens : {&request.prompt, &request.output}) {
    const auto token = std::find_if(tokens->begin(), tokens->end(), unknown);
    if (token != tokens->end()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "token id ", *token, " in the prompt: the model's vocabulary is 0 to ", vocabulary - 1));
    }
  }
  if (std::count(request.stop.begin(), request.stop.end(), "") > 0) {
    return absl::InvalidArgumentError("a stop string is empty: give at least one character");
  }
  RETURN_IF_ERROR(scheduler_.Check(request));
  const int64_t room = Room();
  if (request.n > room) {
    return absl::InvalidArgumentError(absl::StrCat(
        "n is ", request.n, "; at most ", room, " samples may be open (--max-num-seqs ",
        worker_.options().max_num_seqs, " + --max-queue ", options_.max_queue, ")"));
  }
  return absl::OkStatus();
}

// REQUIRES: mutex_ is held.
absl::Status Engine::CheckRoom(int32_t samples) const {
  if (open_samples_ <= Room() - samples) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("overloaded: ", open_samples_, " samples are open and this request has ",
                   samples, " (--max-num-seqs ", worker_.options().max_num_seqs, " + --max-queue ",
                   options_.max_queue, "); try again later"));
}

absl::Status Engine::Accept(Submission submission) {
  absl::Status status = CheckRequest(submission.request);
  const uint64_t id = submission.request.id;
  const int32_t samples = submission.request.n;
  {
    const std::lock_guard lock(mutex_);
    if (status.ok()) status = failure_;
    if (status.ok() && draining_) {
      status = absl::FailedPreconditionError("the engine is draining: it takes no more requests");
    }
    if (status.ok() && not_over_.contains(id))
      status = absl::AlreadyExistsError(absl::StrCat("request id ", id, " is already in use"));
    if (status.ok()) {
      status = CheckRoom(samples);
      overloaded_ += !status.ok();
    }
    if (!status.ok()) {
      ++refused_;
      return status;
    }
    submission.serial = static_cast<uint64_t>(++accepted_);
    not_over_[id] = {.serial = submission.serial, .samples = samples};
    open_samples_ += samples;
    mail_.submissions.push_back(std::move(submission));
  }
  mail_arrived_.notify_one();
  return absl::OkStatus();
}

absl::Status Engine::Submit(Request request, Callback callback) {
  request.arrival_us = NowMicros();
  auto recipient = std::make_shared<Delivery::Recipient>();
  recipient->callback = std::move(callback);
  return Accept({.request = std::move(request), .recipient = std::move(recipient)});
}

absl::StatusOr<std::shared_ptr<OutputStream>> Engine::Submit(Request request) {
  request.arrival_us = NowMicros();
  auto stream = std::make_shared<OutputStream>();
  RETURN_IF_ERROR(Accept({.request = std::move(request), .stream = stream}));
  return stream;
}

absl::Status Engine::Cancel(uint64_t request_id) {
  {
    const std::lock_guard lock(mutex_);
    const auto open = not_over_.find(request_id);
    if (open == not_over_.end())
      return absl::NotFoundError(absl::StrCat("no request with id ", request_id));
    mail_.cancels.push_back({request_id, open->second.serial});
  }
  mail_arrived_.notify_one();
  return absl::OkStatus();
}

absl::Status Engine::CheckMayWait() const {
  if (!delivery_->OnThisThread()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "a callback would wait for itself: drain, or wait for the engine to be idle, on another "
      "thread");
}

absl::Status Engine::WaitIdle(std::chrono::microseconds limit) {
  RETURN_IF_ERROR(CheckMayWait());
  std::unique_lock lock(mutex_);
  const auto idle = [this] { return not_over_.empty(); };
  if (limit == std::chrono::microseconds::max()) {
    idle_.wait(lock, idle);
  } else if (!idle_.wait_for(lock, limit, idle)) {
    return absl::DeadlineExceededError(absl::StrCat(not_over_.size(), " requests are still open"));
  }
  return absl::OkStatus();
}

void Engine::Close() {
  {
    const std::lock_guard lock(mutex_);
    draining_ = true;
    mail_.drain = true;
  }
  mail_arrived_.notify_one();
}

absl::Status Engine::Drain() {
  RETURN_IF_ERROR(CheckMayWait());
  Close();
  RETURN_IF_ERROR(WaitIdle());
  const std::lock_guard lock(mutex_);
  return failure_;
}

EngineStats Engine::Stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = published_;
  stats.requests = accepted_;
  stats.refused = refused_;
  stats.overloaded = overloaded_;
  stats.callback_errors = callback_errors_;
  return stats;
}

absl::StatusOr<RequestTimeline> Engine::Timeline(uint64_t request_id) const {
  const std::lock_guard lock(mutex_);
  const auto own = [&](const Ended& ended) { return ended.timeline.request_id == request_id; };
  const auto ended = std::find_if(ended_.rbegin(), ended_.rend(), own);
  const auto open = not_over_.find(request_id);
  // One that has ended stays open until its last output is delivered.
  if (open != not_over_.end() && (ended == ended_.rend() || ended->serial != open->second.serial)) {
    RequestTimeline timeline;
    timeline.request_id = request_id;
    return timeline;
  }
  if (ended != ended_.rend()) return ended->timeline;
  return absl::NotFoundError(
      absl::StrCat("request id ", request_id, " is neither open nor among the last that ended"));
}

void Engine::Threw(uint64_t id, const std::string& what) {
  {
    const std::lock_guard lock(mutex_);
    ++callback_errors_;
    thrown_[id] = what;
    mail_.cancels.push_back({id, not_over_.at(id).serial});
  }
  mail_arrived_.notify_one();
}

void Engine::Over(uint64_t id) {
  const std::lock_guard lock(mutex_);
  if (const auto it = thrown_.find(id); it != thrown_.end()) {
    const auto own = [&](const Ended& ended) { return ended.timeline.request_id == id; };
    const auto ended = std::find_if(ended_.rbegin(), ended_.rend(), own);
    if (ended != ended_.rend()) {
      ended->timeline.finish = FinishReason::kError;
      ended->timeline.status =
          absl::InternalError(absl::StrCat("its callback threw: ", it->second));
    }
    thrown_.erase(it);
  }
  if (const auto it = not_over_.find(id); it != not_over_.end()) {
    open_samples_ -= it->second.samples;
    not_over_.erase(it);
  }
  if (not_over_.empty()) idle_.notify_all();
}

}  // namespace trireme
