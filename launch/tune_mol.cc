#include "launch/tune_mol.h"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "launch/command_flags.h"
#include "launch/mol_hardware.h"
#include "launch/planted_job.h"
#include "launch/session.h"

namespace trireme {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kComponents[] = {1, 2, 4, 8, 16};
constexpr int64_t kDims[] = {16, 32, 64, 128, 256};
constexpr MolStorage kStorages[] = {MolStorage::kF32, MolStorage::kBF16, MolStorage::kInt8};
constexpr double kAssumedEfficiency = 0.5;   // where neither measured nor in the profile
constexpr int64_t kMeasuredPairs = 400'000;  // of one measured search: a fraction of a second
constexpr int64_t kRowBytes = 24;            // id, place in the order, index from id to slot

const char* Name(MolStorage storage) {
  return storage == MolStorage::kF32 ? "f32" : storage == MolStorage::kBF16 ? "bf16" : "int8";
}

// A head, how its items are held, and what the model says of it.
struct Candidate {
  MolShape shape;
  MolStorage storage = MolStorage::kF32;
  double seconds = 0;       // of one exact search on the slowest shard
  double memory_bytes = 0;  // of one shard's table

  std::string Shape() const {
    return absl::StrCat(shape.query_components, "x", shape.item_components, "x",
                        shape.component_dim);
  }
  // More of everything that a head can be better by: components, size, precision.
  bool AtLeast(const Candidate& other) const {
    return shape.query_components >= other.shape.query_components &&
           shape.item_components >= other.shape.item_components &&
           shape.component_dim >= other.shape.component_dim && storage <= other.storage;
  }
};

class Tuner {
 public:
  Tuner(ControlPlane& control, const TuneMolFlags& flags) : control_(control), flags_(flags) {}

  absl::Status Run() {
    ASSIGN_OR_RETURN(hardware_, FindMolHardware(flags_.hardware));
    if (flags_.hardware == "this") {
      // The paper's shape stands for all: the share of the floor varies little with it.
      Candidate reference{.shape = ShapeOf(8, 4, 64)};
      ASSIGN_OR_RETURN(const double seconds, Measure(reference));
      hardware_.efficiency = FloorOf(reference, MeasuredItems()) / seconds;
      efficiency_source_ = "measured at 8x4x64 f32";
    } else if (hardware_.efficiency > 0) {
      efficiency_source_ = "from the profile";
    } else {
      hardware_.efficiency = kAssumedEfficiency;
      efficiency_source_ = "assumed; \"efficiency\" in the profile sets it";
    }
    Search();
    if (best_.empty()) return NothingFits();
    if (flags_.hardware == "this") RETURN_IF_ERROR(Check());
    return WriteOut(control_, flags_.json ? JsonText() : Text());
  }

 private:
  MolShape ShapeOf(int64_t query_components, int64_t item_components, int64_t dim) const {
    MolShape shape;
    shape.query_components = query_components;
    shape.item_components = item_components;
    shape.component_dim = dim;
    shape.cross_hidden = flags_.cross_hidden;
    return shape;
  }
  OpCost CostOf(const Candidate& candidate, int64_t items) const {
    return MolScoreCost(candidate.shape, candidate.storage, items, items * flags_.batch);
  }
  double FloorOf(const Candidate& candidate, int64_t items) const {
    const double pairs = static_cast<double>(items) * static_cast<double>(flags_.batch);
    return hardware_.Floor(CostOf(candidate, items), MolSpecialFunctions(candidate.shape, pairs));
  }
  double Predict(const Candidate& candidate, int64_t items) const {
    return FloorOf(candidate, items) / hardware_.efficiency;
  }
  int64_t ShardItems() const { return (flags_.items + flags_.shards - 1) / flags_.shards; }
  int64_t MeasuredItems() const {
    return std::max<int64_t>(1024, std::min(flags_.items, kMeasuredPairs / flags_.batch));
  }

