// Latency and bandwidth of everything that moves between ranks, after NVIDIA's nccl-tests: for each
// op and size the time of one call (the slowest rank's mean), the algorithm bandwidth (bytes /
// time) and the bus bandwidth, which corrects for the traffic an op needs at least, so that it can
// be held against the hardware whatever the number of ranks.
//   mpirun -np 4 comm_bench --ops allreduce,allgather,sendrecv,broadcast,message --max-bytes
//   1048576 --dtype bf16
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "kernels/check.h"
#include "parallel/control_plane.h"
#include "parallel/mpi_communicator.h"
#include "tests/parallel/host_device.h"

namespace trireme {
namespace {

struct Options {
  std::vector<std::string> ops = {"allreduce", "allgather", "sendrecv", "broadcast", "message"};
  int64_t min_bytes = 4;
  int64_t max_bytes = 64 << 20;
  int64_t factor = 4;
  double seconds = 0.2;  // per line
  std::string dtype = "f32";
  bool messages_only = false;
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a communicator moves, in one buffer of max_bytes.
struct Bench {
  ControlPlane& world;
  Communicator& comm;
  Host host;
  DType dtype;
  std::vector<char> in, out;

  TensorView View(std::vector<char>& buffer, int64_t bytes) {
    return TensorView(buffer.data(), dtype, Shape{bytes / static_cast<int64_t>(SizeOf(dtype))});
  }
  // One call of `op`; `bytes` is what the op is about: the array of an all-reduce, the result of an
  // all-gather.
  void Call(const std::string& op, int64_t bytes);
  void PingPong(int64_t bytes);
  void MessagePingPong(int64_t bytes);
};

void Bench::Call(const std::string& op, int64_t bytes) {
  if (op == "allreduce") return comm.AllReduceSum(host.stream, View(in, bytes));
  if (op == "allgather") {
    const int64_t item = static_cast<int64_t>(SizeOf(dtype));
    const int64_t part = std::max(bytes / comm.size() / item * item, item);
    return comm.AllGather(host.stream, View(in, part), View(out, part * comm.size()));
  }
  if (op == "sendrecv") return PingPong(bytes);
  if (op == "message") return MessagePingPong(bytes);
  CHECK(op == "broadcast") << "--ops " << op;
  std::string text(static_cast<size_t>(world.rank() == 0 ? bytes : 0), 'x');
  world.Broadcast(&text);
}

// There and back between ranks 0 and 1: two one-way times.
void Bench::PingPong(int64_t bytes) {
  if (comm.rank() > 1) return;
  const int peer = 1 - comm.rank();
  if (comm.rank() == 0) comm.WaitSend(host.stream, comm.Send(host.stream, View(in, bytes), peer));
  comm.Recv(host.stream, View(out, bytes), peer);
  if (comm.rank() == 1) comm.WaitSend(host.stream, comm.Send(host.stream, View(in, bytes), peer));
}

void Bench::MessagePingPong(int64_t bytes) {
  if (world.rank() > 1) return;
  const int peer = 1 - world.rank();
  std::string text(static_cast<size_t>(bytes), 'x');
  if (world.rank() == 0) world.Send(peer, 0, std::move(text));
  text = world.Receive(peer, 0);
  if (world.rank() == 1) world.Send(peer, 0, std::move(text));
}

struct OpKind {
  double calls = 1;       // one-way trips per call
  double bus_factor = 1;  // minimum traffic of a rank per byte of the op
};
OpKind KindOf(const std::string& op, int ranks) {
  const double others = ranks - 1;
  if (op == "allreduce") return {1, 2 * others / ranks};
  if (op == "allgather") return {1, others / ranks};
  if (op == "broadcast") return {1, 1};
  return {2, 1};
}

// Mean seconds per call on the slowest rank. The number of calls is the same on all ranks: rank 0
// decides.
double Measure(Bench& bench, const std::string& op, int64_t bytes, double seconds) {
  int64_t calls = 1;
  for (double took = 0;;) {
    bench.world.Barrier();
    const double start = Now();
    for (int64_t i = 0; i < calls; ++i) bench.Call(op, bytes);
    took = Now() - start;
    double slowest = 0;
    for (const std::string& t : bench.world.AllGather(std::to_string(took * 1e9))) {
      slowest = std::max(slowest, std::atof(t.c_str()) / 1e9);
    }
    if (slowest >= seconds / 2) return slowest / static_cast<double>(calls);
    const double grow = seconds / std::max(slowest, 1e-7);
    calls = static_cast<int64_t>(static_cast<double>(calls) * std::clamp(grow, 2.0, 20.0));
  }
}

void Run(ControlPlane& world, const Options& options) {
  const auto comm = NewMpiCommunicator(world, 0, {.use_shared_memory = !options.messages_only});
  const DType dtype = options.dtype == "f32"    ? DType::kF32
                      : options.dtype == "bf16" ? DType::kBF16
                                                : DType::kF16;
  const size_t capacity = static_cast<size_t>(options.max_bytes) + 64;
  Bench bench{world, *comm, {}, dtype, std::vector<char>(capacity), std::vector<char>(capacity)};
  if (world.rank() == 0) {
    std::printf("%d ranks, %d on this host, %s\n%-10s %10s %10s %12s %12s\n", world.size(),
                world.local_size(), Name(dtype), "op", "bytes", "us", "alg GB/s", "bus GB/s");
  }
  for (const std::string& op : options.ops) {
    if (world.size() == 1 && (op == "sendrecv" || op == "message")) continue;
    for (int64_t bytes = options.min_bytes; bytes <= options.max_bytes; bytes *= options.factor) {
      const OpKind kind = KindOf(op, world.size());
      const double time = Measure(bench, op, bytes, options.seconds) / kind.calls;
      const double algorithm = static_cast<double>(bytes) / time / 1e9;
      if (world.rank() != 0) continue;
      std::printf("%-10s %10lld %10.2f %12.3f %12.3f\n", op.c_str(), static_cast<long long>(bytes),
                  time * 1e6, algorithm, algorithm * kind.bus_factor);
      std::fflush(stdout);
    }
  }
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  trireme::Options options;
  CLI::App app("Latency and bandwidth between ranks");
  app.add_option("--ops", options.ops)->delimiter(',');
  app.add_option("--min-bytes", options.min_bytes)->check(CLI::PositiveNumber);
  app.add_option("--max-bytes", options.max_bytes)->check(CLI::PositiveNumber);
  app.add_option("--factor", options.factor)->check(CLI::Range(2, 1024));
  app.add_option("--seconds", options.seconds)->check(CLI::PositiveNumber);
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_flag("--messages-only", options.messages_only, "collectives without shared memory");
  CLI11_PARSE(app, argc, argv);
  auto world = trireme::ControlPlane::Start(nullptr, nullptr);
  CHECK(world.ok()) << world.status().ToString();
  trireme::Run(**world, options);
  return 0;
}
