#include "kernels/cpu/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/status.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;

template <typename Work>
double BestRate(double amount, double budget_s, Work&& work) {
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point begin = Clock::now();
    work();
    best = std::max(best, amount / std::chrono::duration<double>(Clock::now() - begin).count());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < budget_s);
  return best;
}

// The pieces are small beside a try, so that a thread that comes late costs little.
double PeakFlops(cpu::ThreadPool& pool, DType dtype) {
  constexpr int64_t kRounds = 4096;
  const int64_t pieces = 64 * pool.threads();
  const double flops = cpu::BestIsa().peak_flops(dtype, kRounds) * static_cast<double>(pieces);
  return BestRate(flops, 0.25, [&] {
    pool.ParallelFor(pieces, 1, [&](int64_t begin, int64_t end) {
      cpu::BestIsa().peak_flops(dtype, kRounds * (end - begin));
    });
  });
}

}  // namespace

absl::StatusOr<Ceilings> MeasureCpuCeilings(Stream& stream) {
  constexpr int64_t kBytes = int64_t{256} << 20, kPiece = int64_t{1} << 20;
  cpu::ThreadPool& pool = cpu::PoolOf(stream);
  ASSIGN_OR_RETURN(Buffer buffer, stream.device().Allocate(kBytes));
  char* data = static_cast<char*>(buffer.data());
  // Written first: untouched pages would all be one page of zeros in the cache.
  pool.ParallelFor(kBytes / kPiece, 1, [&](int64_t begin, int64_t end) {
    std::memset(data + begin * kPiece, 1, (end - begin) * kPiece);
  });
  Ceilings ceilings;
  std::atomic<float> sum{0};
  ceilings.read_bytes_per_s = BestRate(kBytes, 0.4, [&] {
    pool.ParallelFor(kBytes / kPiece, 1, [&](int64_t begin, int64_t end) {
      sum.store(cpu::BestIsa().read(data + begin * kPiece, (end - begin) * kPiece),
                std::memory_order_relaxed);
    });
  });
  ceilings.matmul_flops_f32 = PeakFlops(pool, DType::kF32);
  ceilings.matmul_flops_bf16 = PeakFlops(pool, DType::kBF16);
  ceilings.matmul_flops_f16 = ceilings.matmul_flops_f32;  // matmul.cc widens f16 and multiplies f32
  return ceilings;
}

}  // namespace trireme
