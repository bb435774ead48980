// The engine's promises to its callers: what is refused and how, that nothing a caller does stops
// it, and what it tells about itself.

#include "runtime/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <limits>
#include <stdexcept>
#include <thread>

#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

// On the leader only: the others have no engine.
class EngineTest : public ::testing::Test {
 protected:
  void Run(const EngineOptions& engine_options, WorkerOptions options,
           const std::function<void(Engine&)>& lead) {
    // Half of the worlds are a pipeline, the others tensor parallel.
    const int world = World().size();
    const Topology topology{world == 4 ? 2 : 1, world == 4 ? 2 : world, 1};
    WithWorker("stories260K", topology, std::move(options), [&](Worker& worker) {
      lead(*Engine::Create(worker, nullptr, engine_options).value());
    });
  }
  static Request Prompt(uint64_t id, int64_t max_tokens = 8) {
    Request request;
    request.id = id;
    request.prompt = {1, 403, 407};
    request.max_tokens = max_tokens;
    return request;
  }
  static void Nothing(const TokenOutput&) {}
};

bool Says(const absl::Status& status, absl::StatusCode code, const std::string& what) {
  return status.code() == code && std::string(status.message()).find(what) != std::string::npos;
}

TEST_F(EngineTest, CreateRefusesAnotherRankAndOptionsOutOfRange) {
  const Topology topology{1, World().size(), 1};
  auto worker = Worker::Load(World(), topology, GoldenModel("stories260K"), {});
  ASSERT_TRUE(worker.ok()) << worker.status().message();
  const auto refusal = [&](const EngineOptions& options) {
    return Engine::Create(**worker, nullptr, options).status();
  };
  if (World().rank() != (*worker)->leader()) {
    EXPECT_TRUE(Says(refusal({}), absl::StatusCode::kFailedPrecondition,
                     "rank " + std::to_string(World().rank()) +
                         " is not its replica's leader, which rank 0 is"));
  } else {
    EXPECT_TRUE(Says(refusal({.ageing_steps = 0}), absl::StatusCode::kInvalidArgument,
                     "ageing_steps is 0"));
    EXPECT_TRUE(
        Says(refusal({.max_queue = -1}), absl::StatusCode::kInvalidArgument, "max_queue is -1"));
  }
  World().Barrier();
}

TEST_F(EngineTest, RefusesBadRequestsAndDisturbsNothing) {
  WorkerOptions options;
  options.max_model_len = 64;
  options.num_pages = 3;
  Run({}, options, [](Engine& engine) {
    const auto running = engine.Submit(Prompt(1, 40));
    ASSERT_TRUE(running.ok());
    Request request = Prompt(1);
    EXPECT_TRUE(Says(engine.Submit(request, Nothing), absl::StatusCode::kAlreadyExists, "id 1"));
    request = Prompt(2, 1000);
    EXPECT_TRUE(Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument,
                     "needs 4 KV pages of 16 tokens and the cache has 3"));
    request = Prompt(2);
    request.prompt.clear();
    EXPECT_TRUE(Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument, "empty"));
    request.prompt = {1, 1 << 20};
    EXPECT_TRUE(
        Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument, "vocabulary"));
    request.prompt = {-1};
    EXPECT_TRUE(
        Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument, "token id -1"));
    request.prompt.assign(64, 1);
    EXPECT_TRUE(Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument,
                     "--max-model-len 64"));
    request = Prompt(2);
    request.sampling.temperature = -1.0f;
    EXPECT_TRUE(Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument,
                     "temperature is -1"));
    request = Prompt(2);
    request.stop = {""};
    EXPECT_TRUE(
        Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument, "stop string"));
    request = Prompt(2);
    request.n = 0;
    EXPECT_TRUE(Says(engine.Submit(request, Nothing), absl::StatusCode::kInvalidArgument, "n is"));
    EXPECT_TRUE(Says(engine.Cancel(77), absl::StatusCode::kNotFound, "77"));
    EXPECT_EQ(engine.Timeline(77).status().code(), absl::StatusCode::kNotFound);
    int tokens = 0;
    while ((*running)->Next()) ++tokens;
    EXPECT_EQ(tokens, 40);
    EXPECT_TRUE(engine.Drain().ok());
    EXPECT_TRUE(
        Says(engine.Submit(Prompt(3), Nothing), absl::StatusCode::kFailedPrecondition, "draining"));
    const EngineStats stats = engine.Stats();
    EXPECT_EQ(stats.requests, 1);
    EXPECT_EQ(stats.refused, 10);
    EXPECT_EQ(stats.finished[static_cast<size_t>(FinishReason::kLength)], 1);
  });
}

