// Latency and bandwidth of everything that moves between ranks, after NVIDIA's nccl-tests: for each
// op and size the time of one call (the slowest rank's mean), the algorithm bandwidth (bytes /
// time) and the bus bandwidth, which corrects for the traffic an op needs at least, so that it can
// be held against the hardware whatever the number of ranks.
//   mpirun -np 4 comm_bench --ops allreduce,allgather,sendrecv,broadcast,message --max-bytes
//   1048576 --dtype bf16
//   mpirun -np 8 comm_bench --device cuda --dtype bf16 --min-bytes 8192
// Sums over ranks go the way that the runtime has found to be the fastest for their size, or with a
// name behind the op always the same one: allreduce-nccl, -one-shot, -two-shot. addnorm is the sum
// with the residual's sum and the RMSNorm behind it, of whole rows, and addnorm-unfused the same as
// two ops. What is not run is named with the reason.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"
#include "nlohmann/json.hpp"
#include "parallel/control_plane.h"
#include "parallel/mpi_communicator.h"
#include "parallel/process_groups.h"

namespace trireme {
namespace {

struct Options {
  std::vector<std::string> ops;  // none: all
  int64_t min_bytes = 4;
  int64_t max_bytes = 64 << 20;
  int64_t factor = 4;
  double seconds = 0.2;  // per line
  std::string dtype = "f32";
  int64_t hidden = 4096;  // of a row to be normed
  bool messages_only = false;
  std::string device = "cpu";
  bool allow_shared_gpu = false;
  std::string save;
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

enum class Kind : uint8_t {
  kSum,
  kSumNorm,
  kSumThenNorm,
  kGather,
  kPingPong,
  kBroadcast,
  kMessage
};
// Of a sum.
enum class Way : uint8_t { kRuntime, kNccl, kOneShot, kTwoShot };

struct Op {
  const char* name;
  Kind kind;
  Way way = Way::kRuntime;
};
constexpr Op kOps[] = {{"allreduce", Kind::kSum},
                       {"allreduce-nccl", Kind::kSum, Way::kNccl},
                       {"allreduce-one-shot", Kind::kSum, Way::kOneShot},
                       {"allreduce-two-shot", Kind::kSum, Way::kTwoShot},
                       {"addnorm", Kind::kSumNorm},
                       {"addnorm-unfused", Kind::kSumThenNorm},
                       {"addnorm-nccl", Kind::kSumThenNorm, Way::kNccl},
                       {"addnorm-one-shot", Kind::kSumNorm, Way::kOneShot},
                       {"addnorm-two-shot", Kind::kSumNorm, Way::kTwoShot},
                       {"allgather", Kind::kGather},
                       {"sendrecv", Kind::kPingPong},
                       {"broadcast", Kind::kBroadcast},
                       {"message", Kind::kMessage}};

bool OverPeers(const Op& op) { return op.way == Way::kOneShot || op.way == Way::kTwoShot; }
bool Norms(const Op& op) { return op.kind == Kind::kSumNorm || op.kind == Kind::kSumThenNorm; }
bool OfHostMemory(const Op& op) { return op.kind == Kind::kBroadcast || op.kind == Kind::kMessage; }

// One-way trips of a call, and the least traffic of a rank for each byte of the op.
struct Traffic {
  double calls = 1, bus_factor = 1;
};
Traffic TrafficOf(Kind kind, int ranks) {
  const double others = ranks - 1;
  switch (kind) {
    case Kind::kSum:
    case Kind::kSumNorm:
    case Kind::kSumThenNorm:
      return {1, 2 * others / ranks};
    case Kind::kGather:
      return {1, others / ranks};
    case Kind::kBroadcast:
      return {1, 1};
    default:
      return {2, 1};
  }
}

// What moves, and the rank's memory for it.
class Bench {
 public:
  Bench(ControlPlane& world, Device& device, const Options& options)
      : world_(world),
        device_(device),
        options_(options),
        dtype_(options.dtype == "f32"    ? DType::kF32
               : options.dtype == "bf16" ? DType::kBF16
                                         : DType::kF16),
        item_(static_cast<int64_t>(SizeOf(dtype_))) {}

