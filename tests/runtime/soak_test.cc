// Many short requests with random cancels, preemption and shared beginnings, on every layout of the
// world: at the end no page is missing, every request has had its last output, and the memory of no
// rank has grown.

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <random>

#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

constexpr int64_t kRequests = kSanitizer ? 2'000 : 20'000;
constexpr bool kMemoryIsOurs = !kSanitizer;  // their shadow memory grows by itself
constexpr int64_t kWarmUp = kRequests / 4;
constexpr int64_t kGrowthBytes = 4 << 20;  // less than 300 bytes a request

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

class Soak {
 public:
  explicit Soak(Engine& engine) : engine_(engine) {}

  void Serve(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Request request;
      request.id = static_cast<uint64_t>(next_id_++);
      request.prompt.assign(1 + random_() % 24, 1);
      for (size_t t = random_() % 4 == 0 ? 0 : 16; t < request.prompt.size(); ++t)
        request.prompt[t] = static_cast<TokenId>(3 + random_() % 500);
      request.max_tokens = static_cast<int64_t>(1 + random_() % 20);
      request.priority = static_cast<int32_t>(random_() % 3);
      request.n = random_() % 16 == 0 ? 2 : 1;
      samples_ += request.n;
      const uint64_t id = request.id;
      ASSERT_TRUE(engine_
                      .Submit(std::move(request),
                              [this](const TokenOutput& output) {
                                ended_ += output.finish != FinishReason::kNone;
                              })
                      .ok());
      if (random_() % 8 == 0) engine_.Cancel(id - random_() % 20).IgnoreError();
      if (i % 200 == 199) {
        EXPECT_TRUE(engine_.WaitIdle().ok());
      }
    }
    EXPECT_TRUE(engine_.WaitIdle().ok());
  }
  int64_t samples() const { return samples_; }
  int64_t ended() const { return ended_; }

 private:
  Engine& engine_;
  std::mt19937_64 random_{7};
  int64_t next_id_ = 100;
  int64_t samples_ = 0;
  std::atomic<int64_t> ended_ = 0;
};

TEST(SoakTest, ManyRequestsLeaveNothingBehind) {
  const int world = World().size();
  const Topology topology{world == 4 ? 2 : 1, world == 4 ? 2 : world, 1};
  WorkerOptions options;
  options.max_model_len = 64;
  options.max_num_seqs = 32;
  options.num_pages = 24;
  // Two engines on ranks that stay: what one leaves behind the second would find.
  int64_t before = 0;
  for (const int64_t count : {kWarmUp, kRequests}) {
    WithWorker("stories260K", topology, options, [&](Worker& worker) {
      const std::unique_ptr<Engine> engine = Engine::Create(worker, nullptr).value();
      Soak soak(*engine);
      soak.Serve(kWarmUp);
      const int64_t warm = ResidentBytes();
      if (count > kWarmUp) soak.Serve(count - kWarmUp);
      if (count > kWarmUp && kMemoryIsOurs) {
        EXPECT_LT(ResidentBytes() - warm, kGrowthBytes) << "on the leader";
      }
      ASSERT_TRUE(engine->Drain().ok());
      EXPECT_EQ(soak.ended(), soak.samples());
      const EngineStats stats = engine->Stats();
      EXPECT_EQ(stats.pages_free, stats.pages);
      EXPECT_EQ(stats.running + stats.waiting, 0);
      EXPECT_GT(stats.finished[static_cast<size_t>(FinishReason::kCancelled)], 0);
      EXPECT_GT(stats.cached_tokens, 0);
      if (count > kWarmUp) {
        EXPECT_GT(stats.preemptions, 0);
      }
    });
    if (count == kWarmUp) before = ResidentBytes();
  }
  if (kMemoryIsOurs) {
    EXPECT_LT(ResidentBytes() - before, 2 * kGrowthBytes);
  }
}

}  // namespace
}  // namespace trireme
