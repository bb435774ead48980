// A step that fails is the end of the engine: every request that was accepted ends with what went
// wrong, no more are taken, and nobody waits. On one rank; tests/launch has those that others
// watch.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "runtime/evaluation.h"
#include "runtime/hidden_states.h"
#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/runtime/failing_device.h"
#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/cublas_lt_double.h"
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

class EngineFailureTest : public ::testing::Test {
 protected:
  void Run(const std::function<void(Worker&)>& lead) {
    WorkerOptions options;
    options.open_device =
        [this](const DeviceOptions& asked) -> absl::StatusOr<std::unique_ptr<Device>> {
      absl::StatusOr<std::unique_ptr<Device>> device = OpenDevice(asked);
      if (!device.ok()) return device.status();
      return std::make_unique<FailingDevice>(*std::move(device), &fail_, stays_);
    };
    WithWorker("stories260K", {}, std::move(options), lead);
  }
  static Request Prompt(uint64_t id) {
    Request request;
    request.id = id;
    request.prompt = {1, 403, 407};
    request.max_tokens = 500;
    return request;
  }
  static void ExpectTheError(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
    EXPECT_EQ(status.message(), FailingDevice::kError);
  }

  std::atomic<bool> fail_ = false;
  bool stays_ = false;
};

TEST_F(EngineFailureTest, AFailedStepEndsEveryRequestAndTakesNoMore) {
  Run([this](Worker& worker) {
    const std::unique_ptr<Engine> engine = Engine::Create(worker, nullptr).value();
    fail_ = true;
    Request request = Prompt(1);
    request.n = 2;
    std::vector<TokenOutput> outputs;
    ASSERT_TRUE(
        engine->Submit(request, [&](const TokenOutput& output) { outputs.push_back(output); })
            .ok());
    ExpectTheError(engine->Drain());
    ExpectTheError(engine->Submit(Prompt(2)).status());
    ASSERT_EQ(outputs.size(), 2u);
    for (const TokenOutput& output : outputs) {
      EXPECT_EQ(output.finish, FinishReason::kError);
      ExpectTheError(output.status);
    }
    ExpectTheError(engine->Timeline(1)->status);
    const EngineStats stats = engine->Stats();
    EXPECT_EQ(stats.finished[static_cast<size_t>(FinishReason::kError)], 2);
    EXPECT_EQ(stats.pages_free, stats.pages);
  });
}

// One that came between the engine's look at its mail and the failure in it was accepted, never
// planned, and waited for without end.
TEST_F(EngineFailureTest, WhatComesInWhileAStepFailsEndsToo) {
  constexpr int32_t kSamples = 32;  // keep the engine between the two for a while
  // Where the engine is slower than who submits, each look at its mail finds more than the one
  // before, and only this ends it.
  const EngineOptions options{.max_queue = 128 * kSamples};
  Run([&](Worker& worker) {
    for (int round = 0; round < 8; ++round) {
      const std::unique_ptr<Engine> engine = Engine::Create(worker, nullptr, options).value();
      std::atomic<int> accepted = 0, ended = 0;
      std::vector<std::thread> threads;
      for (uint64_t t = 0; t < 2; ++t) {
        threads.emplace_back([&, t] {
          absl::Status status;
          for (uint64_t id = t; status.ok() || absl::IsResourceExhausted(status); id += 2) {
            Request request = Prompt(id);
            request.n = kSamples;
            status = engine->Submit(request, [&](const TokenOutput& output) {
              ended += output.finish != FinishReason::kNone;
            });
            if (status.ok() && ++accepted == 10) fail_ = true;
            std::this_thread::sleep_for(std::chrono::microseconds(50));  // leaves the engine a core
          }
          ExpectTheError(status);
        });
      }
      for (std::thread& thread : threads) thread.join();
      ASSERT_TRUE(engine->WaitIdle(std::chrono::seconds(30)).ok()) << "round " << round;
      ExpectTheError(engine->Drain());
      EXPECT_EQ(ended, accepted * kSamples);
    }
  });
}

// These ended in a CHECK, which calls a lost GPU our fault.
TEST_F(EngineFailureTest, EvaluationAndHiddenStatesEndWithTheDevicesError) {
  stays_ = true;
  Run([this](Worker& worker) {
    StepPipeline pipeline(worker);
    fail_ = true;
    const auto none = [](int64_t, std::span<const float>) { FAIL() << "no result is one"; };
    // Twice: the device stays lost, as for a step that was planned ahead.
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(Evaluate(worker, pipeline, {1, 403, 407}, none).message(), FailingDevice::kError);
      EXPECT_EQ(HiddenStates(worker, pipeline, {{1, 403}}, none).message(), FailingDevice::kError);
    }
  });
}

#if defined(TRIREME_HOST_CUDA)
// It comes where the matmul is enqueued, and waits there for who synchronises.
TEST(EngineFailureInTheEmulatorTest, AnErrorOfCublasLtEndsTheRequest) {
  WorkerOptions options;
  options.dtype = DType::kBF16;
  options.max_model_len = 64;
  options.max_num_seqs = 1;
  options.open_device = [](const DeviceOptions&) { return NewHostCudaDeviceWithCublasLt(); };
  const auto worker = Worker::Load(World(), {}, GoldenModel("tiny-llama3"), options);
  ASSERT_TRUE(worker.ok()) << worker.status();
  const std::unique_ptr<Engine> engine = Engine::Create(**worker, nullptr).value();
  TheCublasLtDouble().failing = "cublasLtMatmul";
  TheCublasLtDouble().status = 13;
  Request request;
  request.prompt = Tokens(20, 7);  // more than the own kernel's
  request.max_tokens = 4;
  TokenOutput last;
  ASSERT_TRUE(engine->Submit(request, [&](const TokenOutput& output) { last = output; }).ok());
  const std::string message(engine->Drain().message());
  TheCublasLtDouble().failing = nullptr;
  EXPECT_EQ(last.finish, FinishReason::kError);
  EXPECT_EQ(last.status.message(), message);
  EXPECT_NE(message.find("cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED"), std::string::npos)
      << message;
}
#endif

}  // namespace
}  // namespace trireme
