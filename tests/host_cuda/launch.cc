#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <thread>

#include "tests/host_cuda/block_engine.h"

namespace host_cuda {

Options& DefaultOptions() {
  static Options options;
  return options;
}

void LaunchRaw(const Config& config, const std::function<void()>& body, const Options& options) {
  const dim3 g = config.grid, b = config.block;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z, blocks = uint64_t{g.x} * g.y * g.z;
  if (threads == 0 || threads > 1024 || b.z > 64) throw KernelError("bad block size");
  if (blocks == 0 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535)
    throw KernelError("bad grid size");
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (options.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (options.order == Order::kShuffled) {
    uint64_t x = options.seed * 0x2545F4914F6CDD1Dull + 99;
    for (uint64_t i = blocks; i > 1; --i) {
      x ^= x << 13, x ^= x >> 7, x ^= x << 17;
      std::swap(order[i - 1], order[x % i]);
    }
  }
  std::atomic<uint64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto work = [&] {
    try {
      BlockEngine& e = BlockEngine::Get();
      e.Prepare(config, &body, options);
      for (uint64_t i; (i = next.fetch_add(1)) < blocks;) {
        const uint32_t k = order[i];
        e.RunBlock(uint3{k % g.x, k / g.x % g.y, k / (g.x * g.y)}, options.seed * 1000003 + k);
      }
    } catch (...) {
      std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
      next = blocks;
    }
  };
  if (options.around_launch) options.around_launch(true);
  const uint64_t workers = config.resident ? blocks : static_cast<uint64_t>(options.workers);
  if (workers <= 1) {
    work();
  } else {
    std::vector<std::jthread> pool;
    for (uint64_t i = 0; i < workers; ++i) pool.emplace_back(work);
  }
  if (options.around_launch) options.around_launch(false);
  if (error) std::rethrow_exception(error);
}

}  // namespace host_cuda
