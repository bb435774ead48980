#include "runtime/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace trireme {

struct Scheduler::Sequence {
  Request request;
  int32_t slot = 0;
  std::vector<TokenId> tokens;  // prompt and output so far
  int64_t scheduled = 0;        // tokens that are computed or in flight
  int64_t in_flight = 0;        // chunks
  bool sampling = false;        // a step that samples its next token is in flight
  bool ended = false;
  std::vector<int32_t> pages;

  bool ReadyToDecode() const {
    return !ended && !sampling && scheduled + 1 == static_cast<int64_t>(tokens.size()) &&
           InOutput();
  }
  bool ReadyToPrefill() const {
    return !ended && !sampling && !InOutput() && scheduled < static_cast<int64_t>(tokens.size());
  }
  bool InOutput() const { return tokens.size() > request.prompt.size(); }
};

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options), pages_(options.num_pages), by_slot_(options.max_num_seqs, nullptr) {
  CHECK_GT(options.max_num_seqs, 0);
  CHECK_GT(options.max_num_batched_tokens, 0);
  CHECK_GT(options.micro_batches, 0);
}
Scheduler::~Scheduler() = default;

int64_t Scheduler::MaxLength(const Request& request) const {
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  return prompt + std::min(request.max_tokens, options_.max_model_len - prompt);
}

int64_t Scheduler::PagesFor(int64_t tokens) const {
  return (tokens + options_.page_size - 1) / options_.page_size;
}

absl::Status Scheduler::Add(Request request) {
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0)
    return absl::InvalidArgumentError("the prompt is empty: give at least one token");
  if (request.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max-tokens is ", request.max_tokens, "; it must be at least 1"));
  }
  if (prompt >= options_.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", prompt, " tokens and leaves no room for output in --max-model-len ",
        options_.max_model_len));
  }
  const int64_t pages = PagesFor(MaxLength(request));
  if (pages > options_.num_pages) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request needs ", pages, " KV pages of ", options_.page_size,
                     " tokens and the cache has ", options_.num_pages,
                     ": raise --kv-cache-memory or lower --max-tokens"));
  }
  if (absl::Status status = CheckSamplingParams(request.sampling); !status.ok()) return status;
  if (!by_id_.emplace(request.id, nullptr).second) {
    return absl::AlreadyExistsError(absl::StrCat("request id ", request.id, " is already in use"));
  }
  waiting_.push_back(std::move(request));
  return absl::OkStatus();
}

absl::Status Scheduler::Cancel(uint64_t request_id) {
  const auto it = by_id_.find(request_id);
  if (it == by_id_.end())
    return absl::NotFoundError(absl::StrCat("no request with id ", request_id));
  if (it->second == nullptr) {
    std::erase_if(waiting_, [&](const Request& request) { return request.id == request_id; });
    by_id_.erase(it);
  } else {
    it->second->ended = true;
    RemoveIfDone(it->second);
  }
  return absl::OkStatus();
}

bool Scheduler::Admit(StepPlan& plan) {
  if (waiting_.empty()) return false;
  const auto slot = std::find(by_slot_.begin(), by_slot_.end(), nullptr);
  if (slot == by_slot_.end()) return false;
  Request& request = waiting_.front();
  const int64_t pages = PagesFor(MaxLength(request));
  if (reserved_pages_ + pages > options_.num_pages) return false;
  reserved_pages_ += pages;
  auto sequence = std::make_unique<Sequence>();
  sequence->slot = static_cast<int32_t>(slot - by_slot_.begin());
  sequence->tokens = request.prompt;
  sequence->tokens.reserve(MaxLength(request));
  plan.new_sequences.push_back(
      {sequence->slot, static_cast<int32_t>(request.prompt.size()), request.sampling});
  sequence->request = std::move(request);
  waiting_.pop_front();
  *slot = sequence.get();
  by_id_[sequence->request.id] = sequence.get();
  running_.push_back(std::move(sequence));
  return true;
}

