// Sampling's part on the CPU: a row is one thread's work.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/philox.h"

namespace trireme::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Scored {
  float score;
  int32_t column;
};
bool Before(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score > b.score : a.column < b.column;
}

// -inf where there is none; NaN never wins a comparison.
float Largest(const float* x, int64_t n) {
  float best = kLowest;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

double ExpSum(const float* x, int64_t n, float largest, double inverse_temperature) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(x[i])) continue;
    sum +=
        static_cast<float>(std::exp((static_cast<double>(x[i]) - largest) * inverse_temperature));
  }
  return sum;
}

void Best(const float* x, int64_t n, float largest, int64_t count, int64_t room, float* scores,
          int32_t* columns) {
  thread_local std::vector<Scored> heap;  // the worst of the best on top
  heap.clear();
  heap.reserve(count);
  if (count == 1) {
    const int64_t at = std::find(x, x + n, largest) - x;
    if (at < n) heap.push_back({largest, static_cast<int32_t>(at)});
  } else if (count > 1) {
    for (int64_t i = 0; i < n; ++i) {
      if (std::isnan(x[i])) continue;
      const Scored scored{x[i], static_cast<int32_t>(i)};
      if (static_cast<int64_t>(heap.size()) < count) {
        heap.push_back(scored);
        std::push_heap(heap.begin(), heap.end(), Before);
      } else if (x[i] > heap.front().score) {  // columns ascend: an equal score never displaces
        std::pop_heap(heap.begin(), heap.end(), Before);
        heap.back() = scored;
        std::push_heap(heap.begin(), heap.end(), Before);
      }
    }
  }
  std::sort_heap(heap.begin(), heap.end(), Before);
  for (int64_t i = 0; i < room; ++i) {
    const bool have = i < static_cast<int64_t>(heap.size());
    scores[i] = have ? heap[i].score : kLowest;
    columns[i] = have ? heap[i].column : -1;
  }
}

}  // namespace

void PenalizeLogits(Stream&, TensorView logits, ConstTensorView count, ConstTensorView places,
                    ConstTensorView amounts, TensorView before) {
  for (int64_t i = 0; i < count.as<int32_t>()[0]; ++i) {
    const int32_t* place = places.row<int32_t>(i);
    const float* amount = amounts.row<float>(i);
    float& x = logits.row<float>(place[0])[place[1]];
    before.as<float>()[i] = x;
    x = (x > 0.0f ? x / amount[0] : x * amount[0]) - amount[1];
  }
}

void SummarizeLogits(Stream& stream, ConstTensorView logits, ConstTensorView inverse_temperature,
                     ConstTensorView counts, TensorView largest, TensorView sum, TensorView scores,
                     TensorView columns) {
  const int64_t n = logits.dim(1), room = scores.dim(1);
  PoolOf(stream).ParallelFor(logits.dim(0), RowGrain(n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = logits.row<float>(r);
      const int64_t count = counts.as<int32_t>()[r];
      const double inverse = inverse_temperature.as<double>()[r];
      const float top = count > 0 || inverse > 0.0 ? Largest(x, n) : kLowest;
      largest.as<float>()[r] = top;
      sum.as<double>()[r] = inverse > 0.0 ? ExpSum(x, n, top, inverse) : 0.0;
      Best(x, n, top, count, room, scores.as<float>() + r * room, columns.as<int32_t>() + r * room);
    }
  });
}

void DrawTokens(Stream& stream, ConstTensorView logits, ConstTensorView seeds,
                ConstTensorView limits, ConstTensorView largest, int64_t first_id, TensorView keys,
                TensorView scores, TensorView columns) {
  const int64_t n = logits.dim(1);
  PoolOf(stream).ParallelFor(logits.dim(0), RowGrain(n), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = logits.row<float>(r);
      const int64_t* seed = seeds.row<int64_t>(r);
      const double inverse = limits.row<double>(r)[0];
      const double threshold = largest.as<float>()[r] + limits.row<double>(r)[1];
      double best = -std::numeric_limits<double>::infinity();
      int32_t column = -1;
      for (int64_t i = 0; inverse > 0.0 && i < n; ++i) {
        const double score = x[i];
        // Noise is bounded, so most tokens of a peaked distribution need none drawn.
        if (!(score >= threshold && score * inverse + kMaxGumbelNoise >= best)) continue;
        const double key = score * inverse + GumbelNoise(static_cast<uint64_t>(seed[0]),
                                                         static_cast<uint64_t>(seed[1]),
                                                         static_cast<uint32_t>(first_id + i));
        if (key > best) best = key, column = static_cast<int32_t>(i);
      }
      keys.as<double>()[r] = best;
      scores.as<float>()[r] = column < 0 ? kLowest : x[column];
      columns.as<int32_t>()[r] = column;
    }
  });
}

}  // namespace trireme::cpu
