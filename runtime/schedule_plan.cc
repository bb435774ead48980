// Scheduler::Next: decodes, then prompts under way, then whoever waits.

#include <algorithm>
#include <iterator>
#include <limits>
#include <span>

#include "kernels/check.h"
#include "runtime/scheduler.h"

namespace trireme {

bool Scheduler::Next(StepPlan* plan) {
  plan->Clear();
  plan->Reserve({.max_num_seqs = options_.max_num_seqs,
                 .max_num_batched_tokens = options_.max_num_batched_tokens,
                 .max_model_len = options_.max_model_len,
                 .page_size = options_.page_size});
  chunk_tokens_.clear();
  chunk_pages_.clear();
  admitted_.clear();
  preempted_ = false;
  budget_ = options_.max_num_batched_tokens;
  held_back_ = 0;
  group_ = GroupSize();
  AddDecodes(plan);
  AddPrefills(plan);
  if (!preempted_) AddWaiting(plan);
  if (plan->empty()) {
    CHECK(plan->new_sequences.empty()) << "an admitted sequence has a chunk";
    return false;
  }
  plan->tokens.insert(plan->tokens.end(), chunk_tokens_.begin(), chunk_tokens_.end());
  plan->pages.insert(plan->pages.end(), chunk_pages_.begin(), chunk_pages_.end());
  stats_.computed_tokens += options_.max_num_batched_tokens - budget_;
  stats_.idle_slots += IdleSlots(*plan);
  plan->step = next_step_++;
  InFlight planned;
  if (!spare_in_flight_.empty()) {
    planned = std::move(spare_in_flight_.back());
    spare_in_flight_.pop_back();
  }
  planned.step = plan->step;
  ReleaseEnding();
  planned.chunks.swap(order_);
  in_flight_.push_back(std::move(planned));
  return true;
}

// Sequences of a micro-batch, so that each of those in flight has its share of them.
int64_t Scheduler::GroupSize() const {
  int64_t sequences = static_cast<int64_t>(running_.size());
  if (cache_.free_pages() > SparePages()) {
    sequences += std::min(
        static_cast<int64_t>(free_slots_.size()),
        options_.policy == BatchPolicy::kContinuous || running() == 0 ? waiting() : batch_left_);
  }
  return std::max<int64_t>(1, (sequences + options_.micro_batches - 1) / options_.micro_batches);
}

// What the plan could still have taken of those who wait.
int64_t Scheduler::IdleSlots(const StepPlan& plan) const {
  const int64_t mine =
      (options_.max_num_seqs + options_.micro_batches - 1) / options_.micro_batches;
  const int64_t rows = mine - static_cast<int64_t>(plan.chunks.size());
  if (budget_ == 0 || rows <= 0) return 0;
  const auto ready = [this](const Sequence* sequence) { return !WaitsForParent(*sequence); };
  if (std::none_of(waiting_.begin(), waiting_.end(), ready)) return std::min(held_back_, budget_);
  const bool decodes_only = std::all_of(plan.chunks.begin(), plan.chunks.end(),
                                        [](const Chunk& chunk) { return chunk.decode; });
  return decodes_only && held_back_ <= rows ? std::min(rows, budget_) : budget_;
}

// A micro-batch that was full starts the next one after itself, so that all get their turn.
void Scheduler::AddDecodes(StepPlan* plan) {
  const size_t count = running_.size();
  const size_t first = first_decode_ < count ? first_decode_ : 0;
  first_decode_ = 0;
  prefills_left_ = false;
  passes_.assign(running_.begin() + first, running_.end());
  passes_.insert(passes_.end(), running_.begin(), running_.begin() + first);
  order_.clear();
  for (size_t i = 0; i < count; ++i) {
    Sequence* sequence = passes_[i];
    if (i + kFetchAhead < count) Fetch(passes_[i + kFetchAhead]);
    if (!sequence->ReadyToDecode(options_.lookahead)) {
      prefills_left_ |= sequence->ReadyToPrefill();
      continue;
    }
    if (Full(*plan)) {
      first_decode_ = (first + i) % count;
      break;
    }
    DropPages(sequence);
    // Without a page to be had it waits where it is: those before it go on and end.
    if (TokensThatFit(*sequence, 0) < 1 && !MakeRoom(sequence, 1)) {
      ++held_back_;
      continue;
    }
    AddChunk(sequence, 1, plan);
  }
}

void Scheduler::AddPrefills(StepPlan* plan) {
  if (!prefills_left_) return;
  passes_.assign(running_.begin(), running_.end());
  for (Sequence* sequence : passes_) {
    if (Full(*plan)) return;
    if (!sequence->ReadyToPrefill()) continue;
    DropPages(sequence);
    const int64_t left = sequence->length() - sequence->scheduled;
    int64_t tokens = 0;
    if (TokensThatFit(*sequence, 0) >= 1 || MakeRoom(sequence, 1))
      tokens = std::min({left, budget_, TokensThatFit(*sequence, 0)});
    held_back_ += left - tokens;
    if (tokens > 0) AddChunk(sequence, tokens, plan);
  }
}

// In order of priority and age. Nobody overtakes a request that has no room yet, or it could wait
// for ever; only samples that wait for their prompt to be computed are passed over.
void Scheduler::AddWaiting(StepPlan* plan) {
  if (!OpenBatch()) return;
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (Full(*plan) || free_slots_.empty()) return;
    Sequence* sequence = *it++;
    if (sequence->unsampled > 0) return;  // what it is computed again from is not known yet
    const bool joins = options_.policy != BatchPolicy::kContinuous && !sequence->admitted_before;
    if (WaitsForParent(*sequence) || (joins && batch_left_ == 0)) continue;
    if (!Admit(sequence, plan)) return;
    if (joins) --batch_left_;
  }
}

