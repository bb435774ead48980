#include "runtime/sampler_row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/philox.h"

namespace trireme {
namespace {

using Candidate = Sampler::Candidate;
// Candidates a shard sends first for top-p, and for min-p; for top-p eight times more each retry.
constexpr int64_t kFirstNucleus = Sampler::kCapturedCandidates;
constexpr double kLowest = -std::numeric_limits<double>::infinity();

}  // namespace

void Sampler::RowState::Reserve(int64_t candidates, int64_t tokens) {
  for (auto* list : {&local.best, &best}) list->reserve(candidates);
  penalties.reserve(std::bit_ceil(static_cast<uint64_t>(tokens)));
}

void Sampler::RowState::Start(const SampleRow& sample_row, Range shard) {
  row = &sample_row;
  n = shard.size();
  first_id = static_cast<int32_t>(shard.begin);
  local.terms = terms = {};
  local.drawn = drawn = {};
  for (auto* list : {&local.best, &local.raw_top, &best, &raw_top}) list->clear();
  certain = 0;
  asked = 0;
  complete = redraw = false;
  chosen = {};
  penalties.clear();
  if (params().HasPenalties()) StartPenalties(shard);
}

// Sorted by token, so that each one's occurrences lie together: 0 in the prompt, 1 in the output.
void Sampler::RowState::StartPenalties(Range shard) {
  penalties.reserve(std::bit_ceil(row->tokens.size()));
  for (size_t i = 0; i < row->tokens.size(); ++i) {
    const int32_t id = row->tokens[i];
    if (id < shard.begin || id >= shard.end) continue;
    penalties.push_back({id, static_cast<int64_t>(i) >= row->prompt_tokens ? 1.0f : 0.0f});
  }
  std::sort(penalties.begin(), penalties.end(),
            [](const Penalty& a, const Penalty& b) { return a.id < b.id; });
  size_t kept = 0;
  for (size_t i = 0; i < penalties.size();) {
    const int32_t id = penalties[i].id;
    float count = 0.0f;
    for (; i < penalties.size() && penalties[i].id == id; ++i) count += penalties[i].subtract;
    const float subtract =
        count > 0.0f ? params().presence_penalty + params().frequency_penalty * count : 0.0f;
    penalties[kept++] = {id, subtract};
  }
  penalties.resize(kept);
}

int64_t Sampler::RowState::CandidatesWanted(bool several_shards) const {
  if (params().temperature == 0.0f) return 1;
  if (params().top_k > 0) return params().top_k;
  if (params().top_p < 1.0f) return kFirstNucleus;
  if (params().min_p <= 0.0f) return 0;
  // Its draw needs to know the largest score; instead of another, a choice among candidates may do.
  return several_shards ? kFirstNucleus : 1;
}

double Sampler::RowState::MinPMargin() const {
  if (params().min_p <= 0.0f) return kLowest;
  return std::log(static_cast<double>(params().min_p)) / inverse_temperature();
}

void Sampler::RowState::Merge(std::span<const ShardView> shards) {
  if (!shards[0].best.empty()) {
    MergeCandidates(shards);
    MergeTerms(shards);
  }
  MergeDraws(shards);
}

// A shard draws from what is near the largest score it knows. What it drew is also the best of what
// is near the largest of all shards, where it is among that; where it is not, and the shard has
// something that is, it must draw again.
void Sampler::RowState::MergeDraws(std::span<const ShardView> shards) {
  if (redraw) drawn = {};
  redraw = false;
  const double threshold = params().min_p > 0.0f ? terms.max + MinPMargin() : kLowest;
  for (const ShardView& shard : shards) {
    const Candidate& candidate = shard.drawn.candidate;
    if (candidate.id < 0) continue;
    if (candidate.score < threshold) {
      redraw = redraw || shard.terms.max >= threshold;
      continue;
    }
    // Shards hold ascending ids, so the smaller id wins a tie.
    if (drawn.candidate.id < 0 || shard.drawn.key > drawn.key) drawn = shard.drawn;
  }
}

void Sampler::RowState::MergeCandidates(std::span<const ShardView> shards) {
  best.clear();
  complete = true;
  Candidate best_last = kAfterAll;
  for (const ShardView& shard : shards) {
    const Candidate* last = nullptr;
    for (const Candidate& candidate : shard.best) {
      if (candidate.id < 0) continue;
      best.push_back(candidate);
      if (last == nullptr || Before(*last, candidate)) last = &candidate;
    }
    // Tokens that a shard did not send come after its last candidate.
    if (shard.n > asked) {
      complete = false;
      if (last != nullptr && Before(*last, best_last)) best_last = *last;
    }
    for (const Candidate& candidate : shard.raw_top) {
      if (candidate.id >= 0) raw_top.push_back(candidate);
    }
  }
  certain = static_cast<size_t>(SortCandidates(best, best_last));
  std::sort(raw_top.begin(), raw_top.end(), Before);
}

void Sampler::RowState::MergeTerms(std::span<const ShardView> shards) {
  ShardTerms all{.raw_max = kLowest, .raw_sum = 0.0, .max = kLowest, .sum = 0.0};
  bool raw_terms = false;
  for (const ShardView& shard : shards) {
    all.max = std::max(all.max, shard.terms.max);
    all.raw_max = std::max(all.raw_max, shard.terms.raw_max);
    raw_terms = raw_terms || shard.terms.raw_sum > 0.0;
  }
  for (const ShardView& shard : shards) {
    const ShardTerms& t = shard.terms;
    if (t.sum > 0.0) all.sum += t.sum * std::exp((t.max - all.max) * inverse_temperature());
    if (t.raw_sum > 0.0) all.raw_sum += t.raw_sum * std::exp(t.raw_max - all.raw_max);
  }
  if (!raw_terms) {  // not part of this visit
    all.raw_max = terms.raw_max;
    all.raw_sum = terms.raw_sum;
  }
  terms = all;
}

bool Sampler::RowState::Choose() {
  if (!filtered()) {
    chosen = drawn.candidate;
    return true;
  }
  if (best.empty()) return true;  // nothing to choose from; chosen stays empty
  if (params().temperature == 0.0f) {
    chosen = best[0];
    return true;
  }
  return ChooseFiltered();
}

bool Sampler::RowState::ChooseFiltered() {
  const auto mass = [&](const Candidate& c) {
    return std::exp((static_cast<double>(c.score) - terms.max) * inverse_temperature());
  };
  const int64_t left =
      CountLeft(filters(), static_cast<int64_t>(best.size()), static_cast<int64_t>(certain),
                complete, terms.sum, [&](int64_t i) { return mass(best[i]); });
  if (left < 0) return false;
  chosen = DrawAmong({best.data(), static_cast<size_t>(left)}, inverse_temperature(), params().seed,
                     position());
  return true;
}

SampledToken Sampler::RowState::Result() const {
  SampledToken token;
  // Nothing was left to choose, or what was left is no number: an infinite hidden state makes
  // infinite logits.
  if (chosen.id < 0 || !std::isfinite(chosen.raw)) return token;
  token.token = chosen.id;
  if (params().logprobs < 0) return token;
  const double log_total = terms.raw_max + std::log(terms.raw_sum);
  token.logprob = static_cast<float>(chosen.raw - log_total);
  for (int32_t i = 0; i < params().logprobs && i < static_cast<int32_t>(raw_top.size()); ++i) {
    token.top.emplace_back(raw_top[i].id, static_cast<float>(raw_top[i].raw - log_total));
  }
  return token;
}

}  // namespace trireme
