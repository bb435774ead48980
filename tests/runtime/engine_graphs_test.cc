// Graphs under an engine, in the emulator and in every layout: the tokens of a request are those it
// has without them, what ran how is counted, memory is accounted for, and captures that fail cost
// nothing but time. tests/runtime/graph_replay_test.cc compares bits.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/cublas_lt_double.h"
#include "tests/host_cuda/device.h"
#endif

namespace {
int g_capture_phases = 0;
int g_failing_rank = -1;  // in its capture
}  // namespace

extern "C" bool trireme_fault_point(int rank, const char* phase, int64_t, const char* op) {
  if (op != nullptr || std::string(phase) != "capture") return false;
  ++g_capture_phases;
  return rank == g_failing_rank;
}

namespace trireme {
namespace {

#if !defined(TRIREME_HOST_CUDA)
TEST(EngineGraphsTest, NeedsTheEmulator) {
  GTEST_SKIP() << "SKIPPED: graphs in the emulator: no cuda_bf16.h";
}
#else

constexpr char kModel[] = "tiny-llama3";  // 2 layers
constexpr int64_t kSequences = 3;         // at once: buckets 1, 2, 3

WorkerOptions OptionsOf(bool graphs) {
  WorkerOptions options;
  options.max_model_len = 32;
  options.max_num_seqs = kSequences;
  options.max_num_batched_tokens = 8;
  options.page_size = 4;
  options.graphs = graphs;
  options.open_device = [](const DeviceOptions&) { return NewHostCudaDevice(); };
  return options;
}

// More than run at once, of all lengths, so that batches grow and shrink.
std::vector<Request> Requests() {
  std::vector<Request> requests(6);
  for (size_t i = 0; i < requests.size(); ++i) {
    Request& request = requests[i];
    request.id = i;
    for (size_t t = 0; t < 2 + 3 * i % 7; ++t)
      request.prompt.push_back(static_cast<TokenId>(3 + (37 * i + 13 * t) % 500));
    request.max_tokens = static_cast<int64_t>(4 + 5 * i % 8);
    request.sampling.seed = i;
    if (i % 2 == 1) request.sampling.temperature = 0.8f;
    // All that a graph samples, and what it has no room for (top-k 100), in each other's company.
    if (i == 1) request.sampling.min_p = 0.02f;
    if (i == 2) request.sampling.temperature = 0.9f, request.sampling.top_k = 100;
    if (i == 3) request.sampling.repetition_penalty = 1.3f, request.sampling.top_k = 9;
    if (i == 4) request.sampling.logprobs = 1;
    if (i == 5) request.sampling.top_p = 0.9f;
  }
  return requests;
}

Transcript RunRequests(Worker& worker, EngineStats* stats) {
  Transcript out;
  const std::unique_ptr<Engine> engine = Engine::Create(worker, nullptr).value();
  for (const Request& request : Requests()) {
    const auto take = [&out](const TokenOutput& output) {
      out[{output.request_id, 0}].push_back(output.sampled.token);
    };
    EXPECT_TRUE(engine->Submit(request, take).ok());
  }
  EXPECT_TRUE(engine->Drain().ok());
  *stats = engine->Stats();
  return out;
}

int64_t EagerRuns(const GraphStats& stats) {
  int64_t sum = 0;
  for (const int64_t runs : stats.eager) sum += runs;
  return sum;
}

bool Fits(const Topology& topology) {
  if (topology.pp_size <= LoadModelConfig(GoldenModel(kModel)).value().num_layers) return true;
  std::printf("skipped: %s has too few layers for %s\n", kModel, NameOf(topology).c_str());
  return false;
}

class EngineGraphsTest : public ::testing::Test {
 protected:
  // For the flight records: phases, and communicators that are given back. One rank alone has none.
  static void SetUpTestSuite() {
    const absl::Status watched = World().Watch({.timeout_s = 120.0, .record_dir = ""});
    ASSERT_TRUE(watched.ok()) << watched.message();
  }
  ~EngineGraphsTest() override { HostCudaTestHooks() = {}; }
};

// The other stages have captured theirs by then, and learn of it all the same.
TEST_F(EngineGraphsTest, AnErrorOfOneRankInCaptureIsEverybodys) {
  const Topology topology{.pp_size = World().size()};
  if (World().size() == 1 || !Fits(topology))
    GTEST_SKIP() << "SKIPPED: one rank fails in capture: wants two ranks";
  // The others capture for longer than an error may be known to one rank alone.
  if (kThreadSanitizer)
    GTEST_SKIP() << "SKIPPED: one rank fails in capture: too slow under the thread sanitizer";
  for (int rank = 0; rank < World().size(); ++rank) {
    SCOPED_TRACE(rank);
    g_failing_rank = rank;
    g_capture_phases = 0;
    WorkerOptions options = OptionsOf(/*graphs=*/true);
    options.dtype = DType::kF32;
    const auto worker = Worker::Load(World(), topology, GoldenModel(kModel), options);
    g_failing_rank = -1;
    EXPECT_EQ(g_capture_phases, 1);
    ASSERT_FALSE(worker.ok());
    const std::string message(worker.status().message());
    EXPECT_NE(message.find("an error that a test asked for"), std::string::npos) << message;
    // Rank 0 speaks, and names whom it speaks for.
    const bool named = message.find("rank " + std::to_string(rank) + " (") == 0 &&
                       message.find(") in capture: ") != std::string::npos;
    EXPECT_EQ(named, rank > 0) << message;
  }
}

// Each is tried against the eager step, bit by bit, when it is captured.
TEST_F(EngineGraphsTest, StepsWithMatmulsByCublasLtAreCapturedToo) {
  const Topology topology{.pp_size = World().size()};
  if (!Fits(topology)) return;
  WorkerOptions options = OptionsOf(/*graphs=*/true);
  options.dtype = DType::kBF16;
  options.max_num_seqs = options.max_num_batched_tokens = 18;  // two more than the own kernels'
  options.open_device = [](const DeviceOptions&) { return NewHostCudaDeviceWithCublasLt(); };
  const int matmuls = TheCublasLtDouble().matmuls;
  const auto worker = Worker::Load(World(), topology, GoldenModel(kModel), options);
  ASSERT_TRUE(worker.ok()) << worker.status().message();
  const GraphStats& stats = (*worker)->graph_stats();
  EXPECT_GT(stats.graphs, 0);
  for (const int64_t refused : stats.refused) EXPECT_EQ(refused, 0);
  EXPECT_GT(TheCublasLtDouble().matmuls, matmuls);
  const Ledger held = (*worker)->measured_ledger();
  EXPECT_GT(held[Owner::kWorkspace], 0);
  EXPECT_EQ(held[Owner::kUnaccounted], 0);
  World().Barrier();
}

TEST_F(EngineGraphsTest, TokensAreThoseWithoutGraphsInEveryLayout) {
  Transcript first;
  bool compared = false;
  for (const Topology& topology : LayoutsOf(World().size())) {
    if (!Fits(topology)) continue;
    for (const bool graphs : {false, true}) {
      // What they are compared with is there; on ranks without answers too.
      if (!graphs && std::exchange(compared, true)) continue;
      SCOPED_TRACE(NameOf(topology) + (graphs ? " graphs" : ""));
      g_capture_phases = 0;
      WithWorker(kModel, topology, OptionsOf(graphs), [&](Worker& worker) {
        EngineStats stats;
        const Transcript got = RunRequests(worker, &stats);
        if (first.empty()) first = got;
        EXPECT_EQ(got, first);
        const GraphStats& counted = stats.graphs;
        const bool captures = graphs && topology.tp_size == 1;
        // A stage that sends has two buffers, and a graph of each.
        const int64_t turns = topology.pp_size > 1 ? 2 : 1;
        EXPECT_EQ(counted.graphs, captures ? kSequences * turns : 0);
        EXPECT_EQ(counted.replays > 0, captures);
        const int64_t prompts = counted.eager_runs(EagerReason::kPrompt);
        EXPECT_GT(prompts, 0);
        // MPI moves host memory while the host waits; NCCL's sums would be captured.
        const EagerReason reason = graphs ? EagerReason::kCommunicator : EagerReason::kOff;
        EXPECT_EQ(EagerRuns(counted) - prompts, captures ? 0 : counted.eager_runs(reason));
        EXPECT_EQ(counted.eager_runs(reason) > 0, !captures);
        EXPECT_EQ(g_capture_phases, captures && World().size() > 1 ? 1 : 0);
        // All memory has an owner.
        const Ledger held = worker.measured_ledger();
        EXPECT_EQ(held[Owner::kGraphs], counted.bytes);
        EXPECT_EQ(held[Owner::kGraphs] > 0, captures);
        EXPECT_EQ(held[Owner::kUnaccounted], 0);
        const absl::Status planned = CompareLedgers(worker.planned_ledger(), held);
        EXPECT_TRUE(planned.ok()) << planned.message();
        const std::string text = PrometheusText(stats);
        for (const std::string& line :
             {"trireme_graphs " + std::to_string(counted.graphs) + "\n",
              "trireme_graph_bytes " + std::to_string(counted.bytes) + "\n",
              "trireme_graph_steps_total " + std::to_string(counted.replays) + "\n",
              "trireme_eager_steps_total{reason=\"prompt\"} " + std::to_string(prompts) + "\n",
              std::string("trireme_graphs_refused_total{reason=\"not_equal\"} 0\n")})
          EXPECT_NE(text.find(line), std::string::npos) << line << text;
      });
    }
  }
}

TEST_F(EngineGraphsTest, ACaptureThatFailsLeavesItsSizeEager) {
  const Topology topology{1, 1, World().size()};
  int captures = 0;
  HostCudaTestHooks().captured = [&captures]() -> absl::Status {
    // The first asks whether the stream captures; then come 3, 2 and 1 sequences.
    return ++captures == 3 ? absl::ResourceExhaustedError("out of memory") : absl::OkStatus();
  };
  std::vector<std::string> warnings;
  WorkerOptions options = OptionsOf(true);
  options.warn = [&warnings](const std::string& line) { warnings.push_back(line); };
  WithWorker(kModel, topology, options, [&](Worker& worker) {
    EngineStats stats;
    const Transcript got = RunRequests(worker, &stats);
    EXPECT_EQ(got.size(), Requests().size());
    EXPECT_EQ(stats.graphs.graphs, 2);
    EXPECT_EQ(stats.graphs.refusals(EagerReason::kCaptureFailed), 1);
    EXPECT_GT(stats.graphs.replays, 0);
    EXPECT_GT(stats.graphs.eager_runs(EagerReason::kCaptureFailed), 0);
  });
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].find(
                "decode of 2 runs without a graph: it could not be captured (out of memory); more "
                "are counted, not told; lower --kv-cache-memory or --memory-limit to leave memory "
                "for graphs, or give --no-graphs\nrank 0 ("),
            0u)
      << warnings[0];
  for (const char* part : {") holds at the most:\n  weights ", "\n  graphs ", "\n  total "})
    EXPECT_NE(warnings[0].find(part), std::string::npos) << part << warnings[0];
}

