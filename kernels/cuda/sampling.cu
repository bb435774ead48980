// Sampling's part on the GPU: a block a row. The K best come by a radix select on the scores' bits
// (Alabi et al., "Fast K-Selection Algorithms for Graphics Processing Units", 2012): eight bits a
// pass, then the columns of those that tie with the last.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/radix_select.cuh"
#include "kernels/philox.h"
#include "kernels/sampling.h"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Ascending with the score; 0 for NaN, which no number has.
__device__ inline uint32_t SortKey(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Calls f(column, score) for the thread's columns of the row, ascending. A row is one block's work,
// and one load at a time would leave it waiting for memory: kAhead are under way.
template <typename F>
__device__ inline void ForEachColumn(const float* x, int n, F&& f) {
  constexpr int kAhead = 8;
  for (int first = threadIdx.x; first < n; first += kAhead * kThreads) {
    float scores[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      scores[u] = i < n ? x[i] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i < n) f(i, scores[u]);
    }
  }
}

struct Scored {
  float score;
  int column;  // -1 = none
};
__device__ inline Scored Better(const Scored& a, const Scored& b) {
  if (b.column < 0) return a;
  if (a.column < 0 || b.score > a.score) return b;
  return a.score > b.score || a.column < b.column ? a : b;
}

// The best of the block's threads, in all of them.
__device__ inline Scored BlockBest(Scored x) {
  GPU_SHARED(best, Scored[kWarps]);
  for (int o = 16; o > 0; o /= 2) {
    const Scored other{__shfl_xor_sync(0xffffffffu, x.score, o),
                       __shfl_xor_sync(0xffffffffu, x.column, o)};
    x = Better(x, other);
  }
  if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = x;
  __syncthreads();
  x = best[0];
  for (int w = 1; w < kWarps; ++w) x = Better(x, best[w]);
  return x;
}

__device__ inline double BlockSum64(double x) {
  GPU_SHARED(part, double[kWarps]);
  x = gpu::WarpSum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = part[0];
  for (int w = 1; w < kWarps; ++w) x += part[w];
  return x;
}

// None from candidate `i` on.
__device__ inline void WriteNone(int i, int k, float* scores, int32_t* columns) {
  for (i += static_cast<int>(threadIdx.x); i < k; i += kThreads) {
    scores[i] = -INFINITY;
    columns[i] = -1;
  }
}

// Best first. `count` at most kThreads; they were written before a barrier.
__device__ inline void Order(int count, float* scores, int32_t* columns) {
  static_assert(kOrderedCandidates <= kThreads);
  const int i = threadIdx.x;
  const Scored mine = i < count ? Scored{scores[i], columns[i]} : Scored{0.0f, -1};
  int better = 0;
  for (int other = 0; i < count && other < count; ++other) {
    const float score = scores[other];
    if (score > mine.score || (score == mine.score && columns[other] < mine.column)) ++better;
  }
  __syncthreads();
  if (i < count) {
    scores[better] = mine.score;
    columns[better] = mine.column;
  }
}

// The row's `k` best, in order where they are few.
__device__ void WriteBest(const float* x, int n, int k, float* scores, int32_t* columns) {
  GPU_SHARED(candidates, int);
  GPU_SHARED(written, int);
  if (threadIdx.x == 0) candidates = written = 0;
  __syncthreads();
  int mine = 0;
  ForEachColumn(x, n, [&mine](int, float score) { mine += SortKey(score) != 0 ? 1 : 0; });
  mine = gpu::WarpSum(mine);
  if (threadIdx.x % 32 == 0) atomicAdd(&candidates, mine);
  __syncthreads();
  const int wanted = min(k, candidates);
  if (wanted > 0) {
    int equals = wanted;  // of the last score, how many are wanted
    const uint32_t last = SelectLargest<kThreads>(
        n, [x](int i) { return SortKey(x[i]); }, equals);
    // Of those the smallest columns: the largest of their complements.
    const uint32_t last_column = ~SelectLargest<kThreads>(
        n, [x, last](int i) { return SortKey(x[i]) == last ? ~static_cast<uint32_t>(i) : 0u; },
        equals);
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = SortKey(x[i]);
      if (key > last || (key == last && static_cast<uint32_t>(i) <= last_column)) {
        const int at = atomicAdd(&written, 1);
        scores[at] = x[i];
        columns[at] = i;
      }
    }
  }
  WriteNone(wanted, k, scores, columns);
  // Atomics gave them their places: others in every run.
  __syncthreads();
  if (wanted <= kOrderedCandidates) Order(wanted, scores, columns);
}

__global__ void __launch_bounds__(kThreads)
    SummarizeRows(const float* logits, int n, const double* inverse_temperature,
                  const int32_t* counts, float* largest, double* sum, float* scores,
                  int32_t* columns, int k) {
  gpu::WaitForPrevious();
  const int64_t row = blockIdx.x;
  const float* x = logits + row * n;
  const double inverse = inverse_temperature[row];
  const int count = counts[row];
  scores += row * k;
  columns += row * k;
  WriteNone(max(count, 0), k, scores, columns);
  if (count <= 0 && !(inverse > 0.0)) {
    if (threadIdx.x == 0) {
      largest[row] = -INFINITY;
      sum[row] = 0.0;
    }
    return;
  }
  Scored best{-INFINITY, -1};
  ForEachColumn(x, n, [&best](int i, float score) {
    // Better's choice: columns ascend.
    if (score > best.score || (best.column < 0 && score == score)) best = {score, i};
  });
  best = BlockBest(best);
  double total = 0.0;
  if (inverse > 0.0) {
    ForEachColumn(x, n, [&total, &best, inverse](int, float score) {
      const float exponent =
          static_cast<float>((static_cast<double>(score) - best.score) * inverse);
      if (exponent == exponent) total += expf(exponent);
    });
    total = BlockSum64(total);
  }
  if (threadIdx.x == 0) {
    largest[row] = best.score;
    sum[row] = total;
  }
  if (count == 1) {
    if (threadIdx.x == 0) {
      scores[0] = best.score;
      columns[0] = best.column;
    }
  } else if (count > 1) {
    WriteBest(x, n, count, scores, columns);
  }
}