bool Scheduler::OpenBatch() {
  if (options_.policy == BatchPolicy::kContinuous) return true;
  if (running() > 0 || waiting_.empty()) return true;  // of the open batch some may be left
  bool begin = draining_ || waiting() >= options_.max_num_seqs;
  for (const Sequence* sequence : waiting_) {
    begin |= sequence->admitted_before;
    begin |= options_.policy == BatchPolicy::kDynamic &&
             now_us_ - sequence->request.arrival_us >= options_.batch_window_us;
  }
  batch_left_ = begin ? std::min(options_.max_num_seqs, waiting()) : 0;
  return begin;
}

int64_t Scheduler::NextTime() const {
  int64_t time = std::numeric_limits<int64_t>::max();
  const bool gathering = options_.policy == BatchPolicy::kDynamic && running() == 0;
  for (const auto& slab : slabs_) {
    for (const Sequence& sequence : std::span(slab.get(), kSlab)) {
      if (sequence.state == Sequence::State::kUnused) continue;
      const Request& request = sequence.request;
      if (request.deadline_us > 0) time = std::min(time, request.deadline_us);
      if (gathering) time = std::min(time, request.arrival_us + options_.batch_window_us);
    }
  }
  return time;
}

bool Scheduler::WaitsForParent(const Sequence& sequence) const {
  const Sequence* parent = sequence.parent;
  return parent != nullptr && parent->number == sequence.parent_number && parent->running() &&
         (!parent->prompt_planned || parent->prompt_step == next_step_);
}

// A sample of a prompt that another one has computed: shares its pages and computes only the
// prompt's last token, to have logits of its own. Where that token's page is partly filled,
// AddChunk copies it.
bool Scheduler::Fork(Sequence* sequence) {
  const Sequence* parent = sequence->parent;
  sequence->parent = nullptr;
  if (parent == nullptr || parent->number != sequence->parent_number || !parent->running())
    return false;
  const int64_t shared = sequence->prompt_tokens - 1;
  const int64_t seen =
      options_.sliding_window > 0 ? std::max<int64_t>(0, shared - options_.sliding_window + 1) : 0;
  if (seen / options_.page_size < parent->dropped_pages) return false;
  const auto pages = parent->pages.begin();
  sequence->pages.assign(pages, pages + PagesFor(shared));
  for (const int32_t page : sequence->pages) {
    if (page >= 0) cache_.Retain(page);
  }
  sequence->shares_last_page = shared % options_.page_size != 0;
  sequence->dropped_pages = parent->dropped_pages;
  sequence->scheduled = shared;
  return true;
}

bool Scheduler::Admit(Sequence* sequence, StepPlan* plan) {
  const int64_t spare = SparePages();
  if (cache_.free_pages() <= spare) return false;
  if (!Fork(sequence) && options_.prefix_cache) {
    const std::span<const TokenId> tokens(sequence->tokens);
    // The last token is computed in any case: its logits are wanted.
    sequence->cached_entry = cache_.Match(tokens.first(tokens.size() - 1), &sequence->pages);
    sequence->cached_pages = static_cast<int64_t>(sequence->pages.size());
    sequence->scheduled = sequence->cached_pages * options_.page_size;
    // What is found behind the window stays with the cache: with few pages it would leave no room
    // to go on from.
    DropPages(sequence);
  }
  const int64_t left = sequence->length() - sequence->scheduled;
  const int64_t tokens = std::min({left, budget_, TokensThatFit(*sequence, spare)});
  if (tokens < 1) {
    ReleasePages(sequence);
    return false;
  }
  WaitNoMore(sequence);
  running_.push_back(sequence);
  sequence->state = Sequence::State::kRunning;
  sequence->admitted_before = true;
  sequence->slot = free_slots_.back();
  free_slots_.pop_back();
  admitted_.push_back(sequence->request.id);
  stats_.prompt_tokens += sequence->length();
  stats_.cached_tokens += sequence->scheduled;
  plan->new_sequences.push_back({.slot = sequence->slot,
                                 .prompt_tokens = static_cast<int32_t>(sequence->prompt_tokens),
                                 .computed_tokens = static_cast<int32_t>(sequence->scheduled),
                                 .num_pages = static_cast<int32_t>(sequence->pages.size()),
                                 .sampling = sequence->request.sampling});
  const auto begin = sequence->tokens.begin();
  plan->tokens.insert(plan->tokens.end(), begin, begin + sequence->scheduled);
  for (const int32_t page : sequence->pages) plan->pages.push_back(std::max(page, 0));
  AddChunk(sequence, tokens, plan);
  return true;
}