TEST_F(EngineTest, AFullQueueIsToldAtOnce) {
  WorkerOptions options;
  options.max_num_seqs = 1;
  Run({.max_queue = 2}, options, [](Engine& engine) {
    std::promise<void> gate;
    const std::shared_future<void> open = gate.get_future().share();
    const auto wait = [open](const TokenOutput&) { open.wait(); };
    for (uint64_t id = 0; id < 3; ++id) ASSERT_TRUE(engine.Submit(Prompt(id), wait).ok());
    EXPECT_TRUE(Says(engine.Submit(Prompt(3), wait), absl::StatusCode::kResourceExhausted,
                     "overloaded: 3 samples are open and this request has 1 (--max-num-seqs 1 + "
                     "--max-queue 2)"));
    EXPECT_EQ(engine.Stats().overloaded, 1);
    gate.set_value();
    EXPECT_TRUE(engine.WaitIdle().ok());
    EXPECT_TRUE(engine.Submit(Prompt(3), wait).ok());
    EXPECT_TRUE(engine.Drain().ok());
  });
}

TEST_F(EngineTest, AQueueOfAnyLengthIsOne) {
  Run({.max_queue = std::numeric_limits<int64_t>::max()}, {}, [](Engine& engine) {
    EXPECT_TRUE(engine.Submit(Prompt(1), Nothing).ok());
    EXPECT_TRUE(engine.Drain().ok());
  });
}

// A request of n samples is n in the queue; it used to count as one.
TEST_F(EngineTest, TheQueueCountsSamples) {
  WorkerOptions options;
  options.max_num_seqs = 2;
  Run({.max_queue = 3}, options, [](Engine& engine) {
    std::promise<void> gate;
    const std::shared_future<void> open = gate.get_future().share();
    const auto wait = [open](const TokenOutput&) { open.wait(); };
    const auto samples = [](uint64_t id, int32_t n) {
      Request request = Prompt(id);
      request.n = n;
      return request;
    };
    EXPECT_TRUE(Says(engine.Submit(samples(0, 6), wait), absl::StatusCode::kInvalidArgument,
                     "n is 6; at most 5 samples may be open (--max-num-seqs 2 + --max-queue 3)"));
    EXPECT_TRUE(engine.Submit(samples(1, 4), wait).ok());
    EXPECT_TRUE(Says(engine.Submit(samples(2, 2), wait), absl::StatusCode::kResourceExhausted,
                     "overloaded: 4 samples are open and this request has 2"));
    EXPECT_TRUE(engine.Submit(samples(3, 1), wait).ok());
    EXPECT_EQ(engine.Stats().overloaded, 1);
    gate.set_value();
    EXPECT_TRUE(engine.WaitIdle().ok());
    EXPECT_TRUE(engine.Submit(samples(4, 5), wait).ok());
    EXPECT_TRUE(engine.Drain().ok());
  });
}