__global__ void PenalizePlaces(float* logits, int n, const int32_t* count, const int32_t* places,
                               const float* amounts, float* before) {
  gpu::WaitForPrevious();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= *count) return;
  float& x = logits[int64_t{places[2 * i]} * n + places[2 * i + 1]];
  before[i] = x;
  x = __fadd_rn(x > 0.0f ? x / amounts[2 * i] : __fmul_rn(x, amounts[2 * i]), -amounts[2 * i + 1]);
}

// The noise in fp32: within 1e-4 of GumbelOf. -log(u) is taken from 1 - u where u is near 1.
__device__ inline float RoughGumbel(uint32_t bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  const float rest = (static_cast<float>(~bits) + 0.5f) * 0x1p-32f;
  const float minus_log = bits < 0x80000000u ? -logf(u) : -log1pf(-rest);
  return -logf(minus_log);
}

struct Drawn {
  double key;
  int column;
};

__global__ void __launch_bounds__(kThreads)
    DrawRows(const float* logits, int n, const int64_t* seeds, const double* limits,
             const float* largest, uint32_t first_id, double* keys, float* scores,
             int32_t* columns) {
  gpu::WaitForPrevious();
  GPU_SHARED(drawn, Drawn[kThreads]);
  const int64_t row = blockIdx.x;
  const float* x = logits + row * n;
  const uint64_t seed = static_cast<uint64_t>(seeds[2 * row]);
  const uint64_t position = static_cast<uint64_t>(seeds[2 * row + 1]);
  const double inverse = limits[2 * row];
  const double threshold = largest[row] + limits[2 * row + 1];
  Drawn best{-INFINITY, -1};
  for (int i = threadIdx.x; inverse > 0.0 && i < n; i += kThreads) {
    const double score = x[i];
    const double scaled = score * inverse;
    if (!(score >= threshold && scaled + kMaxGumbelNoise >= best.key)) continue;
    const uint32_t bits = TokenBits(seed, position, first_id + static_cast<uint32_t>(i));
    // Two logarithms in fp64 only for what may win by fp32.
    if (scaled + static_cast<double>(RoughGumbel(bits)) + 1e-3 < best.key) continue;
    const double key = scaled + GumbelOf(bits);
    if (key > best.key) best = {key, i};
  }
  drawn[threadIdx.x] = best;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      const Drawn other = drawn[threadIdx.x + half];
      Drawn& mine = drawn[threadIdx.x];
      if (other.key > mine.key || (other.key == mine.key && other.column >= 0 &&
                                   (mine.column < 0 || other.column < mine.column))) {
        mine = other;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    keys[row] = drawn[0].key;
    scores[row] = drawn[0].column < 0 ? -INFINITY : x[drawn[0].column];
    columns[row] = drawn[0].column;
  }
}

}  // namespace

void PenalizeLogits(Stream& stream, TensorView logits, ConstTensorView count,
                    ConstTensorView places, ConstTensorView amounts, TensorView before) {
  constexpr int kBlock = 256;
  gpu::LaunchDependent({dim3(Blocks(places.dim(0), kBlock)), dim3(kBlock), 0, NativeHandle(stream)},
                       PenalizePlaces, logits.as<float>(), static_cast<int>(logits.dim(1)),
                       count.as<int32_t>(), places.as<int32_t>(), amounts.as<float>(),
                       before.as<float>());
}

void SummarizeLogits(Stream& stream, ConstTensorView logits, ConstTensorView inverse_temperature,
                     ConstTensorView counts, TensorView largest, TensorView sum, TensorView scores,
                     TensorView columns) {
  gpu::LaunchDependent(
      {dim3(static_cast<unsigned>(logits.dim(0))), dim3(kThreads), 0, NativeHandle(stream)},
      SummarizeRows, logits.as<float>(), static_cast<int>(logits.dim(1)),
      inverse_temperature.as<double>(), counts.as<int32_t>(), largest.as<float>(), sum.as<double>(),
      scores.as<float>(), columns.as<int32_t>(), static_cast<int>(scores.dim(1)));
}

void DrawTokens(Stream& stream, ConstTensorView logits, ConstTensorView seeds,
                ConstTensorView limits, ConstTensorView largest, int64_t first_id, TensorView keys,
                TensorView scores, TensorView columns) {
  gpu::LaunchDependent(
      {dim3(static_cast<unsigned>(logits.dim(0))), dim3(kThreads), 0, NativeHandle(stream)},
      DrawRows, logits.as<float>(), static_cast<int>(logits.dim(1)), seeds.as<int64_t>(),
      limits.as<double>(), largest.as<float>(), static_cast<uint32_t>(first_id), keys.as<double>(),
      scores.as<float>(), columns.as<int32_t>());
}

}  // namespace trireme::cuda
