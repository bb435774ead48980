#include "parallel/flight_recorder.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace trireme {
namespace {

std::unique_ptr<FlightRecorder> NewRecorder(int rank = 3) {
  auto recorder = FlightRecorder::Create(rank);
  EXPECT_TRUE(recorder.ok()) << recorder.status();
  (*recorder)->AddGroup({{"world"}, 0, 1, 4});
  return *std::move(recorder);
}

TEST(FlightRecorder, TellsWhatACallIs) {
  const auto recorder = NewRecorder();
  EXPECT_EQ(recorder->AddGroup({{"tp"}, 2, 1, 2}), 1);
  EXPECT_EQ(recorder->AddGroup({{"tp"}, 2, 1, 2}), 1) << "the same group";
  recorder->BeginStep(Phase::kDecode, 17, 1);
  { const FlightRecorder::Scope scope(recorder.get(), CommOp::kAllReduce, 1, 256); }
  {
    FlightRecorder::Scope scope(recorder.get(), CommOp::kReceive, 0, -1, 2);
    RankState during = recorder->State();
    EXPECT_TRUE(during.in_call);
    EXPECT_EQ(during.last.bytes, -1);
    EXPECT_EQ(during.last.peer, 2);
    scope.SetBytes(99);
  }
  recorder->EndStep();
  const RankState state = recorder->State();
  EXPECT_EQ(state.rank, 3);
  EXPECT_EQ(state.phase, Phase::kDecode);
  EXPECT_EQ(state.step, 17);
  EXPECT_EQ(state.steps_done, 1);
  EXPECT_EQ(state.calls_done, 2u);
  EXPECT_FALSE(state.in_call);
  EXPECT_EQ(state.entered[1], 1u);
  EXPECT_EQ(state.entered[0], 0u) << "a message is no collective";
  const std::vector<FlightRecord> records = recorder->Records();
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].op, CommOp::kAllReduce);
  EXPECT_EQ(records[0].group, 1);
  EXPECT_EQ(records[0].group_sequence, 1u);
  EXPECT_EQ(records[0].bytes, 256);
  EXPECT_EQ(records[0].micro_batch, 17);
  EXPECT_EQ(records[0].stage, 1);
  EXPECT_LE(records[0].entered_ns, records[0].completed_ns);
  EXPECT_LE(records[0].completed_ns, records[1].entered_ns);
  EXPECT_EQ(records[1].bytes, 99);
}

TEST(FlightRecorder, KeepsTheLastCalls) {
  const auto recorder = NewRecorder();
  const int calls = 3 * FlightRecorder::kRecords + 5;
  for (int i = 0; i < calls; ++i)
    const FlightRecorder::Scope scope(recorder.get(), CommOp::kBarrier, 0, i);
  const std::vector<FlightRecord> records = recorder->Records();
  ASSERT_EQ(records.size(), static_cast<size_t>(FlightRecorder::kRecords));
  for (size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i].sequence, calls - records.size() + i + 1);
    EXPECT_EQ(records[i].bytes, static_cast<int64_t>(records[i].sequence) - 1);
  }
}

// Every field of a record is made from its sequence; a torn one would mix two.
TEST(FlightRecorder, AReaderNeverSeesHalfARecord) {
  const auto recorder = NewRecorder();
  std::atomic<bool> stop{false};
  std::atomic<int64_t> seen{0};
  std::thread reader([&] {
    while (!stop.load()) {
      for (const FlightRecord& record : recorder->Records()) {
        const int64_t i = static_cast<int64_t>(record.sequence) - 1;
        ASSERT_EQ(record.bytes, 7 * i);
        ASSERT_EQ(record.micro_batch, i);
        ASSERT_EQ(record.peer, static_cast<int32_t>(i % 1000));
        ASSERT_EQ(record.op, i % 2 == 0 ? CommOp::kSend : CommOp::kRecv);
        seen.fetch_add(1);
      }
    }
  });
  int64_t i = 0;
  for (; i < 20'000 || (seen.load() < 50'000 && i < 20'000'000); ++i) {
    recorder->BeginStep(Phase::kDecode, i, 0);
    const FlightRecorder::Scope scope(recorder.get(), i % 2 == 0 ? CommOp::kSend : CommOp::kRecv, 0,
                                      7 * i, static_cast<int>(i % 1000));
  }
  stop.store(true);
  reader.join();
  EXPECT_GT(seen.load(), 0);
}

