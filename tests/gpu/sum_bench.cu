// Sums over ranks with all ranks on one GPU: RankSum, which adds parts that have come, and the sums
// over peer memory, alone and with the residual's sum and the RMSNorm behind them, each beside what
// it replaces. A line is NAME/RANKS/BYTES of bf16. What the links between GPUs add, comm_bench
// measures; here a rank's parts go through the memory and the caches of the one GPU.
//
// The time of a sum over peers is that of all its ranks. Each rank's sums are one graph, so that
// the host's launches are not what is measured.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ceilings.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/peer_sum.h"
#include "kernels/cuda/rank_sum.h"
#include "tests/gpu/one_gpu_ranks.h"

namespace trireme {
namespace {

using cuda::PeerPath;

constexpr DType kType = DType::kBF16;
constexpr int64_t kItem = 2, kHidden = 4096;
constexpr int64_t kHalfBytes = 4 << 20;  // as the NCCL communicator's
constexpr int kSumsOfGraph = 20;

double read_bytes_per_s = 0;

// Zeros on the GPU.
class Zeros {
 public:
  explicit Zeros(int64_t bytes) {
    Must(cudaMalloc(&data_, static_cast<size_t>(bytes)));
    Must(cudaMemset(data_, 0, static_cast<size_t>(bytes)));
    Must(cudaDeviceSynchronize());
  }
  ~Zeros() { cudaFree(data_); }
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  TensorView Flat(int64_t bytes) const { return {data_, kType, {bytes / kItem}}; }
  TensorView Rows(int64_t bytes) const {
    return {data_, kType, {bytes / kItem / kHidden, kHidden}};
  }

 private:
  void* data_ = nullptr;
};

// A rank's stream as the ops want it.
class RankStream final : public Stream {
 public:
  explicit RankStream(cudaStream_t handle) : Stream(nullptr, nullptr), handle_(handle) {}
  void Copy(void* dst, const void* src, size_t bytes) override {
    Must(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, handle_));
  }
  absl::Status Synchronize() override {
    Must(cudaStreamSynchronize(handle_));
    return absl::OkStatus();
  }
  cudaStream_t handle() const { return handle_; }