// Rank 0 is who speaks.
TEST_F(EngineGraphsTest, AStageThatLacksMemoryForAllItsGraphsIsToldOfOnce) {
  const Topology topology{.pp_size = World().size()};
  if (!Fits(topology)) return;
  const int last = World().size() - 1;
  int captures = 0;
  HostCudaTestHooks().captured = [&captures, last]() -> absl::Status {
    if (World().rank() != last || ++captures == 1) return absl::OkStatus();
    return absl::ResourceExhaustedError("out of memory");
  };
  std::vector<std::string> warnings;
  WorkerOptions options = OptionsOf(true);
  options.dtype = DType::kF32;
  options.warn = [&warnings](const std::string& line) { warnings.push_back(line); };
  const auto worker = Worker::Load(World(), topology, GoldenModel(kModel), options);
  ASSERT_TRUE(worker.ok()) << worker.status().message();
  const bool here = World().rank() == last;
  EXPECT_EQ((*worker)->graph_stats().graphs == 0, here);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].find("\nrank " + std::to_string(last) + " ("), std::string::npos)
      << warnings[0];
  World().Barrier();
}

// On one rank; all of them hear of it.
TEST_F(EngineGraphsTest, MemoryThatCapturingTakesAndNobodyOwnsIsRefused) {
  Device* device = nullptr;
  std::vector<Buffer> taken;
  WorkerOptions options = OptionsOf(true);
  options.dtype = DType::kF32;
  options.open_device = [&device](const DeviceOptions&) {
    std::unique_ptr<Device> opened = NewHostCudaDevice();
    device = opened.get();
    return opened;
  };
  HostCudaTestHooks().captured = [&] {
    if (World().rank() + 1 == World().size()) taken.push_back(*device->Allocate(8 << 20));
    return absl::OkStatus();
  };
  const Topology topology{1, 1, World().size()};
  const absl::Status refused =
      Worker::Load(World(), topology, GoldenModel(kModel), options).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(refused.message().find("memory held is not memory planned (unaccounted)"),
            std::string::npos)
      << refused.message();
}