  // The rank's memory, all zeros.
  absl::Status Prepare();
  // Why the op cannot be run; empty: it can, with the communicator of its way. Collective.
  std::string Open(const Op& op);
  // The same of a size.
  std::string WhyNot(const Op& op, int64_t bytes) const;
  // Mean seconds of a call on the slowest rank.
  double Measure(const Op& op, int64_t bytes);
  DType dtype() const { return dtype_; }

 private:
  absl::StatusOr<ProcessGroups> Groups(Way way);
  // `bytes` is what the op is about: the array of an all-reduce, the result of an all-gather.
  void Call(const Op& op, int64_t bytes);
  void PingPong(int64_t bytes);
  void MessagePingPong(int64_t bytes);
  TensorView View(const Tensor& tensor, int64_t bytes) const {
    return TensorView(tensor.view().data, dtype_, Shape{bytes / item_});
  }
  TensorView Rows(const Tensor& tensor, int64_t bytes) const {
    return TensorView(tensor.view().data, dtype_,
                      Shape{bytes / item_ / options_.hidden, options_.hidden});
  }

  ControlPlane& world_;
  Device& device_;
  const Options& options_;
  const DType dtype_;
  const int64_t item_;
  std::unique_ptr<Stream> stream_;
  Tensor in_, out_, residual_, weight_;
  std::map<Way, ProcessGroups> groups_;  // go before the stream does
  Communicator* comm_ = nullptr;
};

absl::Status Bench::Prepare() {
  ASSIGN_OR_RETURN(stream_, device_.NewStream());
  const int64_t elements = options_.max_bytes / item_ + 16;
  const std::vector<char> zeros(static_cast<size_t>(elements * item_));
  for (const auto& [tensor, n] : {std::pair(&in_, elements),
                                  {&out_, elements},
                                  {&residual_, elements},
                                  {&weight_, options_.hidden}}) {
    ASSIGN_OR_RETURN(*tensor, Tensor::Create(device_, dtype_, {n}));
    for (int64_t done = 0; done < n; done += elements) {
      const int64_t count = std::min(elements, n - done);
      stream_->Copy(tensor->view().as<char>() + done * item_, zeros.data(),
                    static_cast<size_t>(count * item_));
    }
  }
  return stream_->Synchronize();
}

absl::StatusOr<ProcessGroups> Bench::Groups(Way way) {
  if (device_.spec().host_memory) {
    ProcessGroups groups;
    groups.tp = NewMpiCommunicator(world_, 0, {.use_shared_memory = !options_.messages_only});
    return groups;
  }
  const PeerWay peer_way = way == Way::kOneShot   ? PeerWay::kOneShot
                           : way == Way::kTwoShot ? PeerWay::kTwoShot
                                                  : PeerWay::kMeasured;
  return CreateProcessGroups(
      world_, {.tp_size = world_.size()}, device_,
      {.collectives = way == Way::kNccl ? Collectives::kNccl : Collectives::kAuto,
       .allow_shared_gpu = options_.allow_shared_gpu,
       .peer_way = peer_way});
}

std::string Bench::Open(const Op& op) {
  const bool host = device_.spec().host_memory;
  if (OfHostMemory(op)) return world_.size() > 1 || op.kind == Kind::kBroadcast ? "" : "one rank";
  if (host && op.way == Way::kNccl) return "host memory has no NCCL";
  if (host && OverPeers(op)) return "host memory needs no way over peers";
  if (!host && op.kind == Kind::kPingPong) return "NCCL's stages send one way only";
  if (world_.size() == 1 && (!host || op.kind == Kind::kPingPong)) return "one rank";
  if (!groups_.contains(op.way)) {
    absl::StatusOr<ProcessGroups> groups = Groups(op.way);
    if (!groups.ok()) return std::string(groups.status().message());
    const absl::Status reserved = world_.Agree(groups->tp->Reserve(options_.max_bytes));
    if (!reserved.ok()) return std::string(reserved.message());
    groups->tp->ChooseSums(options_.max_bytes);
    groups_.emplace(op.way, *std::move(groups));
  }
  comm_ = groups_.at(op.way).tp.get();
  return "";
}

std::string Bench::WhyNot(const Op& op, int64_t bytes) const {
  if (Norms(op) && bytes < options_.hidden * item_) return "less than a row";
  if (!OverPeers(op)) return "";
  // A sum takes the room that its norm does, as one row.
  const TensorView flat = View(in_, bytes);
  const TensorView rows =
      Norms(op) ? Rows(in_, bytes) : TensorView(flat.data, dtype_, {1, flat.elements()});
  if (comm_->FusesNorm(rows)) return "";
  return "more than fits, or ranks that do not reach each other's memory, or not NCCL's bits";
}

void Bench::Call(const Op& op, int64_t bytes) {
  const NormParams norm{NormKind::kRms, weight_.view(), {}, 1e-5f};
  switch (op.kind) {
    case Kind::kSum:
      return comm_->AllReduceSum(*stream_, View(in_, bytes));
    case Kind::kSumNorm:
      return comm_->AllReduceAddNorm(*stream_, Rows(in_, bytes), Rows(residual_, bytes), norm,
                                     Rows(out_, bytes));
    case Kind::kSumThenNorm:
      comm_->AllReduceSum(*stream_, Rows(in_, bytes));
      return AddNorm(*stream_, Rows(residual_, bytes), Rows(in_, bytes), norm, Rows(out_, bytes));
    case Kind::kGather: {
      const int64_t part = std::max(bytes / comm_->size() / item_ * item_, item_);
      return comm_->AllGather(*stream_, View(in_, part), View(out_, part * comm_->size()));
    }
    case Kind::kPingPong:
      return PingPong(bytes);
    case Kind::kMessage:
      return MessagePingPong(bytes);
    case Kind::kBroadcast: {
      std::string text(static_cast<size_t>(world_.rank() == 0 ? bytes : 0), 'x');
      return world_.Broadcast(&text);
    }
  }
}

// There and back between ranks 0 and 1: two one-way times.
void Bench::PingPong(int64_t bytes) {
  if (comm_->rank() > 1) return;
  const int peer = 1 - comm_->rank();
  const auto send = [&] {
    comm_->WaitSend(*stream_, comm_->Send(*stream_, View(in_, bytes), peer));
  };
  if (comm_->rank() == 0) send();
  comm_->Recv(*stream_, View(out_, bytes), peer);
  if (comm_->rank() == 1) send();
}

void Bench::MessagePingPong(int64_t bytes) {
  if (world_.rank() > 1) return;
  const int peer = 1 - world_.rank();
  std::string text(static_cast<size_t>(bytes), 'x');
  if (world_.rank() == 0) world_.Send(peer, 0, std::move(text));
  text = world_.Receive(peer, 0);
  if (world_.rank() == 1) world_.Send(peer, 0, std::move(text));
}

// The number of calls is the same on all ranks: rank 0 decides. What is enqueued is waited for once
// at the end, as a step does.
double Bench::Measure(const Op& op, int64_t bytes) {
  int64_t calls = 1;
  for (double took = 0;;) {
    world_.Barrier();
    const double start = Now();
    for (int64_t i = 0; i < calls; ++i) Call(op, bytes);
    const absl::Status done = stream_->Synchronize();
    CHECK(done.ok()) << op.name << ": " << std::string(done.message());
    took = Now() - start;
    double slowest = 0;
    for (const std::string& t : world_.AllGather(std::to_string(took * 1e9))) {
      slowest = std::max(slowest, std::atof(t.c_str()) / 1e9);
    }
    if (slowest >= options_.seconds / 2) return slowest / static_cast<double>(calls);
    const double grow = options_.seconds / std::max(slowest, 1e-7);
    calls = static_cast<int64_t>(static_cast<double>(calls) * std::clamp(grow, 2.0, 20.0));
  }
}

// Of rank 0: lines for people, and the same for a file.
class Report {
 public:
  Report(const ControlPlane& world, const Device& device, DType dtype)
      : speaks_(world.rank() == 0) {
    json_ = {{"ranks", world.size()},
             {"on_this_host", world.local_size()},
             {"device", device.spec().name},
             {"dtype", Name(dtype)},
             {"lines", nlohmann::json::array()},
             {"not_run", nlohmann::json::array()}};
    if (!speaks_) return;
    std::printf("%d ranks, %d on this host, %s, %s\n%-20s %10s %10s %12s %12s\n", world.size(),
                world.local_size(), device.spec().name.c_str(), Name(dtype), "op", "bytes", "us",
                "alg GB/s", "bus GB/s");
  }
  void Line(const Op& op, int64_t bytes, double seconds, double bus_factor) {
    const double algorithm = static_cast<double>(bytes) / seconds / 1e9;
    json_["lines"].push_back({{"op", op.name},
                              {"bytes", bytes},
                              {"us", seconds * 1e6},
                              {"alg_gb_s", algorithm},
                              {"bus_gb_s", algorithm * bus_factor}});
    if (!speaks_) return;
    std::printf("%-20s %10lld %10.2f %12.3f %12.3f\n", op.name, static_cast<long long>(bytes),
                seconds * 1e6, algorithm, algorithm * bus_factor);
    std::fflush(stdout);
  }
  void NotRun(const Op& op, const std::string& sizes, const std::string& why) {
    json_["not_run"].push_back({{"op", op.name}, {"sizes", sizes}, {"why", why}});
    if (speaks_) std::printf("%-20s not run, %s: %s\n", op.name, sizes.c_str(), why.c_str());
  }
  absl::Status Save(const std::string& path) const {
    if (path.empty() || !speaks_) return absl::OkStatus();
    std::ofstream file(path);
    file << json_.dump(1) << "\n";
    if (file.close(), !file.fail()) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("cannot write ", path));
  }

