// The choice of tokens on the GPU: a block a row. Lists are in order, so a candidate's place among
// all shards' is its own plus what a binary search counts before it in each of the others.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/primitives.cuh"
#include "kernels/token_choice.h"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 128;

struct Candidate {
  float score, raw;
  int id;  // -1 = none
};

// Score and column of one shard's list, best first, up to a column of -1.
struct List {
  const float* scores;
  const int32_t* columns;
  int room;
  int first_id;

  // How many come before such a candidate: the higher score, on a tie the smaller id.
  __device__ int CountBefore(float score, int id) const {
    int first = 0, end = room;
    while (first < end) {
      const int middle = (first + end) / 2;
      const int32_t column = columns[middle];
      const float other = scores[middle];
      if (column >= 0 && (other > score || (other == score && first_id + column < id))) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }
  __device__ int Count() const {
    int first = 0, end = room;
    while (first < end) {
      const int middle = (first + end) / 2;
      if (columns[middle] >= 0) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }
};

// ShardAnswers and what is asked of them, as the kernel takes them.
struct Answers {
  int shards, candidates, raw_candidates;
  int64_t shard_bytes;
  const int32_t* shard_ranges;
  const float *largest, *scores, *raw, *drawn_scores, *drawn_raw, *raw_largest, *raw_scores;
  const double *sum, *keys, *raw_sum;
  const int32_t *columns, *drawn, *raw_columns;
  const int32_t *choices, *counts, *logprobs;
  const TokenFilters* filters;
  const int64_t* seeds;

  template <typename T>
  __device__ const T* Of(const T* of_first, int shard) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(of_first) +
                                      shard * shard_bytes);
  }
  __device__ int first_id(int shard) const { return shard_ranges[2 * shard]; }
  __device__ int tokens(int shard) const { return shard_ranges[2 * shard + 1]; }
  __device__ List Scored(int64_t row, int shard, int asked) const {
    const int64_t at = row * candidates;
    return {Of(scores, shard) + at, Of(columns, shard) + at, asked, first_id(shard)};
  }
  __device__ List Raw(int64_t row, int shard, int asked) const {
    const int64_t at = row * raw_candidates;
    return {Of(raw_scores, shard) + at, Of(raw_columns, shard) + at, asked, first_id(shard)};
  }
};

struct Merged {
  float score[kMergedCandidates], raw[kMergedCandidates];
  int id[kMergedCandidates];
  double mass[kMergedCandidates];  // then the keys
  int count, certain, answered, complete, left;
  double largest, sum;
};

// The shards' candidates in order, as far as there is room; false where a shard has none.
__device__ bool Merge(const Answers& a, int64_t row, Merged& m) {
  const int asked = min(a.counts[row], a.candidates);
  if (threadIdx.x == 0) {
    m.count = m.answered = 0;
    m.certain = kMergedCandidates;
    m.complete = 1;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.shards * asked; e += kThreads) {
    const int shard = e / asked, i = e % asked;
    const List mine = a.Scored(row, shard, asked);
    if (mine.columns[i] < 0) continue;
    const float score = mine.scores[i];
    const int id = mine.first_id + mine.columns[i];
    int place = i;
    for (int s = 0; s < a.shards; ++s) {
      if (s != shard) place += a.Scored(row, s, asked).CountBefore(score, id);
    }
    atomicAdd(&m.count, 1);
    if (i == 0) atomicAdd(&m.answered, 1);
    // What a shard did not send comes after its last.
    if (i + 1 == mine.Count() && a.tokens(shard) > asked) {
      atomicMin(&m.certain, place + 1);
      atomicMin(&m.complete, 0);
    }
    if (place >= kMergedCandidates) continue;
    m.score[place] = score;
    m.raw[place] = a.Of(a.raw, shard)[row * a.candidates + i];
    m.id[place] = id;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (m.count > kMergedCandidates) {
      m.count = kMergedCandidates;
      m.complete = 0;
    }
    m.certain = min(m.certain, m.count);
  }
  __syncthreads();
  return m.answered == a.shards;
}

// Thread 0's, in all of them once they have met.
__device__ void MergeTerms(const Answers& a, int64_t row, double inverse, Merged& m) {
  double largest = -INFINITY, sum = 0.0;
  for (int s = 0; s < a.shards; ++s)
    largest = max(largest, static_cast<double>(a.Of(a.largest, s)[row]));
  for (int s = 0; s < a.shards; ++s) {
    const double part = a.Of(a.sum, s)[row];
    if (part > 0.0) sum += part * exp((a.Of(a.largest, s)[row] - largest) * inverse);
  }
  m.largest = largest;
  m.sum = sum;
}