 private:
  const cudaStream_t handle_;
};

// What `work` enqueues on the stream, some times over, as a graph.
class Repeated {
 public:
  Repeated(cudaStream_t stream, const std::function<void()>& work) : stream_(stream) {
    cudaGraph_t graph = nullptr;
    Must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kSumsOfGraph; ++i) work();
    Must(cudaStreamEndCapture(stream, &graph));
    Must(cudaGraphInstantiate(&graph_, graph, 0));
    Must(cudaGraphDestroy(graph));
  }
  ~Repeated() { cudaGraphExecDestroy(graph_); }
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;
  void Replay() const { Must(cudaGraphLaunch(graph_, stream_)); }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

// Replays all ranks' graphs until the benchmark has enough.
void Measure(benchmark::State& state, const OneGpuRanks& ranks,
             const std::vector<std::unique_ptr<Repeated>>& graphs) {
  const auto round = [&] {
    for (const auto& graph : graphs) graph->Replay();
    CHECK(ranks.Wait()) << "ranks waited for each other in vain";
  };
  round();
  while (state.KeepRunningBatch(kSumsOfGraph)) round();
}

// Unfused, an addition a part, as if it had come alone: each reads and writes the sum once more.
void RankSumBench(benchmark::State& state, bool fused) {
  const int size = static_cast<int>(state.range(0));
  const int64_t bytes = state.range(1), elements = bytes / kItem;
  const OneGpuRanks ranks(1, 16);
  RankStream stream(ranks.stream(0));
  const Zeros parts(size * bytes), out(bytes);
  const auto part = [&](int r) {
    return TensorView(parts.Flat(bytes).as<char>() + r * bytes, kType, {1, elements});
  };
  const TensorView sum(out.Flat(bytes).data, kType, {1, elements});
  const auto add = [&] {
    if (fused) {
      return cuda::RankSum(stream.handle(), kType, part(0).data, elements, size, elements,
                           sum.data);
    }
    stream.Copy(sum.data, part(0).data, static_cast<size_t>(bytes));
    for (int r = 1; r < size; ++r) cuda::Add(stream, sum, part(r));
  };
  add();
  CHECK(ranks.Wait());
  std::vector<std::unique_ptr<Repeated>> graph;
  graph.push_back(std::make_unique<Repeated>(stream.handle(), add));
  Measure(state, ranks, graph);
  // What the fused one moves: each part once, and the sum.
  const double moved = static_cast<double>((size + 1) * bytes * state.iterations());
  state.counters["GB/s"] = benchmark::Counter(moved / 1e9, benchmark::Counter::kIsRate);
  state.counters["%read"] =
      benchmark::Counter(100 * moved / read_bytes_per_s, benchmark::Counter::kIsRate);
}

enum class Behind : uint8_t { kNothing, kFusedNorm, kNorm };

// A rank's part, residual and result, and what is done with them.
struct RankWork {
  explicit RankWork(int64_t bytes)
      : data(bytes), residual(bytes), out(bytes), weight(kHidden * kItem), bytes(bytes) {}
  void Enqueue(cudaStream_t handle, const cuda::PeerGroup& group, PeerPath path,
               Behind behind) const {
    const NormParams norm{NormKind::kRms, weight.Flat(kHidden * kItem), {}, 1e-5f};
    if (behind == Behind::kFusedNorm) {
      return cuda::PeerSumAddNorm(handle, group, path, data.Rows(bytes), residual.Rows(bytes), norm,
                                  out.Rows(bytes));
    }
    cuda::PeerSum(handle, group, path, data.Flat(bytes));
    if (behind == Behind::kNothing) return;
    RankStream stream(handle);
    cuda::AddNorm(stream, residual.Rows(bytes), data.Rows(bytes), norm, out.Rows(bytes));
  }
  const Zeros data, residual, out, weight;
  const int64_t bytes;
};

void PeerSumBench(benchmark::State& state, PeerPath path, Behind behind) {
  const int size = static_cast<int>(state.range(0));
  const int64_t bytes = state.range(1);
  // A group of one waits for nobody. Its kernels are the same ones: they are loaded behind it, for
  // CUDA may wait for the whole GPU to load one.
  const OneGpuRanks alone(1, kHalfBytes);
  RankWork(bytes).Enqueue(alone.stream(0), alone.Of(0), path, behind);
  CHECK(alone.Wait());
  const OneGpuRanks ranks(size, kHalfBytes);
  std::vector<std::unique_ptr<RankWork>> works;
  std::vector<std::unique_ptr<Repeated>> graphs;
  for (int r = 0; r < size; ++r) {
    const RankWork& work = *works.emplace_back(std::make_unique<RankWork>(bytes));
    const cuda::PeerGroup group = ranks.Of(r);
    graphs.push_back(std::make_unique<Repeated>(
        ranks.stream(r), [&] { work.Enqueue(ranks.stream(r), group, path, behind); }));
  }
  Measure(state, ranks, graphs);
  // As nccl-tests has it: of a rank, what an all-reduce must move at least.
  const double moved = 2.0 * (size - 1) / size * static_cast<double>(bytes * state.iterations());
  state.counters["bus GB/s"] = benchmark::Counter(moved / 1e9, benchmark::Counter::kIsRate);
}

void Register() {
  for (const bool fused : {true, false}) {
    benchmark::internal::Benchmark* const line =
        benchmark::RegisterBenchmark(fused ? "rank_sum" : "rank_sum_unfused", RankSumBench, fused);
    // Of one token, of 64, and of a prompt's piece.
    for (const int64_t size : {2, 4, 8}) {
      for (const int64_t bytes : {8 << 10, 512 << 10, 32 << 20}) line->Args({size, bytes});
    }
    line->UseRealTime();
  }
  for (const auto& [way, path] : {std::pair(std::string("one_shot"), PeerPath::kOneShot),
                                  {std::string("two_shot"), PeerPath::kTwoShot}}) {
    for (const auto& [what, behind] :
         {std::pair(std::string("peer_sum_"), Behind::kNothing),
          {std::string("peer_sum_add_norm_"), Behind::kFusedNorm},
          {std::string("peer_sum_add_norm_unfused_"), Behind::kNorm}}) {
      benchmark::internal::Benchmark* const line =
          benchmark::RegisterBenchmark((what + way).c_str(), PeerSumBench, path, behind);
      for (const int64_t size : {2, 4}) {
        for (const int64_t bytes : {8 << 10, 64 << 10, 512 << 10, 1 << 20})
          line->Args({size, bytes});
      }
      line->UseRealTime();
    }
  }
}

int Main(int argc, char** argv) {
  const auto device = OpenDevice({.name = "cuda"});
  if (!device.ok()) {
    std::fprintf(stderr, "gpu_sum_bench: %s\n", std::string(device.status().message()).c_str());
    return 1;
  }
  const auto stream = (*device)->NewStream();
  CHECK(stream.ok()) << std::string(stream.status().message());
  const auto ceilings = MeasureCeilings(**stream);
  if (!ceilings.ok()) {
    std::fprintf(stderr, "gpu_sum_bench: %s\n", std::string(ceilings.status().message()).c_str());
    return 1;
  }
  read_bytes_per_s = ceilings->read_bytes_per_s;
  std::printf("%s: read %.1f GB/s\n", (*device)->spec().name.c_str(), read_bytes_per_s / 1e9);
  Register();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace

namespace cuda {
gpu::StreamHandle NativeHandle(Stream& stream) { return static_cast<RankStream&>(stream).handle(); }
}  // namespace cuda

}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
