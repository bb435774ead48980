// The cache alone, over a stream without a device: what is replayed, what stays eager and why, and
// what is counted and said.

#include "runtime/graph_cache.h"

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "runtime/decode_graphs.h"
#include "tests/runtime/recording_stream.h"

namespace trireme {
namespace {

// out[i] = 3 in[i] + salt, where the salt is a value that the host has in hand.
class GraphCacheTest : public ::testing::Test {
 protected:
  void Triple(int32_t salt = 0) {
    ++enqueued_;
    stream_.Enqueue([this, salt] {
      for (size_t i = 0; i < in_.size(); ++i) out_[i] = 3 * in_[i] + salt;
    });
  }
  void Fill(int32_t value) {
    for (size_t i = 0; i < in_.size(); ++i) in_[i] = value + static_cast<int32_t>(i);
  }
  GraphTrial TrialOf(std::function<void()> work) {
    return {.fill = [this](int round) { Fill(100 * round); },
            .work = std::move(work),
            .outputs = {ConstTensorView(out_.data(), DType::kI32, {4})}};
  }
  GraphCache Cache(std::function<bool(bool)> all_ranks = {}) {
    return GraphCache({.all_ranks = std::move(all_ranks)});
  }
  // Runs the key on new inputs; what comes out must be right either way. Was it replayed?
  bool Replays(GraphCache& cache, const GraphKey& key) {
    Fill(++value_);
    const int before = enqueued_;
    const int64_t replays = cache.stats().replays;
    cache.Run(stream_, key, [&] { Triple(); });
    for (size_t i = 0; i < in_.size(); ++i) EXPECT_EQ(out_[i], 3 * in_[i]);
    EXPECT_EQ(cache.stats().replays - replays, before == enqueued_ ? 1 : 0);
    return before == enqueued_;
  }

