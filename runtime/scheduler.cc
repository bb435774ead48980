#include "runtime/scheduler.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {
namespace {
constexpr int32_t kMaxSamples = 1024;
}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options), cache_(options.num_pages, options.page_size) {
  CHECK_GT(options.max_num_seqs, 0);
  CHECK_GT(options.max_num_batched_tokens, 0);
  CHECK_GT(options.micro_batches, 0);
  CHECK_GT(options.ageing_steps, 0);
  CHECK(options.lookahead == 0 || options.micro_batches == 1)
      << "only ranks that sample know the token";
  for (int64_t slot = options.max_num_seqs; slot > 0; --slot)
    free_slots_.push_back(static_cast<int32_t>(slot - 1));
  running_.reserve(options.max_num_seqs);
  spare_nodes_.reserve(options.max_num_seqs);
  order_.reserve(options.max_num_seqs);
  passes_.reserve(options.max_num_seqs);
  admitted_.reserve(options.max_num_seqs);
  chunk_tokens_.reserve(options.max_num_batched_tokens);
  chunk_pages_.reserve(PagesFor(options.max_num_batched_tokens) + 2 * options.max_num_seqs);
  const int64_t depth = options.micro_batches + options.lookahead;  // plans in flight, usually
  in_flight_.reserve(depth);
  spare_in_flight_.resize(depth);
  for (InFlight& spare : spare_in_flight_) spare.chunks.reserve(options.max_num_seqs);
}
Scheduler::~Scheduler() = default;

absl::Status Scheduler::Check(const Request& request) const {
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0)
    return absl::InvalidArgumentError("the prompt is empty: give at least one token");
  if (request.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max-tokens is ", request.max_tokens, "; it must be at least 1"));
  }
  if (request.n < 1 || request.n > kMaxSamples) {
    return absl::InvalidArgumentError(
        absl::StrCat("n is ", request.n, "; it must be between 1 and ", kMaxSamples));
  }
  if (prompt >= options_.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", prompt, " tokens and leaves no room for output in --max-model-len ",
        options_.max_model_len));
  }
  if (request.deadline_us < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("deadline_us is ", request.deadline_us, "; it must be at least 0 (none)"));
  }
  const int64_t output = static_cast<int64_t>(request.output.size());
  if (output > 0 && request.n > 1) {
    return absl::InvalidArgumentError("a request that goes on has one sample");
  }
  if (output >= std::min(request.max_tokens, options_.max_model_len - prompt)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request has ", output,
                     " tokens of output already and may have no more: it is finished"));
  }
  int64_t pages = PagesFor(prompt + std::min(request.max_tokens, options_.max_model_len - prompt));
  // Pages behind the window are given back; the window may begin and end in the middle of one.
  if (options_.sliding_window > 0) pages = std::min(pages, PagesFor(options_.sliding_window) + 2);
  if (pages > options_.num_pages) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request needs ", pages, " KV pages of ", options_.page_size,
                     " tokens and the cache has ", options_.num_pages,
                     ": raise --kv-cache-memory or lower --max-tokens"));
  }
  return CheckSamplingParams(request.sampling);
}

Sequence* Scheduler::NewSequenceObject() {
  if (unused_.empty()) {
    slabs_.push_back(std::make_unique<Sequence[]>(kSlab));
    unused_.reserve(slabs_.size() * kSlab);  // all of them come back, in the middle of steps
    for (size_t i = kSlab; i > 0; --i) unused_.push_back(&slabs_.back()[i - 1]);
  }
  Sequence* sequence = unused_.back();
  unused_.pop_back();
  // The vectors keep their memory.
  std::vector<TokenId> tokens = std::move(sequence->tokens);
  std::vector<int32_t> pages = std::move(sequence->pages);
  tokens.clear();
  pages.clear();
  *sequence = Sequence{};
  sequence->tokens = std::move(tokens);
  sequence->pages = std::move(pages);
  sequence->number = next_number_++;
  return sequence;
}

void Scheduler::Wait(Sequence* sequence) {
  sequence->state = Sequence::State::kWaiting;
  if (spare_nodes_.size() <= running_.size()) {  // those are for who runs
    waiting_.insert(sequence);
    return;
  }
  spare_nodes_.back().value() = sequence;
  waiting_.insert(std::move(spare_nodes_.back()));
  spare_nodes_.pop_back();
}

