// The choice of tokens on the CPU: a row is one thread's work.
#include "kernels/token_choice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/sampling.h"
#include "kernels/token_candidates.h"

namespace trireme::cpu {
namespace {

constexpr double kLowest = -std::numeric_limits<double>::infinity();

using Candidate = TokenCandidate;

// The row of every shard's answers.
class Row {
 public:
  Row(const ShardAnswers& first, int64_t shard_bytes, const ChoiceOfRows& rows, int64_t row)
      : first_(first),
        shard_bytes_(shard_bytes),
        rows_(rows),
        row_(row),
        filters_(rows.filters.as<TokenFilters>()[row]) {}

  int64_t shards() const { return rows_.shards.dim(0); }
  int32_t first_id(int64_t shard) const { return rows_.shards.row<int32_t>(shard)[0]; }
  // Of a [R, n] tensor of shard 0: the row's `i`th of `shard`.
  template <typename T>
  T Of(ConstTensorView tensor, int64_t shard, int64_t i = 0) const {
    const int64_t at = row_ * (tensor.shape.rank == 2 ? tensor.dim(1) : 1) + i;
    return reinterpret_cast<const T*>(tensor.as<char>() + shard * shard_bytes_)[at];
  }

  // id -1: the answers do not tell.
  Candidate Choose() {
    Candidate chosen;
    if (Of<int32_t>(rows_.choices, 0) == static_cast<int32_t>(Choice::kDrawn)) {
      const double threshold = Threshold();
      if (!Drawn(threshold, &chosen) && MergeCandidates())
        chosen = DrawOf(
            CountNear(threshold, certain_, complete_, [&](int64_t i) { return best_[i].score; }));
    } else if (MergeCandidates()) {
      chosen = Of<int32_t>(rows_.choices, 0) == static_cast<int32_t>(Choice::kGreedy) ? best_[0]
                                                                                      : Filtered();
    }
    return std::isfinite(chosen.raw) ? chosen : Candidate{};
  }
  void WriteLogprobs(const Candidate& chosen, const ChosenTokens& out) {
    const int64_t wanted =
        std::min<int64_t>(Of<int32_t>(rows_.logprobs, 0), first_.raw_scores.dim(1));
    if (wanted < 0) return;
    double largest = kLowest, sum = 0.0;
    best_.clear();
    for (int64_t s = 0; s < shards(); ++s) {
      largest = std::max(largest, static_cast<double>(Of<float>(first_.raw_largest, s)));
      for (int64_t i = 0; i < wanted; ++i) {
        const int32_t column = Of<int32_t>(first_.raw_columns, s, i);
        const float raw = Of<float>(first_.raw_scores, s, i);
        if (column >= 0) best_.push_back({raw, raw, first_id(s) + column});
      }
    }
    for (int64_t s = 0; s < shards(); ++s) {
      const double part = Of<double>(first_.raw_sum, s);
      if (part > 0.0) sum += part * std::exp(Of<float>(first_.raw_largest, s) - largest);
    }
    const double log_total = largest + std::log(sum);
    out.logprobs.as<float>()[row_] = static_cast<float>(chosen.raw - log_total);
    std::sort(best_.begin(), best_.end(), Before);
    for (int64_t i = 0; i < std::min<int64_t>(wanted, best_.size()); ++i) {
      out.top_tokens.row<int32_t>(row_)[i] = best_[i].id;
      out.top_logprobs.row<float>(row_)[i] = static_cast<float>(best_[i].raw - log_total);
    }
  }

 private:
  // Of what min-p leaves.
  double Threshold() const {
    double threshold = kLowest;
    for (int64_t s = 0; filters_.min_p > 0.0 && s < shards(); ++s) {
      threshold =
          std::max(threshold, static_cast<double>(Of<float>(first_.largest, s)) + filters_.margin);
    }
    return threshold;
  }

  // A shard draws from what is near the largest score it knows. What it drew is also the best of
  // what is near the largest of all shards, where it is among that; where it is not, and the shard
  // has something that is, its draw does not tell: false.
  bool Drawn(double threshold, Candidate* chosen) const {
    Candidate best;
    double best_key = kLowest;
    for (int64_t s = 0; s < shards(); ++s) {
      const int32_t column = Of<int32_t>(first_.drawn, s);
      if (column < 0) return true;
      const float score = Of<float>(first_.drawn_scores, s);
      if (score < threshold) {
        if (Of<float>(first_.largest, s) >= threshold) return false;
        continue;
      }
      const double key = Of<double>(first_.keys, s);
      if (best.id >= 0 && key <= best_key) continue;  // ids ascend: the smaller wins a tie
      best = {score, Of<float>(first_.drawn_raw, s), first_id(s) + column};
      best_key = key;
    }
    *chosen = best;
    return true;
  }

