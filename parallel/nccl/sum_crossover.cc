#include "parallel/nccl/sum_crossover.h"

#include <algorithm>
#include <cmath>

namespace trireme {

SumLimits CrossoverOf(std::span<const SumTimes> times) {
  SumLimits limits;
  size_t next = 0;
  for (; next < times.size(); ++next) {
    const SumTimes& t = times[next];
    if (!std::isfinite(t.one_shot) || t.one_shot > std::min(t.two_shot, t.nccl)) break;
    limits.one_shot = t.bytes;
  }
  limits.two_shot = limits.one_shot;
  for (; next < times.size(); ++next) {
    const SumTimes& t = times[next];
    if (!std::isfinite(t.two_shot) || t.two_shot > t.nccl) break;
    limits.two_shot = t.bytes;
  }
  return limits;
}

}  // namespace trireme
