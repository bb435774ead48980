#include "tests/runtime/fake_ranks.h"

#include <algorithm>

namespace trireme {
namespace {

uint64_t Mix(uint64_t hash, TokenId token) {
  hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 29);
}
TokenId Draw(uint64_t hash, uint64_t seed) {
  return static_cast<TokenId>(Mix(hash, static_cast<TokenId>(seed)) % 1000);
}
constexpr uint64_t kStart = 17;

}  // namespace

FakeRanks::FakeRanks(const SchedulerOptions& options)
    : options_(options),
      slots_(options.max_num_seqs),
      cells_(options.num_pages * options.page_size),
      last_plan_of_slot_(options.max_num_seqs, -1) {}

void FakeRanks::Start(const NewSequence& added, const TokenId* tokens, const int32_t* pages) {
  Slot& slot = slots_[added.slot];
  slot.seed = added.sampling.seed;
  slot.generation = next_generation_++;
  slot.sampled = -1;
  slot.sampling = 0;
  slot.hashes.clear();
  for (int32_t i = 0; i < added.computed_tokens; ++i)
    slot.hashes.push_back(Mix(i == 0 ? kStart : slot.hashes.back(), tokens[i]));
  slot.pages.assign(pages, pages + added.num_pages);
}

void FakeRanks::Compute(const Chunk& chunk, const TokenId* tokens, const int32_t* pages) {
  Slot& slot = slots_[chunk.slot];
  const int64_t size = options_.page_size;
  if (chunk.position != static_cast<int32_t>(slot.hashes.size())) Fail("a token lost or doubled");
  slot.pages.resize(std::max<size_t>(slot.pages.size(), chunk.page_index + chunk.num_pages));
  std::copy_n(pages, chunk.num_pages, slot.pages.begin() + chunk.page_index);
  for (int32_t i = 0; i < chunk.num_tokens; ++i) {
    TokenId token = tokens[i];
    if (token == kSampledBefore) {
      if (options_.lookahead == 0 || slot.sampled < 0) Fail("a token that nobody has sampled");
      token = slot.sampled;
    }
    slot.hashes.push_back(Mix(slot.hashes.empty() ? kStart : slot.hashes.back(), token));
  }
  const int64_t length = static_cast<int64_t>(slot.hashes.size());
  if (static_cast<int64_t>(slot.pages.size()) * size < length) {
    Fail("a token without a page");
    return;
  }
  for (int64_t p = chunk.position; p < length; ++p)
    cells_[slot.pages[p / size] * size + p % size] = slot.hashes[p];
}

void FakeRanks::Execute(const StepPlan& plan, StepResult* result) {
  const int64_t size = options_.page_size;
  result->step = plan.step;
  result->sampled.clear();
  if (plan.num_tokens() > options_.max_num_batched_tokens) Fail("more tokens than the budget");
  if (static_cast<int64_t>(plan.chunks.size()) > options_.max_num_seqs) Fail("too many sequences");
  for (const int32_t page : plan.pages) {
    if (page < 0 || page >= options_.num_pages) return Fail("no such page");
  }
  for (const PageCopy& copy : plan.page_copies)
    std::copy_n(cells_.begin() + copy.source * size, size, cells_.begin() + copy.target * size);
  const TokenId* tokens = plan.tokens.data();
  const int32_t* pages = plan.pages.data();
  for (const NewSequence& added : plan.new_sequences) {
    Start(added, tokens, pages);
    tokens += added.computed_tokens;
    pages += added.num_pages;
  }
  for (const Chunk& chunk : plan.chunks) {
    if (last_plan_of_slot_[chunk.slot] == plan.step) Fail("a sequence twice in one micro-batch");
    last_plan_of_slot_[chunk.slot] = plan.step;
    Compute(chunk, tokens, pages);
    tokens += chunk.num_tokens;
    pages += chunk.num_pages;
  }
  std::vector<Sampling>& sampling = in_flight_.emplace_back();
  // After all chunks have been written: whoever wrote to a page of somebody else shows here.
  for (const Chunk& chunk : plan.chunks) {
    Slot& slot = slots_[chunk.slot];
    const int64_t length = static_cast<int64_t>(slot.hashes.size());
    int64_t p = options_.sliding_window > 0
                    ? std::max<int64_t>(0, chunk.position - options_.sliding_window + 1)
                    : 0;
    for (; p < length; ++p) {
      if (cells_[slot.pages[p / size] * size + p % size] != slot.hashes[p])
        return Fail("a page holds another sequence's tokens");
    }
    if (slot.sampling > options_.lookahead) Fail("more steps in flight than allowed");
    if (chunk.logit_rows != LogitRows::kLast) continue;
    ++slot.sampling;
    sampling.push_back({chunk.slot, slot.generation});
    slot.sampled = Draw(slot.hashes.back(), slot.seed);
    result->sampled.push_back({slot.sampled, 0.0f, {}});
  }
}

void FakeRanks::Commit(const StepPlan&) {
  for (const Sampling& sampling : in_flight_.front()) {
    if (slots_[sampling.slot].generation == sampling.generation) --slots_[sampling.slot].sampling;
  }
  in_flight_.erase(in_flight_.begin());
}

std::vector<TokenId> FakeRanks::Alone(const Request& request, int32_t sample,
                                      const SchedulerOptions& options) {
  uint64_t hash = kStart;
  for (const TokenId token : request.prompt) hash = Mix(hash, token);
  std::vector<TokenId> out;
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t limit = std::min(request.max_tokens, options.max_model_len - prompt);
  while (static_cast<int64_t>(out.size()) < limit) {
    out.push_back(Draw(hash, request.sampling.seed + sample));
    hash = Mix(hash, out.back());
    if (!request.stop_tokens.empty() && out.back() == request.stop_tokens[0]) break;
  }
  return out;
}

}  // namespace trireme
