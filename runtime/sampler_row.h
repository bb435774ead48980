// One row on its way through the sampler: what its shards sent, merged, and the choice. Internal to
// sampler*.cc.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "kernels/sampling.h"
#include "kernels/token_choice.h"
#include "runtime/sampler.h"

namespace trireme {

// Softmax terms of a shard: exp is summed relative to the shard's own maximum.
struct ShardTerms {
  double raw_max = 0, raw_sum = 0, max = 0, sum = 0;
};
struct DrawnToken {
  double key = 0;
  Sampler::Candidate candidate{};
};
// What one shard knows of a row.
struct ShardView {
  int64_t n = 0;  // tokens of the shard
  ShardTerms terms;
  DrawnToken drawn;
  std::vector<Sampler::Candidate> best, raw_top;  // in any order; id -1 = none
};

struct Sampler::RowState {
  struct Penalty {
    int32_t id;
    float subtract;
    float raw = 0.0f;  // the logit as the model gave it, once it is changed
  };

  const SampleRow* row = nullptr;
  int64_t n = 0;
  int32_t first_id = 0;
  int64_t asked = 0;               // candidates of each shard, in the last visit that brought any
  std::vector<Penalty> penalties;  // of this shard's tokens that were seen, by id
  ShardView local;
  // Merged over shards: the same on all ranks.
  std::vector<Candidate> best;     // in order
  size_t certain = 0;              // how many of them are surely the whole vocabulary's best
  bool complete = false;           // they are the whole vocabulary
  std::vector<Candidate> raw_top;  // in order
  ShardTerms terms;
  DrawnToken drawn;
  bool redraw = false;  // a shard drew what min-p does not leave, and may have another
  Candidate chosen;

  // So many candidates, and penalties of so many tokens, then take no memory more.
  void Reserve(int64_t candidates, int64_t tokens);
  // Forgets the row before; what it held is used again.
  void Start(const SampleRow& sample_row, Range shard);
  // Takes over what is there of best, raw_top, terms and drawn.
  void Merge(std::span<const ShardView> shards);
  // Chooses from what is merged. False when top-p needs more candidates than are certain.
  bool Choose();
  SampledToken Result() const;  // token -1: no logit is finite

  const SamplingParams& params() const { return *row->params; }
  double inverse_temperature() const {
    return params().temperature > 0.0f ? 1.0 / params().temperature : 1.0;
  }
  // Chosen among merged candidates; else drawn from the whole vocabulary.
  bool filtered() const {
    return params().temperature == 0.0f || params().top_k > 0 || params().top_p < 1.0f;
  }
  Choice choice() const {
    if (!filtered()) return Choice::kDrawn;
    return params().temperature == 0.0f ? Choice::kGreedy : Choice::kFiltered;
  }
  TokenFilters filters() const {
    return {inverse_temperature(), static_cast<double>(params().top_k), params().top_p,
            params().min_p, MinPMargin()};
  }
  bool NeedsSum() const {
    return params().temperature > 0.0f && params().top_k == 0 && params().top_p < 1.0f;
  }
  uint64_t position() const { return row->tokens.size(); }
  // Of a vocabulary that is cut into several shards, or of one.
  int64_t CandidatesWanted(bool several_shards) const;
  // How far below the largest score min-p leaves tokens: -inf or a number of at most 0.
  double MinPMargin() const;
  void RestoreRaw(Candidate& candidate) const {
    const auto it = std::lower_bound(penalties.begin(), penalties.end(), candidate.id,
                                     [](const Penalty& p, int32_t id) { return p.id < id; });
    if (it != penalties.end() && it->id == candidate.id) candidate.raw = it->raw;
  }

 private:
  void StartPenalties(Range shard);
  bool ChooseFiltered();
  void MergeCandidates(std::span<const ShardView> shards);
  void MergeTerms(std::span<const ShardView> shards);
  void MergeDraws(std::span<const ShardView> shards);
};

}  // namespace trireme
