#include "runtime/engine.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {
namespace {

SchedulerOptions SchedulerOptionsOf(const Worker& worker) {
  const WorkerOptions& options = worker.options();
  return {.max_num_seqs = options.max_num_seqs,
          .max_num_batched_tokens = options.max_num_batched_tokens,
          .micro_batches = worker.groups().topology.pp_size,
          .page_size = options.page_size,
          .num_pages = options.num_pages,
          .max_model_len = options.max_model_len};
}

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

Engine::Engine(Worker& worker, const Tokenizer* tokenizer)
    : worker_(worker),
      tokenizer_(tokenizer),
      scheduler_(SchedulerOptionsOf(worker)),
      depth_(worker.groups().topology.pp_size),
      last_commit_(Clock::now()) {
  CHECK_EQ(worker.control().rank(), worker.leader());
  const Topology& topology = worker.groups().topology;
  const int replica_ranks = topology.tp_size * topology.pp_size;
  for (int i = 1; i < replica_ranks; ++i) peers_.push_back(worker.leader() + i);
}

Engine::~Engine() {
  while (!in_flight_.empty()) TakeOldest();
  StepPlan stop;
  stop.stop = true;
  const std::string bytes = Serialize(stop);
  for (const int peer : peers_) worker_.control().Send(peer, kPlanChannel, bytes);
  worker_.control().FlushSends();
}

absl::Status Engine::Submit(Request request, Callback callback) {
  for (const TokenId token : request.prompt) {
    if (token < 0 || token >= worker_.config().vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("token id ", token, " in the prompt: the model's vocabulary is 0 to ",
                       worker_.config().vocab_size - 1));
    }
  }
  if (std::count(request.stop.begin(), request.stop.end(), "") > 0) {
    return absl::InvalidArgumentError("a stop string is empty: give at least one character");
  }
  auto running = std::make_unique<Running>(
      Running{TextStream(tokenizer_, request.prompt, request.stop), std::move(callback)});
  const uint64_t id = request.id;
  if (scheduler_.idle()) last_commit_ = Clock::now();
  RETURN_IF_ERROR(scheduler_.Add(std::move(request)));
  running_[id] = std::move(running);
  return absl::OkStatus();
}

absl::Status Engine::Cancel(uint64_t request_id) {
  RETURN_IF_ERROR(scheduler_.Cancel(request_id));
  const auto it = running_.find(request_id);
  TokenOutput output{.request_id = request_id, .finish = FinishReason::kCancelled};
  output.text = it->second->text.Finish();
  const auto running = std::move(it->second);
  running_.erase(it);
  running->callback(output);
  return absl::OkStatus();
}

void Engine::Dispatch(StepPlan plan) {
  if (!peers_.empty()) {
    const std::string bytes = Serialize(plan);
    for (const int peer : peers_) worker_.control().Send(peer, kPlanChannel, bytes);
  }
  in_flight_.push_back({std::move(plan), std::nullopt});
  in_flight_.back().result = worker_.Execute(in_flight_.back().plan);
}

// The oldest step in flight, once its result is here.
Engine::FinishedStep Engine::TakeOldest() {
  InFlight oldest = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (oldest.result) return {std::move(oldest.plan), *std::move(oldest.result)};
  return {std::move(oldest.plan),
          ParseStepResult(worker_.control().Receive(worker_.result_rank(), kResultChannel))};
}