  // All heads within the limits, then those of them that no other one is at least as good as.
  void Search() {
    std::vector<Candidate> fitting;
    for (const int64_t query : kComponents) {
      for (const int64_t item : kComponents) {
        for (const int64_t dim : kDims) {
          for (const MolStorage storage : kStorages) {
            Candidate candidate{.shape = ShapeOf(query, item, dim), .storage = storage};
            candidate.seconds = Predict(candidate, ShardItems());
            candidate.memory_bytes =
                static_cast<double>(MolSlotBytes(candidate.shape, storage, flags_.means) +
                                    kRowBytes) *
                static_cast<double>(ShardItems());
            fastest_ = std::min(fastest_, candidate.seconds);
            smallest_ = std::min(smallest_, candidate.memory_bytes);
            if (candidate.seconds <= flags_.latency_ms * 1e-3 &&
                candidate.memory_bytes <= flags_.memory_gb * 1e9)
              fitting.push_back(candidate);
          }
        }
      }
    }
    // Of equals the one with fewer bytes, then less time: it comes first and keeps the others out.
    std::stable_sort(fitting.begin(), fitting.end(), [](const Candidate& a, const Candidate& b) {
      const int64_t size_a = a.shape.logits() * a.shape.component_dim;
      const int64_t size_b = b.shape.logits() * b.shape.component_dim;
      if (size_a != size_b) return size_a > size_b;
      if (a.shape.logits() != b.shape.logits()) return a.shape.logits() > b.shape.logits();
      if (a.storage != b.storage) return a.storage < b.storage;
      return a.memory_bytes < b.memory_bytes;
    });
    for (const Candidate& candidate : fitting) {
      const bool beaten = std::any_of(best_.begin(), best_.end(), [&](const Candidate& better) {
        return better.AtLeast(candidate);
      });
      if (!beaten) best_.push_back(candidate);
    }
  }

  // The fastest of three exact searches of `candidate` on planted items, all cores.
  absl::StatusOr<double> Measure(const Candidate& candidate) {
    PlantedJobOptions options;
    options.data.query_components = candidate.shape.query_components;
    options.data.item_components = candidate.shape.item_components;
    options.data.component_dim = candidate.shape.component_dim;
    options.storage = Name(candidate.storage);
    options.scratch = flags_.scratch;
    ASSIGN_OR_RETURN(const std::unique_ptr<PlantedJob> job, PlantedJob::Start(control_, options));
    double build_seconds = 0;
    ASSIGN_OR_RETURN(const std::unique_ptr<RetrievalTable> table,
                     job->Table(MeasuredItems(), &build_seconds));
    const std::vector<RetrievalQuery> queries = job->Queries(flags_.batch);
    RetrievalOptions search;
    search.k = 100;
    search.mode = RetrievalMode::kExact;
    double fastest = 1e30;
    for (int i = 0; i < 4; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      ASSIGN_OR_RETURN(const std::vector<RetrievalAnswer> answers,
                       SearchTable(*table, queries, search, {}));
      RETURN_IF_ERROR(FirstFailure(answers));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      if (i > 0) fastest = std::min(fastest, seconds.count());
    }
    return fastest;
  }

  // The model against the machine, at the first of the heads that are proposed.
  absl::Status Check() {
    ASSIGN_OR_RETURN(measured_seconds_, Measure(best_.front()));
    predicted_seconds_ = Predict(best_.front(), MeasuredItems());
    return absl::OkStatus();
  }

