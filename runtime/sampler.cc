#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <unordered_map>

#include "kernels/check.h"
#include "runtime/philox.h"

namespace trireme {
namespace {

using Candidate = Sampler::Candidate;
using Terms = Sampler::Terms;
constexpr int64_t kFirstNucleus =
    64;  // candidates a shard sends first for top-p; eight times more each retry
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Total order: higher score first, then the smaller id.
bool Before(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

float Maximum(const float* x, int64_t n) {
  float best = kLowest;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

double ExpSum(const float* x, int64_t n, float max, double inverse_temperature) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i)
    sum += std::exp((static_cast<double>(x[i]) - max) * inverse_temperature);
  return sum;
}

// The `count` best of x [n] in order; ids start at `first_id`.
std::vector<Candidate> Best(const float* x, int64_t n, int64_t first_id, int64_t count) {
  std::vector<Candidate> heap;  // the worst of the best on top
  count = std::min(count, n);
  if (count == 0) return heap;
  if (count == 1) {
    const float best = Maximum(x, n);
    const int64_t at = std::find(x, x + n, best) - x;
    if (at < n) heap.push_back({best, best, static_cast<int32_t>(first_id + at)});
    return heap;
  }
  heap.reserve(count);
  for (int64_t i = 0; i < n; ++i) {
    const Candidate candidate{x[i], x[i], static_cast<int32_t>(first_id + i)};
    if (static_cast<int64_t>(heap.size()) < count) {
      heap.push_back(candidate);
      std::push_heap(heap.begin(), heap.end(), Before);
    } else if (x[i] > heap.front().score) {  // ids ascend, so an equal score never displaces
      std::pop_heap(heap.begin(), heap.end(), Before);
      heap.back() = candidate;
      std::push_heap(heap.begin(), heap.end(), Before);
    }
  }
  std::sort_heap(heap.begin(), heap.end(), Before);
  return heap;
}

}  // namespace

// What is known of a row: its local logits, and after Exchange the merged view that is the same on
// all ranks.
struct Sampler::RowState {
  const SampleRow* row = nullptr;
  float* logits = nullptr;  // [n]
  int64_t n = 0;
  int64_t first_id = 0;
  std::unordered_map<int32_t, float> raw;  // logits that penalties changed, as the model gave them
  std::vector<Candidate> local_raw_top;    // taken before the penalties
  double local_raw_max = 0, local_raw_sum = 0;
  // Merged over shards.
  std::vector<Candidate> merged;  // in order
  size_t certain = 0;  // how many of them are surely the best ones of the whole vocabulary
  std::vector<Candidate> raw_top;
  double max = 0, sum = 0, raw_max = 0, raw_sum = 0;
  Candidate chosen;

  const SamplingParams& params() const { return *row->params; }
  double inverse_temperature() const {
    return params().temperature > 0.0f ? 1.0 / params().temperature : 1.0;
  }
  bool filtered() const {
    return params().temperature == 0.0f || params().top_k > 0 || params().top_p < 1.0f;
  }
  uint64_t position() const { return row->tokens.size(); }

