// A stream that gets on when the test says so: a mark is passed when the stream's position is
// beyond it.
#include "parallel/enqueued_calls.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace trireme {
namespace {

std::atomic<intptr_t> g_position;

EnqueuedCalls::Mark At(intptr_t position) {
  return reinterpret_cast<EnqueuedCalls::Mark>(position);
}
bool Passed(EnqueuedCalls::Mark mark) { return reinterpret_cast<intptr_t>(mark) <= g_position; }

class EnqueuedCallsTest : public testing::Test {
 protected:
  void SetUp() override {
    g_position = 0;
    recorder_ = *FlightRecorder::Create(2);
    recorder_->AddGroup({{"tp"}, 2, 1, 2});
    recorder_->BeginStep(Phase::kDecode, 41, 1);
  }
  // Call i is between positions 10 * i + 5 and 10 * i + 8.
  void Enqueue(int i) {
    calls_.Add(*recorder_, recorder_->Now({CommOp::kAllReduce, 0, 256 + i}), At(10 * i + 5),
               At(10 * i + 8));
  }
  RankState StateAt(intptr_t position) {
    g_position = position;
    calls_.Look();
    return recorder_->State();
  }
  std::unique_ptr<FlightRecorder> recorder_;
  EnqueuedCalls calls_{&Passed};
};

TEST_F(EnqueuedCallsTest, ACallIsUnderWayWhileTheStreamIsInIt) {
  for (int i = 0; i < 3; ++i) Enqueue(i);
  // The host is in the next step already; the records are of the one that made the calls.
  recorder_->BeginStep(Phase::kDecode, 42, 1);
  RankState state = StateAt(4);
  EXPECT_FALSE(state.in_call) << "the stream computes";
  EXPECT_EQ(state.entered[0], 0u) << "enqueued is not entered";
  state = StateAt(6);
  EXPECT_TRUE(state.in_call);
  EXPECT_EQ(state.entered[0], 1u);
  EXPECT_EQ(state.calls_done, 0u);
  EXPECT_EQ(state.last.bytes, 256);
  EXPECT_EQ(state.last.micro_batch, 41);
  state = StateAt(9);
  EXPECT_FALSE(state.in_call);
  EXPECT_EQ(state.calls_done, 1u);
  // Several calls between two looks.
  state = StateAt(26);
  EXPECT_TRUE(state.in_call);
  EXPECT_EQ(state.entered[0], 3u);
  EXPECT_EQ(state.calls_done, 2u);
  const std::vector<FlightRecord> records = recorder_->Records();
  ASSERT_EQ(records.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(records[i].bytes, 256 + i);
    EXPECT_EQ(records[i].micro_batch, 41);
    EXPECT_EQ(records[i].stage, 1);
    EXPECT_EQ(records[i].completed_ns == 0, i == 2);
  }
}

TEST_F(EnqueuedCallsTest, GivesMarksBack) {
  EXPECT_EQ(calls_.TakeSpare(), nullptr);
  for (int i = 0; i < 2; ++i) Enqueue(i);
  StateAt(16);  // in the second call
  EXPECT_NE(calls_.TakeSpare(), nullptr);
  EXPECT_NE(calls_.TakeSpare(), nullptr);
  EXPECT_EQ(calls_.TakeSpare(), nullptr);
  EXPECT_EQ(calls_.TakeAll().size(), 2u);
  EXPECT_TRUE(recorder_->State().in_call) << "a call that did not end stays";
}

// The one that enqueues, the poller, and who synchronises.
TEST_F(EnqueuedCallsTest, ThreadsLookAtOnce) {
  constexpr int kCalls = 5000;
  std::atomic<bool> stop{false};
  std::thread poller([&] {
    while (!stop.load()) calls_.Look();
  });
  for (int i = 0; i < kCalls; ++i) {
    Enqueue(i);
    g_position = 10 * i + 8;
    if (i % 3 == 0) calls_.Look();
  }
  stop.store(true);
  poller.join();
  const RankState state = StateAt(10 * kCalls);
  EXPECT_EQ(state.calls_done, uint64_t{kCalls});
  EXPECT_EQ(state.entered[0], uint64_t{kCalls});
  EXPECT_FALSE(state.in_call);
}

}  // namespace
}  // namespace trireme