// A thread waits in a call while another one makes more calls than the ring holds.
TEST(FlightRecorder, ALongCallOutlastsItsRecord) {
  const auto recorder = NewRecorder();
  {
    const FlightRecorder::Scope wait(recorder.get(), CommOp::kReceive, 0, -1, 2);
    std::thread([&] {
      for (int i = 0; i < 2 * FlightRecorder::kRecords; ++i)
        const FlightRecorder::Scope scope(recorder.get(), CommOp::kAllReduce, 0, 8);
    }).join();
    const RankState state = recorder->State();
    EXPECT_TRUE(state.in_call);
    EXPECT_EQ(state.last.op, CommOp::kReceive);
    EXPECT_EQ(state.last.peer, 2);
  }
  EXPECT_FALSE(recorder->State().in_call);
  for (const FlightRecord& record : recorder->Records()) {
    EXPECT_EQ(record.op, CommOp::kAllReduce);
    EXPECT_GT(record.completed_ns, 0);
  }
}

TEST(FlightRecorder, ThreadsWriteAtOnce) {
  const auto recorder = NewRecorder();
  recorder->AddGroup({{"tp"}, 2, 1, 2});
  constexpr int kCalls = 20'000;
  const auto write = [&](int group) {
    for (int i = 0; i < kCalls; ++i)
      const FlightRecorder::Scope scope(recorder.get(), CommOp::kAllReduce, group, group);
  };
  std::thread other(write, 1);
  write(0);
  other.join();
  const RankState state = recorder->State();
  EXPECT_EQ(state.calls_done, 2u * kCalls);
  EXPECT_EQ(state.entered[0], uint64_t{kCalls});
  EXPECT_EQ(state.entered[1], uint64_t{kCalls});
  EXPECT_FALSE(state.in_call);
  for (const FlightRecord& record : recorder->Records()) EXPECT_EQ(record.bytes, record.group);
}

TEST(FlightRecorder, AnotherProcessMapsIt) {
  const auto recorder = NewRecorder();
  const FlightRecorder::Scope scope(recorder.get(), CommOp::kBarrier, 0, 5);
  const auto mapped =
      FlightRecorder::Map(absl::StrCat("/proc/", getpid(), "/fd/", recorder->memory_fd()));
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  EXPECT_TRUE((*mapped)->State().in_call);
  EXPECT_EQ((*mapped)->State().rank, 3);
  EXPECT_EQ((*mapped)->Records().size(), 1u);
  EXPECT_FALSE(FlightRecorder::Map("/proc/self/exe").ok());
  EXPECT_FALSE(FlightRecorder::Map("/nowhere").ok());
}

TEST(FlightRecorder, WritesJson) {
  const auto recorder = NewRecorder();
  { const FlightRecorder::Scope scope(recorder.get(), CommOp::kAgree, 0, 5); }
  const FlightRecorder::Scope open(recorder.get(), CommOp::kRecv, 0, 64, 1);
  const auto json = nlohmann::json::parse(recorder->ToJson("node\"1"), nullptr, false);
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["host"], "node\"1");
  ASSERT_EQ(json["records"].size(), 2u);
  EXPECT_EQ(json["records"][0]["op"], "agree");
  EXPECT_EQ(json["records"][0]["group"], "world");
  EXPECT_FALSE(json["records"][0]["completed_us_ago"].is_null());
  EXPECT_EQ(json["records"][1]["peer"], 1);
  EXPECT_TRUE(json["records"][1]["completed_us_ago"].is_null());
}

TEST(FlightRecorder, AFullDiskIsOneLine) {
  if (access("/dev/full", W_OK) != 0) GTEST_SKIP() << "no /dev/full";
  const absl::Status status = WriteTextFile("/dev/full", "text");
  EXPECT_EQ(status.message(), "/dev/full: cannot be written: No space left on device");
  EXPECT_FALSE(WriteTextFile("/nowhere/x", "text").ok());
}

TEST(FlightRecorder, RecordsNothingWithoutARecorder) {
  FlightRecorder::Scope scope(nullptr, CommOp::kBarrier, 0, 0);
  scope.SetBytes(1);
}

TEST(CommGroup, NamesItsRanks) {
  EXPECT_EQ(Describe({{"world"}, 0, 1, 8}), "world");
  EXPECT_EQ(Describe({{"tp"}, 2, 1, 2}), "tp 2-3");
  EXPECT_EQ(Describe({{"pp"}, 1, 2, 3}), "pp 1,3,5");
  EXPECT_TRUE((CommGroup{{"pp"}, 1, 2, 3}.Contains(5)));
  EXPECT_FALSE((CommGroup{{"pp"}, 1, 2, 3}.Contains(7)));
  EXPECT_FALSE((CommGroup{{"pp"}, 1, 2, 3}.Contains(2)));
}

}  // namespace
}  // namespace trireme