// NCCL does not give a communicator back while a graph holds calls of it.
TEST_F(EngineGraphsTest, GraphsGoBeforeTheCommunicators) {
  const auto freed = []() -> int64_t {
    if (World().recorder() == nullptr) return 0;
    const std::vector<FlightRecord> records = World().recorder()->Records();
    return std::count_if(records.begin(), records.end(),
                         [](const FlightRecord& record) { return record.op == CommOp::kFree; });
  };
  const Topology topology{1, std::min(2, World().size()), std::max(1, World().size() / 2)};
  int64_t before = -1, gone = 0, gone_late = 0;
  HostCudaTestHooks().graph_gone = [&] {
    ++gone;
    if (freed() != before) ++gone_late;
  };
  {
    WorkerOptions options = OptionsOf(true);
    options.dtype = DType::kF32;
    auto worker = Worker::Load(World(), topology, GoldenModel(kModel), options);
    ASSERT_TRUE(worker.ok()) << worker.status().message();
    EXPECT_GT((*worker)->graph_stats().graphs, 0);
    gone = gone_late = 0;  // the one that asked whether the stream captures
    before = freed();
  }
  EXPECT_GE(gone, kSequences);
  EXPECT_EQ(gone_late, 0);
  EXPECT_EQ(freed() > before, World().size() > 1) << "no communicator to outlive them";
}

#endif

}  // namespace
}  // namespace trireme