TEST_F(EngineTest, ACallbackThatThrowsEndsItsRequestOnly) {
  Run({}, {}, [](Engine& engine) {
    std::atomic<int> calls = 0, tokens = 0;
    const auto thrower = [&](const TokenOutput&) {
      if (++calls == 2) throw std::runtime_error("the caller's own fault");
    };
    ASSERT_TRUE(engine.Submit(Prompt(1, 200), thrower).ok());
    ASSERT_TRUE(engine.Submit(Prompt(2, 20), [&](const TokenOutput&) { ++tokens; }).ok());
    // Nothing that is no std::exception gets through either, nor one at the last output.
    ASSERT_TRUE(engine.Submit(Prompt(3, 1), [](const TokenOutput&) { throw 5; }).ok());
    EXPECT_TRUE(engine.Drain().ok());
    EXPECT_EQ(calls, 2);
    EXPECT_EQ(tokens, 20);
    const auto timeline = engine.Timeline(1);
    ASSERT_TRUE(timeline.ok());
    EXPECT_EQ(timeline->finish, FinishReason::kError);
    EXPECT_TRUE(Says(timeline->status, absl::StatusCode::kInternal,
                     "its callback threw: the caller's own fault"));
    EXPECT_EQ(engine.Timeline(3)->finish, FinishReason::kError);
    EXPECT_TRUE(engine.Timeline(2)->status.ok());
    EXPECT_EQ(engine.Stats().callback_errors, 2);
    EXPECT_EQ(engine.Stats().pages_free, engine.Stats().pages);
  });
}

TEST_F(EngineTest, ACallbackThatBlocksDoesNotStopTheEngine) {
  Run({}, {}, [](Engine& engine) {
    std::promise<void> gate;
    const std::shared_future<void> open = gate.get_future().share();
    ASSERT_TRUE(engine.Submit(Prompt(1), [open](const TokenOutput&) { open.wait(); }).ok());
    const auto stream = engine.Submit(Prompt(2, 30));
    ASSERT_TRUE(stream.ok());
    int tokens = 0;
    while ((*stream)->Next()) ++tokens;
    EXPECT_EQ(tokens, 30);
    EXPECT_FALSE(engine.WaitIdle(std::chrono::milliseconds(1)).ok());
    gate.set_value();
    EXPECT_TRUE(engine.Drain().ok());
  });
}

TEST_F(EngineTest, CallbacksMayUseTheEngine) {
  Run({}, {}, [](Engine& engine) {
    std::atomic<int> answers = 0;
    std::function<void(const TokenOutput&)> chain = [&](const TokenOutput& output) {
      if (output.finish == FinishReason::kNone) return;
      if (++answers < 5) {
        EXPECT_TRUE(engine.Submit(Prompt(output.request_id + 1, 3), chain).ok());
      }
    };
    ASSERT_TRUE(engine.Submit(Prompt(0, 3), chain).ok());
    EXPECT_TRUE(engine.WaitIdle(std::chrono::minutes(1)).ok());
    EXPECT_EQ(answers, 5);
  });
}

// It would wait for the end of its own callback. That used to end the job of all ranks.
TEST_F(EngineTest, ACallbackThatWaitsForItselfIsRefused) {
  Run({}, {}, [](Engine& engine) {
    std::vector<absl::Status> refused;
    const auto wait = [&](const TokenOutput& output) {
      if (output.finish != FinishReason::kNone) return;
      refused = {engine.Drain(), engine.WaitIdle(), engine.WaitIdle(std::chrono::seconds(0))};
    };
    ASSERT_TRUE(engine.Submit(Prompt(1, 3), wait).ok());
    EXPECT_TRUE(engine.WaitIdle().ok());
    ASSERT_EQ(refused.size(), 3u);
    for (const absl::Status& status : refused) {
      EXPECT_TRUE(
          Says(status, absl::StatusCode::kFailedPrecondition, "a callback would wait for itself"));
    }
    EXPECT_TRUE(engine.Submit(Prompt(2, 3), Nothing).ok()) << "the engine does not drain";
    EXPECT_TRUE(engine.Drain().ok());
  });
}