// The place of the one drawn of the `left` best, in all threads; -1 of none. All threads have met
// since they last read the masses.
__device__ int DrawAmong(const Answers& a, int64_t row, int left, Merged& m) {
  const double inverse = a.filters[row].inverse_temperature;
  for (int i = threadIdx.x; i < left; i += kThreads) {
    m.mass[i] =
        static_cast<double>(m.score[i]) * inverse +
        GumbelNoise(static_cast<uint64_t>(a.seeds[2 * row]),
                    static_cast<uint64_t>(a.seeds[2 * row + 1]), static_cast<uint32_t>(m.id[i]));
  }
  __syncthreads();
  int best = left > 0 ? 0 : -1;
  for (int i = 1; i < left; ++i) {
    if (m.mass[i] > m.mass[best] || (m.mass[i] == m.mass[best] && m.id[i] < m.id[best])) best = i;
  }
  return best;
}

// Of the merged candidates: the place of the one drawn, in all threads; -1 where top-p needs more.
__device__ int Filter(const Answers& a, int64_t row, Merged& m) {
  const TokenFilters filters = a.filters[row];
  if (threadIdx.x == 0) MergeTerms(a, row, filters.inverse_temperature, m);
  __syncthreads();
  for (int i = threadIdx.x; i < m.count; i += kThreads) {
    m.mass[i] = exp((static_cast<double>(m.score[i]) - m.largest) * filters.inverse_temperature);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    m.left = static_cast<int>(CountLeft(filters, m.count, m.certain, m.complete != 0, m.sum,
                                        [&m](int64_t i) { return m.mass[i]; }));
  }
  __syncthreads();
  return DrawAmong(a, row, m.left, m);
}

// Of what min-p leaves.
__device__ double Threshold(const Answers& a, int64_t row) {
  const TokenFilters filters = a.filters[row];
  double threshold = -INFINITY;
  for (int s = 0; filters.min_p > 0.0 && s < a.shards; ++s)
    threshold = max(threshold, static_cast<double>(a.Of(a.largest, s)[row]) + filters.margin);
  return threshold;
}

// A step a shard. A shard draws from what is near the largest score it knows. What it drew is also
// the best of what is near the largest of all shards, where it is among that; where it is not, and
// the shard has something that is, its draw does not tell: false.
__device__ bool Drawn(const Answers& a, int64_t row, double threshold, Candidate& chosen) {
  Candidate best{0.0f, 0.0f, -1};
  double best_key = 0.0;
  for (int s = 0; s < a.shards; ++s) {
    const int column = a.Of(a.drawn, s)[row];
    if (column < 0) return true;
    const float score = a.Of(a.drawn_scores, s)[row];
    if (score < threshold) {
      if (a.Of(a.largest, s)[row] >= threshold) return false;
      continue;
    }
    const double key = a.Of(a.keys, s)[row];
    if (best.id >= 0 && key <= best_key) continue;  // ids ascend: the smaller wins a tie
    best = {score, a.Of(a.drawn_raw, s)[row], a.first_id(s) + column};
    best_key = key;
  }
  chosen = best;
  return true;
}

// As Filter, of what min-p leaves.
__device__ int DrawNear(const Answers& a, int64_t row, double threshold, Merged& m) {
  const auto near =
      CountNear(threshold, m.certain, m.complete != 0, [&m](int64_t i) { return m.score[i]; });
  return DrawAmong(a, row, static_cast<int>(near), m);
}

// The token's probability and the most probable ones', of the logits as the model gave them.
__device__ void WriteLogprobs(const Answers& a, int64_t row, float raw, float* logprob,
                              int32_t* top_tokens, float* top_logprobs) {
  const int wanted = min(a.logprobs[row], a.raw_candidates);
  if (wanted < 0) return;
  double largest = -INFINITY, sum = 0.0;
  for (int s = 0; s < a.shards; ++s)
    largest = max(largest, static_cast<double>(a.Of(a.raw_largest, s)[row]));
  for (int s = 0; s < a.shards; ++s) {
    const double part = a.Of(a.raw_sum, s)[row];
    if (part > 0.0) sum += part * exp(a.Of(a.raw_largest, s)[row] - largest);
  }
  const double log_total = largest + log(sum);
  if (threadIdx.x == 0) *logprob = static_cast<float>(raw - log_total);
  for (int e = threadIdx.x; e < a.shards * wanted; e += kThreads) {
    const int shard = e / wanted, i = e % wanted;
    const List mine = a.Raw(row, shard, wanted);
    if (mine.columns[i] < 0) continue;
    const int id = mine.first_id + mine.columns[i];
    int place = i;
    for (int s = 0; s < a.shards; ++s) {
      if (s != shard) place += a.Raw(row, s, wanted).CountBefore(mine.scores[i], id);
    }
    if (place >= wanted) continue;
    top_tokens[place] = id;
    top_logprobs[place] = static_cast<float>(mine.scores[i] - log_total);
  }
}