  int64_t CandidatesWanted() const {
    if (params().temperature == 0.0f) return 1;
    if (params().top_k > 0) return params().top_k;
    return params().top_p < 1.0f ? kFirstNucleus : 1;
  }
  void KeepRaw() {
    if (params().logprobs < 0) return;
    local_raw_max = Maximum(logits, n);
    local_raw_sum = n > 0 ? ExpSum(logits, n, static_cast<float>(local_raw_max), 1.0) : 0.0;
    local_raw_top = Best(logits, n, first_id, params().logprobs);
  }
  void ApplyPenalties() {
    if (!params().HasPenalties()) return;
    std::map<int32_t, int32_t> output_counts;  // of every token seen; 0 = only in the prompt
    for (size_t i = 0; i < row->tokens.size(); ++i) {
      const int32_t id = row->tokens[i];
      if (id < first_id || id >= first_id + n) continue;
      output_counts[id] += static_cast<int64_t>(i) >= row->prompt_tokens ? 1 : 0;
    }
    for (const auto& [id, count] : output_counts) {
      float& x = logits[id - first_id];
      raw[id] = x;
      x = x > 0.0f ? x / params().repetition_penalty : x * params().repetition_penalty;
      if (count > 0)
        x -= params().presence_penalty + params().frequency_penalty * static_cast<float>(count);
    }
  }
  void RestoreRaw(Candidate& candidate) const {
    if (const auto it = raw.find(candidate.id); it != raw.end()) candidate.raw = it->second;
  }
  double Key(const Candidate& c) const {
    return static_cast<double>(c.score) * inverse_temperature() +
           GumbelNoise(params().seed, position(), static_cast<uint32_t>(c.id));
  }
  // Chooses from the merged candidates. False when top-p needs more of them than are certain.
  bool Choose() {
    if (merged.empty()) return true;  // nothing to choose from; chosen stays empty
    if (params().temperature == 0.0f) {
      chosen = merged[0];
      return true;
    }
    const auto mass = [&](const Candidate& c) {
      return std::exp((static_cast<double>(c.score) - max) * inverse_temperature());
    };
    size_t kept = certain;
    double total = sum;
    if (params().top_k > 0) {
      kept = std::min<size_t>(merged.size(), params().top_k);
      total = 0.0;
      for (size_t i = 0; i < kept; ++i) total += mass(merged[i]);
    }
    if (params().top_p < 1.0f) {
      double cumulative = 0.0;
      size_t nucleus = 0;
      while (nucleus < kept && cumulative < params().top_p * total)
        cumulative += mass(merged[nucleus++]);
      // Rounding may leave the sum of everything just below top_p * total; then all of it is the
      // nucleus.
      if (params().top_k == 0 && cumulative < params().top_p * total && certain < merged_limit)
        return false;
      kept = nucleus;
    }
    while (kept > 1 && mass(merged[kept - 1]) < params().min_p) --kept;
    chosen = *std::max_element(merged.begin(), merged.begin() + kept,
                               [&](const Candidate& a, const Candidate& b) {
                                 const double ka = Key(a), kb = Key(b);
                                 return ka != kb ? ka < kb : a.id > b.id;
                               });
    return true;
  }
  size_t merged_limit = 0;  // size of the whole vocabulary
};

// One all-gather: every rank's softmax terms and best candidates of the rows, then the same merge
// everywhere.
void Sampler::Exchange(Stream& stream, std::vector<RowState*>& rows, int64_t candidates,
                       int64_t raw_candidates) {
  const int64_t ranks = tp_->size();
  const size_t row_bytes =
      sizeof(int64_t) + sizeof(Terms) + (candidates + raw_candidates) * sizeof(Candidate);
  send_.assign(rows.size() * row_bytes, 0);
  receive_.resize(send_.size() * ranks);
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& row = *rows[r];
    char* out = send_.data() + r * row_bytes;
    Terms terms{row.local_raw_max, row.local_raw_sum, 0.0, 0.0};
    terms.max = Maximum(row.logits, row.n);
    const bool need_sum =
        row.params().temperature > 0.0f && row.params().top_k == 0 && row.params().top_p < 1.0f;
    if (need_sum && row.n > 0)
      terms.sum =
          ExpSum(row.logits, row.n, static_cast<float>(terms.max), row.inverse_temperature());
    std::memcpy(out, &row.n, sizeof(int64_t));
    std::memcpy(out + sizeof(int64_t), &terms, sizeof(Terms));
    std::vector<Candidate> best = Best(row.logits, row.n, row.first_id, candidates);
    for (Candidate& candidate : best) row.RestoreRaw(candidate);
    best.resize(candidates);
    row.local_raw_top.resize(raw_candidates);
    char* list = out + sizeof(int64_t) + sizeof(Terms);
    std::memcpy(list, best.data(), candidates * sizeof(Candidate));
    if (raw_candidates > 0) {
      std::memcpy(list + candidates * sizeof(Candidate), row.local_raw_top.data(),
                  raw_candidates * sizeof(Candidate));
    }
  }
  const int64_t bytes = static_cast<int64_t>(send_.size());
  tp_->AllGather(stream, ConstTensorView(send_.data(), DType::kU8, {bytes}),
                 TensorView(receive_.data(), DType::kU8, {bytes * ranks}));
  CHECK(stream.Synchronize().ok());

  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& row = *rows[r];
    row.merged.clear();
    row.raw_top.clear();
    row.merged_limit = 0;
    std::vector<Terms> all(ranks);
    Candidate best_last{kLowest, 0.0f, std::numeric_limits<int32_t>::max()};
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const char* in = receive_.data() + rank * bytes + r * row_bytes;
      int64_t n;
      std::memcpy(&n, in, sizeof(n));
      std::memcpy(&all[rank], in + sizeof(n), sizeof(Terms));
      const char* list = in + sizeof(n) + sizeof(Terms);
      for (int64_t i = 0; i < candidates + raw_candidates; ++i) {
        Candidate candidate;
        std::memcpy(&candidate, list + i * sizeof(Candidate), sizeof(Candidate));
        if (candidate.id < 0) continue;
        (i < candidates ? row.merged : row.raw_top).push_back(candidate);
        // Tokens that a shard did not send come after its last candidate.
        if (i == candidates - 1 && n > candidates && Before(candidate, best_last))
          best_last = candidate;
      }
      row.merged_limit += static_cast<size_t>(n);
    }
    std::sort(row.merged.begin(), row.merged.end(), Before);
    std::sort(row.raw_top.begin(), row.raw_top.end(), Before);
    row.certain = std::upper_bound(row.merged.begin(), row.merged.end(), best_last, Before) -
                  row.merged.begin();
    row.max = row.raw_max = kLowest;
    for (const Terms& terms : all)
      row.max = std::max(row.max, terms.max), row.raw_max = std::max(row.raw_max, terms.raw_max);
    row.sum = row.raw_sum = 0.0;
    for (const Terms& terms : all) {
      if (terms.sum > 0)
        row.sum += terms.sum * std::exp((terms.max - row.max) * row.inverse_temperature());
      if (terms.raw_sum > 0) row.raw_sum += terms.raw_sum * std::exp(terms.raw_max - row.raw_max);
    }
  }
}