TEST_F(EngineTest, CancelledRequestsEndWithWhatTheyHave) {
  Run({}, {}, [](Engine& engine) {
    const auto stream = engine.Submit(Prompt(1, 400));
    ASSERT_TRUE(stream.ok());
    std::vector<TokenOutput> outputs;
    while (auto output = (*stream)->Next()) {
      outputs.push_back(*std::move(output));
      if (outputs.size() == 3) {
        EXPECT_TRUE(engine.Cancel(1).ok());
      }
    }
    ASSERT_GE(outputs.size(), 4u);
    EXPECT_EQ(outputs.back().finish, FinishReason::kCancelled);
    EXPECT_EQ(outputs.back().sampled.token, -1);
    EXPECT_FALSE((*stream)->TryNext());
    EXPECT_EQ(engine.Cancel(1).code(), absl::StatusCode::kNotFound);
    EXPECT_TRUE(engine.Submit(Prompt(1, 2)).ok()) << "its id is free again";
    EXPECT_TRUE(engine.WaitIdle().ok());
    EXPECT_EQ(engine.Stats().pages_free, engine.Stats().pages);
  });
}

// A request is over for the engine before its last output is delivered. A Cancel in between used to
// end the next request of the same id, when both were in the engine's mail at once.
TEST_F(EngineTest, AnOldCancelDoesNotEndANewRequestOfTheSameId) {
  Run({}, {}, [](Engine& engine) {
    for (int round = 0; round < 8; ++round) {
      // Its many samples keep the engine from its mail for a while.
      Request many = Prompt(2, 1);
      many.prompt.assign(400, 1);
      many.n = 200;
      const auto cancel_late = [&](const TokenOutput&) {
        EXPECT_TRUE(engine.Submit(many, Nothing).ok());
        EXPECT_TRUE(engine.Cancel(1).ok());
      };
      ASSERT_TRUE(engine.Submit(Prompt(1, 1), cancel_late).ok());
      auto stream = engine.Submit(Prompt(1, 2));
      while (absl::IsAlreadyExists(stream.status())) stream = engine.Submit(Prompt(1, 2));
      ASSERT_TRUE(stream.ok()) << stream.status().message();
      FinishReason finish = FinishReason::kNone;
      while (const auto output = (*stream)->Next()) finish = output->finish;
      ASSERT_EQ(finish, FinishReason::kLength) << "round " << round;
      engine.Cancel(2).IgnoreError();
      EXPECT_TRUE(engine.WaitIdle().ok());
    }
  });
}

TEST_F(EngineTest, DeadlinesEndRequests) {
  WorkerOptions options;
  options.max_num_seqs = 1;
  Run({}, options, [](Engine& engine) {
    Request late = Prompt(1, 500), waiting = Prompt(2, 2);
    late.deadline_us = engine.NowMicros() + 30'000;
    waiting.deadline_us = engine.NowMicros() + 1;
    const auto first = engine.Submit(late), second = engine.Submit(waiting);
    ASSERT_TRUE(first.ok() && second.ok());
    FinishReason finish = FinishReason::kNone;
    int tokens = 0;
    while (auto output = (*first)->Next()) finish = output->finish, ++tokens;
    // A fast machine may be done before.
    EXPECT_TRUE(finish == FinishReason::kDeadline || tokens == 500);
    while (auto output = (*second)->Next()) finish = output->finish;
    EXPECT_EQ(finish, FinishReason::kDeadline);
  });
}

// In nanoseconds these are beyond the end of the clock on which the engine waits.
TEST_F(EngineTest, ADeadlineAtTheEndOfTimeEndsNothing) {
  WorkerOptions options;
  options.max_num_seqs = 1;
  Run({}, options, [](Engine& engine) {
    for (const int64_t left : {0, 1, 1'000'000}) {
      Request request = Prompt(static_cast<uint64_t>(left), 5);
      request.deadline_us = std::numeric_limits<int64_t>::max() - left;
      const auto stream = engine.Submit(request);
      ASSERT_TRUE(stream.ok());
      FinishReason finish = FinishReason::kNone;
      while (auto output = (*stream)->Next()) finish = output->finish;
      EXPECT_EQ(finish, FinishReason::kLength) << left;
    }
    Request request = Prompt(7);
    request.deadline_us = -1;
    EXPECT_TRUE(Says(engine.Submit(request).status(), absl::StatusCode::kInvalidArgument,
                     "deadline_us is -1"));
  });
}