  // False where a shard has answered nothing.
  bool MergeCandidates() {
    const int64_t k = std::min<int64_t>(first_.scores.dim(1), Of<int32_t>(rows_.counts, 0));
    best_.clear();
    complete_ = true;
    // Tokens that a shard did not send come after its last candidate.
    Candidate first_of_last = kAfterAll;
    for (int64_t s = 0; s < shards(); ++s) {
      const size_t had = best_.size();
      for (int64_t i = 0; i < k; ++i) {
        const int32_t column = Of<int32_t>(first_.columns, s, i);
        if (column < 0) break;
        best_.push_back(
            {Of<float>(first_.scores, s, i), Of<float>(first_.raw, s, i), first_id(s) + column});
      }
      if (best_.size() == had) return false;
      if (rows_.shards.row<int32_t>(s)[1] <= k) continue;
      complete_ = false;
      if (Before(best_.back(), first_of_last)) first_of_last = best_.back();
    }
    certain_ = SortCandidates(best_, first_of_last);
    if (static_cast<int64_t>(best_.size()) > kMergedCandidates) {
      best_.resize(kMergedCandidates);
      certain_ = std::min(certain_, kMergedCandidates);
      complete_ = false;
    }
    return true;
  }

  Candidate Filtered() const {
    double largest = kLowest, sum = 0.0;
    for (int64_t s = 0; s < shards(); ++s)
      largest = std::max(largest, static_cast<double>(Of<float>(first_.largest, s)));
    for (int64_t s = 0; s < shards(); ++s) {
      const double part = Of<double>(first_.sum, s);
      if (part <= 0.0) continue;
      sum +=
          part * std::exp((Of<float>(first_.largest, s) - largest) * filters_.inverse_temperature);
    }
    const auto mass = [&](int64_t i) {
      return std::exp((static_cast<double>(best_[i].score) - largest) *
                      filters_.inverse_temperature);
    };
    return DrawOf(
        CountLeft(filters_, static_cast<int64_t>(best_.size()), certain_, complete_, sum, mass));
  }

  // The `left` best; -1: none.
  Candidate DrawOf(int64_t left) const {
    const int64_t* seed = rows_.seeds.row<int64_t>(row_);
    return DrawAmong({best_.data(), static_cast<size_t>(std::max<int64_t>(0, left))},
                     filters_.inverse_temperature, static_cast<uint64_t>(seed[0]),
                     static_cast<uint64_t>(seed[1]));
  }

  const ShardAnswers& first_;
  const int64_t shard_bytes_;
  const ChoiceOfRows& rows_;
  const int64_t row_;
  const TokenFilters& filters_;
  static thread_local std::vector<Candidate> best_;  // in order
  int64_t certain_ = 0;  // so many of them are surely the vocabulary's best
  bool complete_ = false;
};
thread_local std::vector<Candidate> Row::best_;

// What `score` was before a penalty, if it had one.
float Restored(const int32_t* places, int32_t count, const float* before, int64_t row,
               int32_t column, float score) {
  int32_t first = 0, end = count;
  while (first < end) {
    const int32_t middle = (first + end) / 2;
    const int32_t* place = places + 2 * int64_t{middle};
    if (place[0] < row || (place[0] == row && place[1] < column)) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  const int32_t* place = places + 2 * int64_t{first};
  return first < count && place[0] == row && place[1] == column ? before[first] : score;
}

}  // namespace

void RestoreLogits(Stream& stream, ConstTensorView count, ConstTensorView places,
                   ConstTensorView before, const ShardAnswers& a) {
  const int64_t k = a.scores.dim(1);
  PoolOf(stream).ParallelFor(a.scores.dim(0), RowGrain(k), [&](int64_t begin, int64_t end) {
    const auto restored = [&](int64_t row, int32_t column, float score) {
      return Restored(places.as<int32_t>(), count.as<int32_t>()[0], before.as<float>(), row, column,
                      score);
    };
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        a.raw.row<float>(r)[i] =
            restored(r, a.columns.row<int32_t>(r)[i], a.scores.row<float>(r)[i]);
      }
      a.drawn_raw.as<float>()[r] =
          restored(r, a.drawn.as<int32_t>()[r], a.drawn_scores.as<float>()[r]);
    }
  });
}

void ChooseTokens(Stream& stream, const ShardAnswers& first, int64_t shard_bytes,
                  const ChoiceOfRows& rows, const ChosenTokens& chosen) {
  const int64_t l = first.raw_scores.dim(1);
  // An exponential and a logarithm a candidate take as long as some hundred elements.
  const int64_t elements = 100 * rows.shards.dim(0) * first.scores.dim(1);
  PoolOf(stream).ParallelFor(
      first.scores.dim(0), RowGrain(elements), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          chosen.logprobs.as<float>()[r] = 0.0f;
          std::fill_n(chosen.top_tokens.row<int32_t>(r), l, -1);
          std::fill_n(chosen.top_logprobs.row<float>(r), l, 0.0f);
          chosen.tokens.as<int32_t>()[r] = -1;
          if (rows.choices.as<int32_t>()[r] == static_cast<int32_t>(Choice::kNone)) continue;
          Row row(first, shard_bytes, rows, r);
          const Candidate token = row.Choose();
          chosen.tokens.as<int32_t>()[r] = token.id;
          if (token.id >= 0) row.WriteLogprobs(token, chosen);
        }
      });
}

}  // namespace trireme::cpu