void Scheduler::WaitNoMore(Sequence* sequence) {
  auto node = waiting_.extract(sequence);
  if (spare_nodes_.size() < spare_nodes_.capacity()) spare_nodes_.push_back(std::move(node));
}

absl::Status Scheduler::Add(Request request) {
  RETURN_IF_ERROR(Check(request));
  const auto [entry, added] = by_id_.try_emplace(request.id);
  if (!added) {
    return absl::AlreadyExistsError(absl::StrCat("request id ", request.id, " is already in use"));
  }
  const std::vector<TokenId> prompt = std::move(request.prompt);
  request.prompt.clear();
  for (int32_t sample = 0; sample < request.n; ++sample) {
    Sequence* sequence = NewSequenceObject();
    sequence->request = request;
    sequence->request.sampling.seed += static_cast<uint64_t>(sample);
    sequence->sample = sample;
    sequence->request_id = request.id;
    for (const TokenId token : request.stop_tokens)
      sequence->stop_mask |= uint64_t{1} << (token & 63);
    sequence->tokens.assign(prompt.begin(), prompt.end());
    sequence->prompt_tokens = static_cast<int64_t>(prompt.size());
    sequence->max_length =
        sequence->prompt_tokens +
        std::min(request.max_tokens, options_.max_model_len - sequence->prompt_tokens);
    // No growth in the middle of a step.
    const int64_t reserved = std::min(sequence->max_length, kReservedTokens);
    sequence->tokens.reserve(reserved);
    // As after a preemption: computed again like a prompt, sampled behind.
    sequence->tokens.insert(sequence->tokens.end(), request.output.begin(), request.output.end());
    sequence->last_token = sequence->tokens.back();
    sequence->pages.reserve(PagesFor(reserved));
    sequence->virtual_arrival = next_step_ - request.priority * options_.ageing_steps;
    if (sample > 0) {
      sequence->parent = entry->second[0];
      sequence->parent_number = sequence->parent->number;
    }
    Wait(sequence);
    entry->second.push_back(sequence);
    if (request.deadline_us > 0) ++with_deadline_;
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Cancel(uint64_t request_id) {
  const auto it = by_id_.find(request_id);
  if (it == by_id_.end())
    return absl::NotFoundError(absl::StrCat("no request with id ", request_id));
  const std::vector<Sequence*> samples = it->second;  // End takes the entry away
  for (Sequence* sequence : samples) {
    if (sequence != nullptr) End(sequence);
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Cancel(uint64_t request_id, int32_t sample) {
  const auto it = by_id_.find(request_id);
  if (it == by_id_.end() || sample < 0 || sample >= static_cast<int32_t>(it->second.size()) ||
      it->second[sample] == nullptr) {
    return absl::NotFoundError(absl::StrCat("no sample ", sample, " of request id ", request_id));
  }
  End(it->second[sample]);
  return absl::OkStatus();
}

void Scheduler::AdvanceTime(int64_t now_us, std::vector<TokenEvent>* events) {
  now_us_ = now_us;
  if (with_deadline_ == 0) return;
  for (const auto& slab : slabs_) {
    for (Sequence& sequence : std::span(slab.get(), kSlab)) {
      const int64_t deadline = sequence.request.deadline_us;
      if (sequence.state == Sequence::State::kUnused || deadline == 0 || now_us < deadline)
        continue;
      events->push_back({.request_id = sequence.request_id,
                         .sample = sequence.sample,
                         .finish = FinishReason::kDeadline});
      End(&sequence);
    }
  }
}

void Scheduler::Commit(const StepPlan& plan, const StepResult& result,
                       std::vector<TokenEvent>* events) {
  CHECK_EQ(plan.step, result.step);
  CHECK(!in_flight_.empty() && in_flight_.front().step == plan.step) << "plans come back in order";
  InFlight oldest = std::move(in_flight_.front());
  in_flight_.erase(in_flight_.begin());
  CHECK_EQ(oldest.chunks.size(), plan.chunks.size());
  size_t next = 0;
  for (size_t i = 0; i < plan.chunks.size(); ++i) {
    Sequence* sequence = oldest.chunks[i].sequence;
    if (i + 2 * kFetchAhead < plan.chunks.size())
      Fetch(oldest.chunks[i + 2 * kFetchAhead].sequence);
    if (i + kFetchAhead < plan.chunks.size())
      FetchEnd(oldest.chunks[i + kFetchAhead].sequence->tokens);
    const bool over = sequence->number != oldest.chunks[i].number;  // and perhaps another one
    if (over) stats_.wasted_tokens += plan.chunks[i].num_tokens;
    if (plan.chunks[i].logit_rows != LogitRows::kLast) continue;
    CHECK_LT(next, result.sampled.size());
    const SampledToken& sampled = result.sampled[next++];
    if (over) continue;
    --sequence->unsampled;
    TokenEvent& event = events->emplace_back();
    event.request_id = sequence->request_id;
    event.sample = sequence->sample;
    event.sampled.token = sampled.token;
    event.sampled.logprob = sampled.logprob;
    if (!sampled.top.empty()) event.sampled.top = sampled.top;
    if (sampled.token < 0) {
      event.finish = FinishReason::kError;
      ForgetPages(*sequence);
      End(sequence);
      continue;
    }
    sequence->Append(sampled.token);
    if (sequence->Stops(sampled.token)) {
      event.finish = FinishReason::kStop;
    } else if (sequence->length() == sequence->max_length) {
      event.finish = FinishReason::kLength;
    }
    if (event.finish != FinishReason::kNone) {
      End(sequence);
    } else {
      CachePages(sequence);
    }
  }
  CHECK_EQ(next, result.sampled.size());
  oldest.chunks.clear();
  spare_in_flight_.push_back(std::move(oldest));
}

// Pages that are full and whose tokens are all known. They may still be in flight: whoever finds
// them reads them in a later step.
void Scheduler::CachePages(Sequence* sequence) {
  if (!options_.prefix_cache || !sequence->running()) return;
  const int64_t size = options_.page_size;
  const std::span<const TokenId> tokens(sequence->tokens);
  while (sequence->cached_entry != PrefixCache::kNotCached &&
         (sequence->cached_pages + 1) * size <= std::min(sequence->scheduled, sequence->length())) {
    const int64_t index = sequence->cached_pages++;
    sequence->cached_entry =
        sequence->pages[index] < 0
            ? PrefixCache::kNotCached
            : cache_.Insert(sequence->cached_entry, tokens.subspan(index * size, size),
                            sequence->pages[index]);
  }
}

// What led to no number is no good to others either.
void Scheduler::ForgetPages(const Sequence& sequence) {
  for (const int32_t page : sequence.pages) {
    if (page >= 0) cache_.Forget(page);
  }
}

// The last page first: the prefix cache then loses ends of chains before their beginnings.
void Scheduler::ReleasePages(Sequence* sequence) {
  for (auto page = sequence->pages.rbegin(); page != sequence->pages.rend(); ++page) {
    if (*page >= 0) cache_.Release(*page);
  }
  sequence->pages.clear();
  sequence->dropped_pages = sequence->cached_pages = sequence->scheduled = 0;
  sequence->prompt_planned = false;
  sequence->shares_last_page = false;
  sequence->cached_entry = PrefixCache::kStart;
}

void Scheduler::LeaveRunning(Sequence* sequence) {
  ReleasePages(sequence);
  free_slots_.push_back(sequence->slot);
  sequence->slot = -1;
  const auto at = std::find(running_.begin(), running_.end(), sequence);
  const size_t index = static_cast<size_t>(at - running_.begin());
  running_.erase(at);
  if (index < first_decode_) --first_decode_;
}

// The ranks execute plans in order: from the next one on, nobody reads what these leave. Samples of
// one prompt stay, since others may still share their pages.
void Scheduler::ReleaseEnding() {
  for (const Planned& planned : order_) {
    Sequence* sequence = planned.sequence;
    if (!sequence->AllPlanned() || sequence->request.n > 1) continue;
    LeaveRunning(sequence);
    sequence->state = Sequence::State::kEnding;
    ++ending_;
  }
}

void Scheduler::End(Sequence* sequence) {
  if (sequence->running()) {
    LeaveRunning(sequence);
  } else if (sequence->state == Sequence::State::kEnding) {
    --ending_;
  } else {
    WaitNoMore(sequence);
  }
  if (sequence->request.deadline_us > 0) --with_deadline_;
  const auto it = by_id_.find(sequence->request.id);
  it->second[sequence->sample] = nullptr;
  if (std::all_of(it->second.begin(), it->second.end(), [](auto* s) { return s == nullptr; }))
    by_id_.erase(it);
  sequence->state = Sequence::State::kUnused;
  sequence->number = 0;
  unused_.push_back(sequence);
}

}  // namespace trireme