 private:
  const bool speaks_;
  nlohmann::json json_;
};

void RunOp(Bench& bench, const Op& op, const ControlPlane& world, const Options& options,
           Report& report) {
  if (const std::string why = bench.Open(op); !why.empty())
    return report.NotRun(op, "all sizes", why);
  const Traffic traffic = TrafficOf(op.kind, world.size());
  bool any = false;
  std::string why;
  for (int64_t bytes = options.min_bytes; bytes <= options.max_bytes; bytes *= options.factor) {
    why = bench.WhyNot(op, bytes);
    if (!why.empty() && any) return report.NotRun(op, absl::StrCat("from ", bytes, " on"), why);
    if (!why.empty()) continue;
    any = true;
    report.Line(op, bytes, bench.Measure(op, bytes) / traffic.calls, traffic.bus_factor);
  }
  if (!any) report.NotRun(op, "all sizes", why);
}

absl::Status Run(ControlPlane& world, const Options& options) {
  const absl::StatusOr<std::unique_ptr<Device>> device =
      OpenDevice({.name = options.device,
                  .threads = 1,
                  .local_index = world.local_rank(),
                  .allow_shared = options.allow_shared_gpu});
  RETURN_IF_ERROR(world.Agree(device.status()));
  Bench bench(world, **device, options);
  RETURN_IF_ERROR(world.Agree(bench.Prepare()));
  Report report(world, **device, bench.dtype());
  for (const Op& op : kOps) {
    const bool wanted = options.ops.empty() || std::find(options.ops.begin(), options.ops.end(),
                                                         op.name) != options.ops.end();
    if (wanted) RunOp(bench, op, world, options, report);
  }
  return world.Agree(report.Save(options.save));
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  trireme::Options options;
  CLI::App app("Latency and bandwidth between ranks");
  std::vector<std::string> names;
  for (const trireme::Op& op : trireme::kOps) names.emplace_back(op.name);
  app.add_option("--ops", options.ops)->delimiter(',')->check(CLI::IsMember(names));
  app.add_option("--min-bytes", options.min_bytes)->check(CLI::PositiveNumber);
  app.add_option("--max-bytes", options.max_bytes)->check(CLI::PositiveNumber);
  app.add_option("--factor", options.factor)->check(CLI::Range(2, 1024));
  app.add_option("--seconds", options.seconds, "of each line")->check(CLI::PositiveNumber);
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--hidden", options.hidden, "width of the rows that addnorm norms")
      ->check(CLI::PositiveNumber);
  app.add_flag("--messages-only", options.messages_only, "collectives without shared memory");
  app.add_option("--device", options.device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_flag("--allow-shared-gpu", options.allow_shared_gpu, "several ranks on a GPU");
  app.add_option("--save", options.save, "the same as JSON");
  CLI11_PARSE(app, argc, argv);
  auto world = trireme::ControlPlane::Start(nullptr, nullptr);
  CHECK(world.ok()) << world.status().ToString();
  const absl::Status status = trireme::Run(**world, options);
  if (!status.ok() && (*world)->rank() == 0)
    std::fprintf(stderr, "comm_bench: %s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}