  HostDevice device_;
  RecordingStream stream_{&device_};
  std::array<int32_t, 4> in_{}, out_{};
  int enqueued_ = 0, value_ = 1000;
};

TEST_F(GraphCacheTest, ReplaysWhatWasCapturedOnNewInputs) {
  GraphCache cache = Cache();
  const GraphKey key{.work = "triple", .size = 4};
  EXPECT_FALSE(cache.Holds(key));
  EXPECT_TRUE(cache.Capture(stream_, key, TrialOf([this] { Triple(); })));
  EXPECT_TRUE(cache.Holds(key));
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(Replays(cache, key));
  EXPECT_EQ(cache.stats().graphs, 1);
  EXPECT_EQ(cache.stats().bytes, RecordingStream::kGraphBytes);
  EXPECT_TRUE(cache.refusal().ok());
}

TEST_F(GraphCacheTest, AKeyIsItsWorkItsSizeAndItsVariant) {
  GraphCache cache = Cache();
  const std::string work = "triple";  // the same name, elsewhere in memory
  ASSERT_TRUE(cache.Capture(stream_, {.work = "triple", .size = 4, .variant = 1},
                            TrialOf([this] { Triple(); })));
  EXPECT_TRUE(Replays(cache, {.work = work, .size = 4, .variant = 1}));
  EXPECT_FALSE(Replays(cache, {.work = work, .size = 8, .variant = 1}));
  EXPECT_FALSE(Replays(cache, {.work = work, .size = 4, .variant = 0}));
  EXPECT_FALSE(Replays(cache, {.work = "search", .size = 4, .variant = 1}));
  EXPECT_EQ(cache.stats().eager_runs(EagerReason::kNotCaptured), 3);
}

TEST_F(GraphCacheTest, WhatCannotBeCapturedStaysEagerAndIsKeptToBeSaidOnce) {
  GraphCache cache = Cache();
  stream_.capture_status = absl::InternalError("gpu: unwell");
  for (const int64_t size : {1, 2}) {
    EXPECT_FALSE(
        cache.Capture(stream_, {.work = "triple", .size = size}, TrialOf([this] { Triple(); })));
  }
  stream_.capture_status = absl::OkStatus();
  EXPECT_TRUE(cache.Capture(stream_, {.work = "triple", .size = 3}, TrialOf([this] { Triple(); })));
  EXPECT_FALSE(Replays(cache, {.work = "triple", .size = 1}));
  EXPECT_FALSE(Replays(cache, {.work = "triple", .size = 2}));
  EXPECT_TRUE(Replays(cache, {.work = "triple", .size = 3}));
  EXPECT_EQ(cache.stats().refusals(EagerReason::kCaptureFailed), 2);
  EXPECT_EQ(cache.stats().eager_runs(EagerReason::kCaptureFailed), 2);
  EXPECT_EQ(cache.refusal(),
            absl::InternalError("triple of 1 runs without a graph: it could not be captured (gpu: "
                                "unwell); more are counted, not told"));
}

// Whose owner knows what to lower.
TEST_F(GraphCacheTest, WhatLackedMemoryIsSaidBeforeAllElse) {
  GraphCache cache = Cache();
  int64_t size = 0;
  for (const absl::Status& status :
       {absl::InternalError("unwell"), absl::ResourceExhaustedError("full"),
        absl::ResourceExhaustedError("fuller"), absl::InternalError("unwell")}) {
    stream_.capture_status = status;
    EXPECT_FALSE(
        cache.Capture(stream_, {.work = "triple", .size = ++size}, TrialOf([this] { Triple(); })));
  }
  EXPECT_EQ(cache.refusal(),
            absl::ResourceExhaustedError("triple of 2 runs without a graph: it could not be "
                                         "captured (full); more are counted, not told"));
  std::vector<std::string> told;
  const auto tell = [&told](const std::string& line) { told.push_back(line); };
  TellRefusal(nullptr, cache.refusal(), tell);
  TellRefusal(nullptr, absl::OkStatus(), tell);
  TellRefusal(nullptr, cache.refusal(), nullptr);
  EXPECT_EQ(told, std::vector<std::string>{std::string(cache.refusal().message())});
}

TEST_F(GraphCacheTest, AValueOfTheHostIsFoundOutAndTheKeyStaysEager) {
  GraphCache cache = Cache();
  const GraphKey key{.work = "triple", .size = 4};
  int32_t rounds = 0;
  GraphTrial trial = TrialOf([&] { Triple(rounds); });
  trial.fill = [&](int round) { Fill(100 * round), rounds = round; };
  EXPECT_FALSE(cache.Capture(stream_, key, trial));
  EXPECT_EQ(stream_.graphs_alive, 0);
  EXPECT_FALSE(Replays(cache, key));
  EXPECT_EQ(cache.stats().graphs, 0);
  EXPECT_EQ(cache.stats().bytes, 0);
  EXPECT_EQ(cache.stats().refusals(EagerReason::kNotEqual), 1);
  EXPECT_EQ(cache.stats().eager_runs(EagerReason::kNotEqual), 1);
  EXPECT_NE(cache.refusal().message().find("other bits"), std::string::npos) << cache.refusal();
}

// Work done behind the stream's back is not in the graph. The eager run before must not hide that.
TEST_F(GraphCacheTest, AReplayThatDoesNothingIsFoundOut) {
  GraphCache cache = Cache();
  EXPECT_FALSE(cache.Capture(stream_, {.work = "triple"}, TrialOf([this] {
                               for (size_t i = 0; i < in_.size(); ++i) out_[i] = 3 * in_[i];
                             })));
  EXPECT_EQ(cache.stats().refusals(EagerReason::kNotEqual), 1);
}

TEST_F(GraphCacheTest, WhatAnotherRankCannotDoIsNotDoneHere) {
  // The first question is whether the capture succeeded, the second whether the replay was equal.
  for (const int refuses : {0, 1}) {
    int asked = 0;
    GraphCache cache = Cache([&](bool here) { return here && asked++ != refuses; });
    const GraphKey key{.work = "triple"};
    EXPECT_FALSE(cache.Capture(stream_, key, TrialOf([this] { Triple(); })));
    EXPECT_EQ(asked, refuses + 1);
    EXPECT_FALSE(Replays(cache, key));
    EXPECT_EQ(
        cache.stats().refusals(refuses == 0 ? EagerReason::kCaptureFailed : EagerReason::kNotEqual),
        1);
    EXPECT_TRUE(cache.refusal().ok()) << "the other rank says why";
  }
}

// All ranks ask each other equally often, whatever happens to one of them.
TEST_F(GraphCacheTest, AFaultOfTheDeviceStaysInStepWithTheOtherRanks) {
  int asked = 0;
  GraphCache cache = Cache([&](bool here) { return ++asked, here; });
  stream_.synchronize_status = absl::InternalError("gpu: lost");
  EXPECT_FALSE(cache.Capture(stream_, {.work = "triple"}, TrialOf([this] { Triple(); })));
  EXPECT_EQ(asked, 1);
  EXPECT_NE(cache.refusal().message().find("gpu: lost"), std::string::npos) << cache.refusal();
}

TEST_F(GraphCacheTest, GraphsGoWithTheCache) {
  {
    GraphCache cache = Cache();
    for (const int64_t size : {1, 2, 3})
      cache.Capture(stream_, {.work = "triple", .size = size}, TrialOf([this] { Triple(); }));
    EXPECT_EQ(stream_.graphs_alive, 3);
    EXPECT_EQ(cache.stats().bytes, 3 * RecordingStream::kGraphBytes);
  }
  EXPECT_EQ(stream_.graphs_alive, 0);
}

TEST_F(GraphCacheTest, AStreamThatRunsItsWorkAtOnceCapturesNothing) {
  EXPECT_EQ(GraphCache::WhyNever(stream_), std::nullopt);
  HostStream inline_stream(&device_);
  EXPECT_EQ(GraphCache::WhyNever(inline_stream), EagerReason::kDevice);
  GraphCache cache({.never = EagerReason::kDevice});
  EXPECT_FALSE(cache.Capture(stream_, {.work = "triple"}, TrialOf([this] { Triple(); })));
  EXPECT_EQ(enqueued_, 0) << "tried all the same";
  EXPECT_FALSE(Replays(cache, {.work = "triple"}));
  cache.RunEagerly(EagerReason::kPrompt, [this] { Triple(); });
  EXPECT_EQ(cache.stats().eager_runs(EagerReason::kDevice), 1);
  EXPECT_EQ(cache.stats().eager_runs(EagerReason::kPrompt), 1);
}

TEST(DecodeGraphsTest, BucketsEndWithTheSlots) {
  EXPECT_EQ(DecodeBuckets(1), (std::vector<int64_t>{1}));
  EXPECT_EQ(DecodeBuckets(3), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(DecodeBuckets(8), (std::vector<int64_t>{1, 2, 4, 8}));
  EXPECT_EQ(DecodeBuckets(33), (std::vector<int64_t>{1, 2, 4, 8, 16, 24, 32, 33}));
  EXPECT_EQ(DecodeBuckets(160),
            (std::vector<int64_t>{1,  2,  4,  8,  16,  24,  32,  40,  48,  56, 64,
                                  72, 80, 88, 96, 104, 112, 120, 128, 144, 160}));
  EXPECT_LE(DecodeBuckets(4096).size(), 70u);  // each takes its time at start-up, and memory
}

TEST(DecodeGraphsTest, ABucketIsTheSmallestThatHoldsTheBatch) {
  const std::vector<int64_t> buckets = DecodeBuckets(500);
  for (int64_t n = 1; n <= 500; ++n) {
    const int64_t bucket = BucketOf(buckets, n);
    EXPECT_GE(bucket, n);
    if (n > 64) {
      EXPECT_LE(bucket, n + n / 8) << n;
    }
    for (const int64_t other : buckets) EXPECT_FALSE(other >= n && other < bucket);
  }
  EXPECT_EQ(BucketOf(buckets, 501), 0);
  EXPECT_EQ(BucketOf({}, 1), 0);
}

TEST(DecodeGraphsTest, ADecodeStepHasOneSampledTokenOfEachSequence) {
  StepPlan plan;
  EXPECT_FALSE(IsDecodeStep(plan));
  plan.chunks.push_back({.num_tokens = 1, .logit_rows = LogitRows::kLast, .decode = true});
  EXPECT_TRUE(IsDecodeStep(plan));
  plan.chunks.push_back({.num_tokens = 1, .logit_rows = LogitRows::kLast});  // a prompt's last one
  EXPECT_TRUE(IsDecodeStep(plan));
  for (const Chunk& other : {Chunk{.num_tokens = 2, .logit_rows = LogitRows::kLast},
                             Chunk{.num_tokens = 1, .logit_rows = LogitRows::kNone},
                             Chunk{.num_tokens = 1, .logit_rows = LogitRows::kAll}}) {
    plan.chunks.push_back(other);
    EXPECT_FALSE(IsDecodeStep(plan));
    plan.chunks.pop_back();
  }
}

}  // namespace
}  // namespace trireme