// Pages that none of the sequence's later tokens looks at; of several the last one first, as in
// ReleasePages.
void Scheduler::DropPages(Sequence* sequence) {
  if (options_.sliding_window == 0) return;
  const int64_t seen = sequence->scheduled - options_.sliding_window + 1;
  const int64_t end = std::max(sequence->dropped_pages, seen / options_.page_size);
  for (int64_t page = end - 1; page >= sequence->dropped_pages; --page) {
    if (sequence->pages[page] < 0) continue;
    cache_.Release(sequence->pages[page]);
    sequence->pages[page] = -1;
  }
  sequence->dropped_pages = end;
}

// Left free when somebody new is admitted: room for two more tokens of each running sequence, on
// average. With less, who comes in would soon be preempted again.
int64_t Scheduler::SparePages() const {
  return PagesFor(2 * static_cast<int64_t>(running_.size()));
}

// 1 when the page that the next token goes to is somebody else's too.
int64_t Scheduler::CopiesFor(const Sequence& sequence) const {
  if (!sequence.shares_last_page) return 0;
  return cache_.pages().references(sequence.pages.back()) > 1;
}

int64_t Scheduler::TokensThatFit(const Sequence& sequence, int64_t spare_pages) const {
  const int64_t more = cache_.free_pages() - CopiesFor(sequence) - spare_pages;
  if (more < 0) return 0;
  const int64_t pages = static_cast<int64_t>(sequence.pages.size()) + more;
  return pages * options_.page_size - sequence.scheduled;
}

// Preempts sequences that come after this one until so many pages are free. A sequence of the plan
// being made stays.
bool Scheduler::MakeRoom(Sequence* sequence, int64_t pages) {
  while (cache_.free_pages() < pages) {
    Sequence* last = nullptr;
    for (Sequence* other : running_) {
      if (other->planned_step == next_step_ || other->Key() <= sequence->Key()) continue;
      if (last == nullptr || last->Key() < other->Key()) last = other;
    }
    if (last == nullptr) return false;
    Preempt(last);
  }
  return true;
}

void Scheduler::Preempt(Sequence* sequence) {
  sequence->lost_tokens = std::max(sequence->lost_tokens, sequence->scheduled);
  LeaveRunning(sequence);
  Wait(sequence);
  ++stats_.preemptions;
  preempted_ = true;
}

void Scheduler::AddChunk(Sequence* sequence, int64_t tokens, StepPlan* plan) {
  Chunk& chunk = plan->chunks.emplace_back();  // in place: a copy would wait for its own stores
  chunk.slot = sequence->slot;
  chunk.position = static_cast<int32_t>(sequence->scheduled);
  chunk.num_tokens = static_cast<int32_t>(tokens);
  chunk.decode = sequence->ReadyToDecode(options_.lookahead);
  chunk.page_index = static_cast<int32_t>(sequence->pages.size());
  if (CopiesFor(*sequence) > 0) {
    int32_t& page = sequence->pages.back();
    CHECK_EQ(sequence->scheduled / options_.page_size + 1, chunk.page_index);
    plan->page_copies.push_back({.source = page, .target = cache_.Allocate()});
    cache_.Release(page);
    page = plan->page_copies.back().target;
    chunk_pages_.push_back(page);
    --chunk.page_index;
    ++chunk.num_pages;
    ++stats_.page_copies;
  }
  sequence->shares_last_page = false;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t position = sequence->scheduled + i;
    const int64_t last = sequence->length() - 1;
    chunk_tokens_.push_back(position < last    ? sequence->tokens[position]
                            : position == last ? sequence->last_token
                                               : kSampledBefore);
  }
  stats_.wasted_tokens +=
      std::clamp<int64_t>(sequence->lost_tokens - sequence->scheduled, 0, tokens);
  sequence->scheduled += tokens;
  while (static_cast<int64_t>(sequence->pages.size()) * options_.page_size < sequence->scheduled) {
    sequence->pages.push_back(cache_.Allocate());
    chunk_pages_.push_back(sequence->pages.back());
    ++chunk.num_pages;
  }
  if (!sequence->prompt_planned && sequence->scheduled >= sequence->prompt_tokens) {
    sequence->prompt_planned = true;
    sequence->prompt_step = next_step_;
  }
  if (sequence->scheduled == sequence->length() + sequence->unsampled) {
    chunk.logit_rows = LogitRows::kLast;
    ++sequence->unsampled;
  }
  sequence->planned_step = next_step_;
  budget_ -= tokens;
  order_.push_back({sequence, sequence->number});
  CachePages(sequence);
}

}  // namespace trireme