// Rows without top-k and top-p: the best of logit / temperature + noise over all tokens that min-p
// leaves.
void Sampler::DrawUnfiltered(Stream& stream, std::vector<RowState*>& rows) {
  struct Drawn {
    double key;
    Candidate candidate;
  };
  std::vector<Drawn> mine(rows.size()), all(rows.size() * tp_->size());
  for (size_t r = 0; r < rows.size(); ++r) {
    const RowState& row = *rows[r];
    Drawn best{-std::numeric_limits<double>::infinity(), {}};
    const double threshold = row.params().min_p > 0.0f
                                 ? row.max + std::log(static_cast<double>(row.params().min_p)) /
                                                 row.inverse_temperature()
                                 : -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < row.n; ++i) {
      const double score = row.logits[i];
      // Noise is bounded, so most tokens of a peaked distribution need none drawn.
      if (score < threshold || score * row.inverse_temperature() + kMaxGumbelNoise < best.key)
        continue;
      const Candidate candidate{row.logits[i], row.logits[i],
                                static_cast<int32_t>(row.first_id + i)};
      const double key = row.Key(candidate);
      if (key > best.key) best = {key, candidate};
    }
    row.RestoreRaw(best.candidate);
    mine[r] = best;
  }
  const int64_t bytes = static_cast<int64_t>(mine.size() * sizeof(Drawn));
  tp_->AllGather(stream, ConstTensorView(mine.data(), DType::kU8, {bytes}),
                 TensorView(all.data(), DType::kU8, {bytes * tp_->size()}));
  CHECK(stream.Synchronize().ok());
  for (size_t r = 0; r < rows.size(); ++r) {
    Drawn best = all[r];  // shards hold ascending ids, so the smaller id wins a tie
    for (int rank = 1; rank < tp_->size(); ++rank) {
      const Drawn& other = all[rank * rows.size() + r];
      if (other.key > best.key) best = other;
    }
    rows[r]->chosen = best.candidate;
  }
}

absl::StatusOr<std::vector<SampledToken>> Sampler::Sample(Stream& stream, TensorView logits,
                                                          std::span<const SampleRow> rows) {
  std::vector<RowState> states(rows.size());
  std::vector<RowState*> pending, unfiltered;
  int64_t candidates = 1, raw_candidates = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    RowState& state = states[r];
    state.row = &rows[r];
    state.logits = logits.row<float>(static_cast<int64_t>(r));
    state.n = vocabulary_.size();
    state.first_id = vocabulary_.begin;
    state.KeepRaw();
    state.ApplyPenalties();
    candidates = std::max(candidates, state.CandidatesWanted());
    raw_candidates = std::max<int64_t>(raw_candidates, state.params().logprobs);
    pending.push_back(&state);
  }
  if (pending.empty()) return std::vector<SampledToken>();
  candidates = std::min(candidates, widest_shard_);
  raw_candidates = std::min(raw_candidates, widest_shard_);
  Exchange(stream, pending, candidates, raw_candidates);
  std::vector<std::vector<Candidate>> raw_tops(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) raw_tops[r] = std::move(states[r].raw_top);
  for (RowState* state : pending) {
    if (!state->filtered()) unfiltered.push_back(state);
  }
  std::erase_if(pending, [](RowState* state) { return !state->filtered() || state->Choose(); });
  while (!pending.empty()) {
    candidates = std::min(8 * candidates, widest_shard_);
    Exchange(stream, pending, candidates, 0);
    std::erase_if(pending, [](RowState* state) { return state->Choose(); });
  }
  if (!unfiltered.empty()) DrawUnfiltered(stream, unfiltered);

  std::vector<SampledToken> out(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    const RowState& state = states[r];
    if (state.chosen.id < 0) {
      return absl::DataLossError(
          "the model gave no finite logit for any token: its weights hold NaN or infinity, or "
          "overflow this --dtype (try bf16 or f32)");
    }
    out[r].token = state.chosen.id;
    if (state.params().logprobs < 0) continue;
    const double log_total = state.raw_max + std::log(state.raw_sum);
    out[r].logprob = static_cast<float>(state.chosen.raw - log_total);
    for (int32_t i = 0; i < state.params().logprobs && i < static_cast<int32_t>(raw_tops[r].size());
         ++i) {
      out[r].top.emplace_back(raw_tops[r][i].id,
                              static_cast<float>(raw_tops[r][i].raw - log_total));
    }
  }
  return out;
}

}  // namespace trireme