  absl::Status NothingFits() const {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "no head fits: the fastest takes %.3g ms (--latency-ms %g), the smallest %.3g GB "
        "(--memory-gb %g) for %d items a shard; raise the limits, or --shards",
        fastest_ * 1e3, flags_.latency_ms, smallest_ * 1e-9, flags_.memory_gb, ShardItems()));
  }

  std::string Text() const {
    std::string out = absl::StrFormat(
        "%s: %.3g FLOP/s, %.3g byte/s; %.0f %% of the roofline, %s\n"
        "%d items over %d shard%s, batch %d, exact search (pruned: the same answer, sooner)\n\n"
        "%-12s %7s %8s %12s %12s %11s\n",
        hardware_.name, hardware_.flops, hardware_.read_bytes, hardware_.efficiency * 100,
        efficiency_source_, flags_.items, flags_.shards, flags_.shards == 1 ? "" : "s",
        flags_.batch, "head", "logits", "storage", "latency ms", "memory GB", "queries/s");
    for (const Candidate& candidate : best_) {
      absl::StrAppendFormat(&out, "%-12s %7d %8s %12.3f %12.3f %11.1f\n", candidate.Shape(),
                            candidate.shape.logits(), Name(candidate.storage),
                            candidate.seconds * 1e3, candidate.memory_bytes * 1e-9,
                            static_cast<double>(flags_.batch) / candidate.seconds);
    }
    if (measured_seconds_ > 0) {
      absl::StrAppendFormat(&out,
                            "\nChecked: %s %s with %d items predicted %.2f ms, measured %.2f ms\n",
                            best_.front().Shape(), Name(best_.front().storage), MeasuredItems(),
                            predicted_seconds_ * 1e3, measured_seconds_ * 1e3);
    }
    return out;
  }

  std::string JsonText() const {
    Json out;
    out["hardware"] = {{"name", hardware_.name},
                       {"flops", hardware_.flops},
                       {"read_bytes_per_s", hardware_.read_bytes},
                       {"efficiency", hardware_.efficiency},
                       {"efficiency_source", efficiency_source_}};
    out["items"] = flags_.items;
    out["shards"] = flags_.shards;
    out["batch"] = flags_.batch;
    for (const Candidate& candidate : best_) {
      out["heads"].push_back({{"shape", candidate.Shape()},
                              {"logits", candidate.shape.logits()},
                              {"storage", Name(candidate.storage)},
                              {"latency_ms", candidate.seconds * 1e3},
                              {"memory_bytes", candidate.memory_bytes}});
    }
    if (measured_seconds_ > 0) {
      out["checked"] = {{"shape", best_.front().Shape()},
                        {"storage", Name(best_.front().storage)},
                        {"items", MeasuredItems()},
                        {"predicted_ms", predicted_seconds_ * 1e3},
                        {"measured_ms", measured_seconds_ * 1e3}};
    }
    return out.dump(2) + "\n";
  }

  ControlPlane& control_;
  const TuneMolFlags& flags_;
  MolHardware hardware_;
  std::string efficiency_source_;
  std::vector<Candidate> best_;
  double fastest_ = 1e30, smallest_ = 1e30;
  double predicted_seconds_ = 0, measured_seconds_ = 0;
};

}  // namespace

CLI::App* AddTuneMol(CLI::App& app, TuneMolFlags* flags) {
  CLI::App* tune = app.add_subcommand("tune", "Find what fits a latency and a memory");
  tune->require_subcommand(1);
  CLI::App* command = tune->add_subcommand(
      "mol", "The largest Mixture-of-Logits heads (components, size, storage) within the limits");
  command->add_option("--latency-ms", flags->latency_ms, "An exact search of one batch takes less")
      ->required()
      ->check(NumberBetween(0.001, 1e9));
  command->add_option("--memory-gb", flags->memory_gb, "A shard's table takes less (10^9 bytes)")
      ->required()
      ->check(NumberBetween(0.001, 1e9));
  command->add_option("--hardware", flags->hardware, kMolHardwareHelp)->capture_default_str();
  command->add_option("--items", flags->items, "Items of the table, all shards together")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command->add_option("--batch", flags->batch, "Queries searched together")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{4096}));
  command->add_option("--shards", flags->shards, "Machines (ranks) that share the items")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--cross-hidden", flags->cross_hidden, "Hidden units of the cross gate")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{4096}));
  command->add_flag("--means", flags->means, "Tables hold mean components too");
  command->add_flag("--json", flags->json, "Print a JSON object");
  command->add_option("--scratch", flags->scratch, "Folder for what is measured with");
  return command;
}

absl::Status RunTuneMol(ControlPlane& control, const TuneMolFlags& flags) {
  if (control.size() > 1)
    return UsageError("tune mol runs on one rank, with all cores; --shards says how many share");
  return Tuner(control, flags).Run();
}

}  // namespace trireme