TEST_F(EngineTest, UnfinishedRequestsAreCancelledWhenTheEngineGoes) {
  std::shared_ptr<OutputStream> stream;
  std::atomic<int> last = 0;
  Run({}, {}, [&](Engine& engine) {
    const auto submitted = engine.Submit(Prompt(1, 500));
    ASSERT_TRUE(submitted.ok());
    stream = *submitted;
    ASSERT_TRUE(engine
                    .Submit(Prompt(2, 500),
                            [&](const TokenOutput& output) {
                              if (output.finish != FinishReason::kNone) ++last;
                            })
                    .ok());
  });
  if (stream == nullptr) return;  // not the leader
  FinishReason finish = FinishReason::kNone;
  while (auto output = stream->Next()) finish = output->finish;
  EXPECT_EQ(finish, FinishReason::kCancelled);
  EXPECT_EQ(last, 1);
}

TEST_F(EngineTest, TimelinesAndCountersAddUp) {
  Run({}, {}, [](Engine& engine) {
    for (uint64_t id = 0; id < 20; ++id) ASSERT_TRUE(engine.Submit(Prompt(id, 10), Nothing).ok());
    ASSERT_TRUE(engine.Drain().ok());
    const EngineStats stats = engine.Stats();
    EXPECT_EQ(stats.requests, 20);
    EXPECT_EQ(stats.decode_tokens, 20 * 9);
    EXPECT_EQ(stats.inter_token_seconds.count(), 20 * 9);
    EXPECT_EQ(stats.first_token_seconds.count(), 20);
    EXPECT_EQ(stats.queue_seconds.count(), 20);
    EXPECT_EQ(stats.prefill_tokens + stats.cached_tokens, 20 * 3);
    EXPECT_EQ(stats.step_tokens.sum(), stats.prefill_tokens + stats.decode_tokens);
    EXPECT_GT(stats.execute_seconds, 0.0);
    EXPECT_EQ(stats.communication_seconds > 0.0, World().size() > 1);
    const auto timeline = engine.Timeline(7);
    ASSERT_TRUE(timeline.ok());
    EXPECT_EQ(timeline->finish, FinishReason::kLength);
    EXPECT_EQ(timeline->prompt_tokens, 3);
    EXPECT_EQ(timeline->output_tokens, 10);
    EXPECT_GT(timeline->prefill_us, 0);
    EXPECT_GT(timeline->decode_us, 0);
    EXPECT_LE(timeline->communication_us, timeline->prefill_us + timeline->decode_us);
    EXPECT_LE(timeline->overhead_us, timeline->prefill_us + timeline->decode_us);
    const std::string text = PrometheusText(stats);
    EXPECT_NE(text.find("\ntrireme_decode_tokens_total 180\n"), std::string::npos) << text;
    EXPECT_NE(text.find("# TYPE trireme_first_token_seconds histogram\n"), std::string::npos);
    EXPECT_NE(text.find("trireme_first_token_seconds_bucket{le=\"+Inf\"} 20\n"), std::string::npos);
    EXPECT_NE(text.find("trireme_samples_finished_total{reason=\"length\"} 20\n"),
              std::string::npos);
  });
}

TEST_F(EngineTest, ATimelineIsOfTheNewestRequestWithThatId) {
  Run({}, {}, [](Engine& engine) {
    ASSERT_TRUE(engine.Submit(Prompt(7, 10), Nothing).ok());
    ASSERT_TRUE(engine.WaitIdle().ok());
    EXPECT_EQ(engine.Timeline(7)->output_tokens, 10);
    // Held open by its callback, which is called after the engine knows of the end.
    std::promise<void> called, go_on;
    ASSERT_TRUE(engine
                    .Submit(Prompt(7, 500),
                            [&, first = true](const TokenOutput&) mutable {
                              if (!std::exchange(first, false)) return;
                              called.set_value();
                              go_on.get_future().wait();
                            })
                    .ok());
    const auto open = engine.Timeline(7);
    ASSERT_TRUE(open.ok());
    EXPECT_EQ(open->finish, FinishReason::kNone) << "the first one's";
    EXPECT_EQ(open->output_tokens, 0);
    called.get_future().wait();
    ASSERT_TRUE(engine.Cancel(7).ok());
    go_on.set_value();
    ASSERT_TRUE(engine.WaitIdle().ok());
    EXPECT_NE(engine.Timeline(7)->output_tokens, 10);
    EXPECT_NE(engine.Timeline(7)->finish, FinishReason::kNone);
  });
}