absl::StatusOr<bool> Engine::Step() {
  while (static_cast<int64_t>(in_flight_.size()) < depth_) {
    StepPlan plan = scheduler_.Next();
    if (plan.empty()) break;
    Dispatch(std::move(plan));
  }
  if (in_flight_.empty()) return false;
  const auto [plan, result] = TakeOldest();
  if (!result.error.empty()) return absl::DataLossError(result.error);
  const std::vector<TokenEvent> events = scheduler_.Commit(plan, result);

  int64_t prefill_tokens = 0;
  for (const Chunk& chunk : plan.chunks) {
    if (!chunk.decode) prefill_tokens += static_cast<int64_t>(chunk.tokens.size());
  }
  const Clock::time_point now = Clock::now();
  (prefill_tokens > 0 ? stats_.prefill_seconds : stats_.decode_seconds) +=
      Seconds(now - last_commit_);
  last_commit_ = now;
  stats_.prefill_tokens += prefill_tokens;
  ++stats_.steps;
  for (const TokenEvent& event : events) Deliver(event);
  return true;
}

void Engine::Deliver(const TokenEvent& event) {
  const auto it = running_.find(event.request_id);
  CHECK(it != running_.end());
  Running& running = *it->second;
  if (running.first_token_seen) ++stats_.decode_tokens;
  running.first_token_seen = true;
  TokenOutput output{
      .request_id = event.request_id, .sampled = event.sampled, .finish = event.finish};
  // A stop token ends the text and is not part of it.
  if (event.finish != FinishReason::kStop) output.text = running.text.Append(event.sampled.token);
  if (running.text.stopped() && output.finish != FinishReason::kStop) {
    // The scheduler knows nothing of text. Where it has already ended the request there is nothing
    // to cancel.
    if (output.finish == FinishReason::kNone) {
      CHECK(scheduler_.Cancel(event.request_id).ok());
    }
    output.finish = FinishReason::kStop;
  }
  if (output.finish == FinishReason::kNone) {
    running.callback(output);
    return;
  }
  output.text += running.text.Finish();
  const auto ended = std::move(it->second);
  running_.erase(it);
  ended->callback(output);
}

absl::Status Engine::Evaluate(const std::vector<TokenId>& tokens,
                              const std::function<void(int64_t, std::span<const float>)>& row) {
  CHECK(scheduler_.idle() && in_flight_.empty());
  const WorkerOptions& options = worker_.options();
  const int64_t total = static_cast<int64_t>(tokens.size());
  const int64_t pages = (total + options.page_size - 1) / options.page_size;
  if (total > options.max_model_len || pages > options.num_pages) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", total, " tokens; at most ",
                     std::min(options.max_model_len, options.num_pages * options.page_size),
                     " fit (--max-model-len)"));
  }
  const int64_t chunk_tokens = std::min(options.max_num_batched_tokens, options.max_logit_rows);
  const int64_t vocabulary = worker_.config().vocab_size;
  int64_t next = 0, step = 0, delivered = 0;
  while (delivered < total) {
    while (next < total && static_cast<int64_t>(in_flight_.size()) < depth_) {
      StepPlan plan;
      plan.step = step++;
      if (next == 0)
        plan.new_sequences.push_back(
            {.slot = 0, .prompt_tokens = static_cast<int32_t>(total), .sampling = {}});
      Chunk chunk{.slot = 0, .position = static_cast<int32_t>(next), .logit_rows = LogitRows::kAll};
      const int64_t end = std::min(total, next + chunk_tokens);
      chunk.tokens.assign(tokens.begin() + next, tokens.begin() + end);
      for (int64_t page = next == 0 ? 0 : (next - 1) / options.page_size + 1;
           page <= (end - 1) / options.page_size; ++page) {
        chunk.new_pages.push_back(static_cast<int32_t>(page));
      }
      next = end;
      plan.chunks.push_back(std::move(chunk));
      Dispatch(std::move(plan));
    }
    const auto [plan, result] = TakeOldest();
    const int64_t rows = static_cast<int64_t>(plan.chunks[0].tokens.size());
    CHECK_EQ(static_cast<int64_t>(result.logits.size()), rows * vocabulary);
    for (int64_t r = 0; r < rows; ++r)
      row(delivered + r, std::span(result.logits).subspan(r * vocabulary, vocabulary));
    delivered += rows;
  }
  return absl::OkStatus();
}

}  // namespace trireme