Chunk Scheduler::MakeChunk(Sequence& sequence, int64_t tokens) {
  Chunk chunk;
  chunk.slot = sequence.slot;
  chunk.position = static_cast<int32_t>(sequence.scheduled);
  chunk.decode = sequence.InOutput();
  const auto begin = sequence.tokens.begin() + sequence.scheduled;
  chunk.tokens.assign(begin, begin + tokens);
  sequence.scheduled += tokens;
  while (static_cast<int64_t>(sequence.pages.size()) < PagesFor(sequence.scheduled)) {
    sequence.pages.push_back(pages_.Allocate());
    chunk.new_pages.push_back(sequence.pages.back());
  }
  if (sequence.scheduled == static_cast<int64_t>(sequence.tokens.size())) {
    chunk.logit_rows = LogitRows::kLast;
    sequence.sampling = true;
  }
  ++sequence.in_flight;
  return chunk;
}

void Scheduler::AddDecodes(StepPlan& plan, int64_t& budget, int64_t limit) {
  for (auto& sequence : running_) {
    if (budget == 0 || static_cast<int64_t>(plan.chunks.size()) >= limit) return;
    if (!sequence->ReadyToDecode()) continue;
    plan.chunks.push_back(MakeChunk(*sequence, 1));
    --budget;
  }
}

void Scheduler::AddPrefills(StepPlan& plan, int64_t& budget, int64_t limit) {
  for (auto& sequence : running_) {
    if (budget == 0 || static_cast<int64_t>(plan.chunks.size()) >= limit) return;
    if (!sequence->ReadyToPrefill()) continue;
    const int64_t left = static_cast<int64_t>(sequence->tokens.size()) - sequence->scheduled;
    const int64_t tokens = std::min(left, budget);
    plan.chunks.push_back(MakeChunk(*sequence, tokens));
    budget -= tokens;
  }
}

StepPlan Scheduler::Next() {
  StepPlan plan;
  while (Admit(plan)) {
  }
  const int64_t running = static_cast<int64_t>(running_.size());
  const int64_t group =
      std::max<int64_t>(1, (running + options_.micro_batches - 1) / options_.micro_batches);
  int64_t budget = options_.max_num_batched_tokens;
  AddDecodes(plan, budget, group);
  AddPrefills(plan, budget, group);
  if (plan.empty()) {
    CHECK(plan.new_sequences.empty()) << "an admitted sequence must be schedulable";
    return plan;
  }
  plan.step = next_step_++;
  return plan;
}

std::vector<TokenEvent> Scheduler::Commit(const StepPlan& plan, const StepResult& result) {
  CHECK_EQ(plan.step, result.step);
  std::vector<TokenEvent> events;
  size_t next = 0;
  for (const Chunk& chunk : plan.chunks) {
    Sequence* sequence = by_slot_[chunk.slot];
    --sequence->in_flight;
    if (chunk.logit_rows == LogitRows::kLast) {
      CHECK_LT(next, result.sampled.size());
      const SampledToken& sampled = result.sampled[next++];
      sequence->sampling = false;
      if (!sequence->ended) {
        const Request& request = sequence->request;
        sequence->tokens.push_back(sampled.token);
        TokenEvent event{request.id, sampled, FinishReason::kNone};
        if (std::count(request.stop_tokens.begin(), request.stop_tokens.end(), sampled.token) > 0) {
          event.finish = FinishReason::kStop;
        } else if (static_cast<int64_t>(sequence->tokens.size()) == MaxLength(request)) {
          event.finish = FinishReason::kLength;
        }
        sequence->ended = event.finish != FinishReason::kNone;
        events.push_back(std::move(event));
      }
    }
    RemoveIfDone(sequence);
  }
  CHECK_EQ(next, result.sampled.size());
  return events;
}

void Scheduler::RemoveIfDone(Sequence* sequence) {
  if (!sequence->ended || sequence->in_flight > 0) return;
  for (const int32_t page : sequence->pages) pages_.Free(page);
  reserved_pages_ -= PagesFor(MaxLength(sequence->request));
  by_slot_[sequence->slot] = nullptr;
  by_id_.erase(sequence->request.id);
  std::erase_if(running_, [&](const auto& owned) { return owned.get() == sequence; });
}

}  // namespace trireme