// One side of Little's law by the scheduler's count, the other by the requests' own times. A sample
// is counted from when the engine's thread has taken it to when its last step is committed.
TEST_F(EngineTest, SamplesOverTimeAreWhatTheirStaysAddUpTo) {
  WorkerOptions options;
  options.max_num_seqs = 4;
  Run({}, options, [](Engine& engine) {
    for (uint64_t id = 0; id < 20; ++id) {
      ASSERT_TRUE(engine.Submit(Prompt(id, 5 + static_cast<int64_t>(id)), Nothing).ok());
      if (id % 5 == 4) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    ASSERT_TRUE(engine.Drain().ok());
    double stays = 0.0;
    for (uint64_t id = 0; id < 20; ++id) stays += 1e-6 * (engine.Timeline(id)->total_us() + 1);
    EXPECT_LE(engine.Stats().sample_seconds, stays);
    EXPECT_GE(engine.Stats().sample_seconds, 0.5 * stays);
  });
}

// Three prompt tokens, then nine steps that attend to 4, 5, ... 12 positions.
TEST_F(EngineTest, StepsWithoutPromptTokensAreCountedByWhatTheyRead) {
  Run({}, {}, [](Engine& engine) {
    ASSERT_TRUE(engine.Submit(Prompt(1, 10), Nothing).ok());
    ASSERT_TRUE(engine.Drain().ok());
    const EngineStats stats = engine.Stats();
    EXPECT_EQ(stats.steps, 10);
    EXPECT_EQ(stats.decode_steps, 9);
    EXPECT_EQ(stats.decode_step_tokens, 9);
    EXPECT_EQ(stats.decode_kv_tokens, (4 + 12) * 9 / 2);
    EXPECT_GT(stats.decode_seconds, 0.0);
  });
}

// Static batches wait until they are full, or until nobody more can come.
TEST_F(EngineTest, StaticBatchesEndWhenTheEngineIsClosed) {
  WorkerOptions options;
  options.max_num_seqs = 4;
  Run({.policy = BatchPolicy::kStatic}, options, [](Engine& engine) {
    for (uint64_t id = 0; id < 6; ++id) ASSERT_TRUE(engine.Submit(Prompt(id, 3), Nothing).ok());
    EXPECT_FALSE(engine.WaitIdle(std::chrono::milliseconds(20)).ok());
    engine.Close();
    EXPECT_TRUE(engine.WaitIdle(std::chrono::minutes(1)).ok());
    EXPECT_TRUE(engine.Drain().ok());
  });
}

// Many threads at once; what tsan is for.
TEST_F(EngineTest, AnyThreadMaySubmitCancelAndAsk) {
  WorkerOptions options;
  options.num_pages = 24;
  options.max_model_len = 64;
  Run({.max_queue = 1000}, options, [](Engine& engine) {
    std::atomic<int> ended = 0, accepted = 0;
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (uint64_t i = 0; i < 25; ++i) {
          const uint64_t id = t * 1000 + i;
          const absl::Status status = engine.Submit(
              Prompt(id, 1 + static_cast<int64_t>(i % 12)),
              [&](const TokenOutput& output) { ended += output.finish != FinishReason::kNone; });
          accepted += status.ok();
          if (i % 4 == 0) engine.Cancel(id).IgnoreError();
          EXPECT_GE(engine.Stats().requests, 1);
          if (i % 6 == 0) engine.Timeline(id).status().IgnoreError();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(engine.Drain().ok());
    EXPECT_EQ(accepted, 100);
    EXPECT_EQ(ended, 100);
    EXPECT_EQ(engine.Stats().pages_free, 24);
  });
}

}  // namespace
}  // namespace trireme