// Without the 1 ptxas spares registers for blocks that never come, and spills.
__global__ void __launch_bounds__(kThreads, 1)
    ChooseRows(Answers a, int32_t* tokens, float* logprobs, int32_t* top_tokens,
               float* top_logprobs) {
  gpu::WaitForPrevious();
  GPU_SHARED(merged, Merged);
  const int64_t row = blockIdx.x;
  top_tokens += row * a.raw_candidates;
  top_logprobs += row * a.raw_candidates;
  for (int i = threadIdx.x; i < a.raw_candidates; i += kThreads) {
    top_tokens[i] = -1;
    top_logprobs[i] = 0.0f;
  }
  if (threadIdx.x == 0) {
    tokens[row] = -1;
    logprobs[row] = 0.0f;
  }
  __syncthreads();
  const auto choice = static_cast<Choice>(a.choices[row]);
  if (choice == Choice::kNone) return;
  Candidate chosen{0.0f, 0.0f, -1};
  const double threshold = choice == Choice::kDrawn ? Threshold(a, row) : 0.0;
  const bool drawn = choice == Choice::kDrawn && Drawn(a, row, threshold, chosen);
  if (!drawn && Merge(a, row, merged)) {
    int place = 0;
    if (choice == Choice::kFiltered) place = Filter(a, row, merged);
    if (choice == Choice::kDrawn) place = DrawNear(a, row, threshold, merged);
    if (place >= 0) chosen = {merged.score[place], merged.raw[place], merged.id[place]};
  }
  if (chosen.id < 0 || !(fabsf(chosen.raw) < INFINITY)) return;
  if (threadIdx.x == 0) tokens[row] = chosen.id;
  WriteLogprobs(a, row, chosen.raw, logprobs + row, top_tokens, top_logprobs);
}

// What `score` was before a penalty, if it had one.
__device__ float Restored(const int32_t* places, int count, const float* before, int row,
                          int column, float score) {
  int first = 0, end = count;
  while (first < end) {
    const int middle = (first + end) / 2;
    const int other = places[2 * middle];
    if (other < row || (other == row && places[2 * middle + 1] < column)) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  const bool found = first < count && places[2 * first] == row && places[2 * first + 1] == column;
  return found ? before[first] : score;
}

// A thread for each of the row's candidates, and one for what was drawn.
__global__ void RestoreRows(const int32_t* count, const int32_t* places, const float* before, int k,
                            const float* scores, const int32_t* columns, float* raw,
                            const float* drawn_scores, const int32_t* drawn, float* drawn_raw) {
  gpu::WaitForPrevious();
  const int row = blockIdx.x;
  const int penalties = *count;
  for (int i = threadIdx.x; i <= k; i += blockDim.x) {
    const int64_t at = int64_t{row} * k + i;
    if (i < k) {
      raw[at] = Restored(places, penalties, before, row, columns[at], scores[at]);
    } else {
      drawn_raw[row] = Restored(places, penalties, before, row, drawn[row], drawn_scores[row]);
    }
  }
}

}  // namespace

void RestoreLogits(Stream& stream, ConstTensorView count, ConstTensorView places,
                   ConstTensorView before, const ShardAnswers& a) {
  gpu::LaunchDependent(
      {dim3(static_cast<unsigned>(a.scores.dim(0))), dim3(kThreads), 0, NativeHandle(stream)},
      RestoreRows, count.as<int32_t>(), places.as<int32_t>(), before.as<float>(),
      static_cast<int>(a.scores.dim(1)), a.scores.as<float>(), a.columns.as<int32_t>(),
      a.raw.as<float>(), a.drawn_scores.as<float>(), a.drawn.as<int32_t>(),
      a.drawn_raw.as<float>());
}

void ChooseTokens(Stream& stream, const ShardAnswers& a, int64_t shard_bytes,
                  const ChoiceOfRows& rows, const ChosenTokens& chosen) {
  const Answers answers{.shards = static_cast<int>(rows.shards.dim(0)),
                        .candidates = static_cast<int>(a.scores.dim(1)),
                        .raw_candidates = static_cast<int>(a.raw_scores.dim(1)),
                        .shard_bytes = shard_bytes,
                        .shard_ranges = rows.shards.as<int32_t>(),
                        .largest = a.largest.as<float>(),
                        .scores = a.scores.as<float>(),
                        .raw = a.raw.as<float>(),
                        .drawn_scores = a.drawn_scores.as<float>(),
                        .drawn_raw = a.drawn_raw.as<float>(),
                        .raw_largest = a.raw_largest.as<float>(),
                        .raw_scores = a.raw_scores.as<float>(),
                        .sum = a.sum.as<double>(),
                        .keys = a.keys.as<double>(),
                        .raw_sum = a.raw_sum.as<double>(),
                        .columns = a.columns.as<int32_t>(),
                        .drawn = a.drawn.as<int32_t>(),
                        .raw_columns = a.raw_columns.as<int32_t>(),
                        .choices = rows.choices.as<int32_t>(),
                        .counts = rows.counts.as<int32_t>(),
                        .logprobs = rows.logprobs.as<int32_t>(),
                        .filters = rows.filters.as<TokenFilters>(),
                        .seeds = rows.seeds.as<int64_t>()};
  gpu::LaunchDependent(
      {dim3(static_cast<unsigned>(a.scores.dim(0))), dim3(kThreads), 0, NativeHandle(stream)},
      ChooseRows, answers, chosen.tokens.as<int32_t>(), chosen.logprobs.as<float>(),
      chosen.top_tokens.as<int32_t>(), chosen.top_logprobs.as<float>());
}

}  // namespace trireme::cuda
