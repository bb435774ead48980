// Whatever the engine does to be fast, a request's tokens are those it has when it is alone: in
// every layout, for every pair of chunked prefill, prefix cache, preemption, cancellation, several
// samples, overlapped planning and a sliding window. TP and PP are the layouts of the world's size;
// all are compared with one rank.

#include <gtest/gtest.h>

#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"

namespace trireme {
namespace {

constexpr int32_t kSamples = 3;

enum Feature : unsigned {
  kChunked = 1,
  kPrefixCache = 2,
  kPreemption = 4,
  kCancellation = 8,
  kSeveralSamples = 16,
  kOverlap = 32,
};
constexpr unsigned kFeatures = 6;

std::string NameOf(unsigned features) {
  const char* names[kFeatures] = {"chunked", "prefix",  "preemption",
                                  "cancel",  "samples", "overlap"};
  std::string out;
  for (unsigned i = 0; i < kFeatures; ++i) {
    if (features >> i & 1) out += std::string(" ") + names[i];
  }
  return out;
}

class EngineEqualityTest : public ::testing::TestWithParam<const char*> {
 protected:
  static bool Windowed() { return std::string(GetParam()) == "tiny-mistral-swa"; }

  static WorkerOptions OptionsOf(unsigned features) {
    WorkerOptions options;
    options.max_model_len = 128;
    options.page_size = 4;
    options.max_num_batched_tokens = features & kChunked ? 9 : 512;
    options.max_num_seqs = 8;
    // The longest request takes 22 pages; behind a window of 16, 6.
    if (features & kPreemption) options.num_pages = Windowed() ? 12 : 34;
    return options;
  }

  // Requests 1 and 4 are cancelled at their fifth token where that is a feature; they may be done
  // before the engine hears of it, but not every time.
  static int cancelled_;
  static void RunWorkload(Engine& engine, unsigned features, const Transcript& alone) {
    Transcript got;
    std::map<uint64_t, int> cancelled;
    for (Request request : Workload()) {
      if (features & kSeveralSamples && request.id % 2 == 1) request.n = kSamples;
      const bool cancel = features & kCancellation && request.id % 3 == 1;
      const auto take = [&got, &cancelled, &engine, cancel](const TokenOutput& output) {
        Tokens& tokens = got[{output.request_id, output.sample}];
        if (output.sampled.token >= 0) tokens.push_back(output.sampled.token);
        if (cancel && tokens.size() == 5 && output.finish == FinishReason::kNone)
          engine.Cancel(output.request_id).IgnoreError();
        if (output.finish == FinishReason::kCancelled) ++cancelled[output.request_id];
      };
      ASSERT_TRUE(engine.Submit(request, take).ok());
    }
    ASSERT_TRUE(engine.Drain().ok());
    for (const auto& [key, tokens] : got) {
      Tokens expected = alone.at(key);
      if (cancelled.count(key.first)) {
        ASSERT_LE(tokens.size(), expected.size());
        expected.resize(tokens.size());
      }
      EXPECT_EQ(tokens, expected) << "request " << key.first << " sample " << key.second;
    }
    const EngineStats stats = engine.Stats();
    EXPECT_EQ(stats.pages_free, stats.pages) << "pages leaked";
    EXPECT_EQ(got.size(), features & kSeveralSamples ? 3u + 3u * kSamples : 6u);
    if (features & kPreemption) {
      EXPECT_GT(stats.preemptions, 0);
    }
    if (features & kPrefixCache) {
      EXPECT_GT(stats.cached_tokens, 0);
    }
    cancelled_ += static_cast<int>(cancelled.size());
  }
};

int EngineEqualityTest::cancelled_ = 0;

TEST_P(EngineEqualityTest, TokensAreThoseOfARequestAlone) {
  const Transcript alone = Alone(GetParam(), kSamples);
  std::vector<unsigned> cases{0, (1u << kFeatures) - 1};
  for (unsigned a = 0; a < kFeatures; ++a) {
    for (unsigned b = a; b < kFeatures; ++b) cases.push_back(1u << a | 1u << b);
  }
  for (const Topology& topology : LayoutsOf(World().size())) {
    for (const unsigned features : cases) {
      SCOPED_TRACE(NameOf(topology) + NameOf(features));
      WithWorker(GetParam(), topology, OptionsOf(features), [&](Worker& worker) {
        const std::unique_ptr<Engine> engine =
            Engine::Create(worker, nullptr,
                           {.prefix_cache = (features & kPrefixCache) != 0,
                            .overlap = (features & kOverlap) != 0})
                .value();
        RunWorkload(*engine, features, alone);
      });
    }
  }
  if (World().rank() == 0) {
    EXPECT_GT(cancelled_, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, EngineEqualityTest,
                         ::testing::Values("stories260K", "tiny-mistral-swa"),
                         [](const auto& info) {
                           return std::string(info.param) == "stories260K" ? "FullAttention"
                                                                           : "SlidingWindow";
                         });

}  // namespace
}  // namespace trireme
