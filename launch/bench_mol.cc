#include "launch/bench_mol.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/ceilings.h"
#include "kernels/status.h"
#include "launch/command_flags.h"
#include "launch/eager_mol.h"
#include "launch/output_files.h"
#include "launch/planted_job.h"
#include "launch/session.h"
#include "nlohmann/json.hpp"
#include "runtime/retrieval_memory.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr int64_t kEagerItems = 20000;  // more would not fit: 8 x 20,000 pairs take 0.1 GB

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

class MolBench {
 public:
  MolBench(ControlPlane& control, const BenchMolFlags& flags) : control_(control), flags_(flags) {}

  absl::Status Run() {
    PlantedJobOptions options;
    RETURN_IF_ERROR(ParseMolShape(flags_.shape, &options.data));
    RETURN_IF_ERROR(control_.Agree(control_.rank() == 0
                                       ? CheckOutputFiles({{"--save", flags_.save}}, {}, "")
                                       : absl::OkStatus()));
    options.data.alpha = flags_.alpha;
    options.data.seed = flags_.seed;
    options.storage = flags_.storage;
    options.threads = flags_.threads;
    options.scratch = flags_.scratch;
    ASSIGN_OR_RETURN(job_, PlantedJob::Start(control_, options));
    for (const int64_t items : flags_.items) RETURN_IF_ERROR(RunTable(items));
    return control_.Agree(control_.rank() == 0 ? Report() : absl::OkStatus());
  }

 private:
  // All ranks measure at the same time, since they share the machine.
  absl::StatusOr<Ceilings> SumOfCeilings() {
    control_.Barrier();
    const absl::StatusOr<Ceilings> mine = MeasureCeilings(*job_->group().stream);
    RETURN_IF_ERROR(control_.Agree(mine.status()));
    ByteWriter out;
    out.Put(*mine);
    Ceilings sum;
    for (const std::string& bytes : control_.AllGather(out.Take())) {
      sum.Add(ByteReader(bytes).Get<Ceilings>());
    }
    return sum;
  }

  // Median seconds of `work` on this rank, all ranks beginning together; once before, to warm up.
  absl::StatusOr<double> Time(const std::function<absl::Status()>& work) {
    std::vector<double> seconds;
    for (int i = 0; i <= flags_.iterations; ++i) {
      control_.Barrier();
      const Clock::time_point begin = Clock::now();
      RETURN_IF_ERROR(control_.BeginStep(Phase::kSearch, step_++, /*stage=*/0));
      RETURN_IF_ERROR(work());
      control_.EndStep();
      if (i > 0) seconds.push_back(SecondsSince(begin));
    }
    return Median(seconds);
  }

  absl::Status RunTable(int64_t items) {
    double build_seconds = 0;
    ASSIGN_OR_RETURN(const std::unique_ptr<RetrievalTable> table,
                     job_->Table(items, &build_seconds));
    const MolConfig& config = job_->planted().config();
    const double flops =
        2.0 * static_cast<double>(config.item_dim) * config.item_dim +
        2.0 * 128 * static_cast<double>(config.item_dim + table->model().shape().logits());
    ASSIGN_OR_RETURN(const Ceilings ceilings, SumOfCeilings());
    Json out;
    out["items"] = items;
    out["build_seconds"] = build_seconds;
    out["build_items_per_s"] = static_cast<double>(items) / build_seconds;
    out["build_share_of_matmul"] =
        flops * static_cast<double>(items) / build_seconds / ceilings.matmul_flops_f32;
    out["table_bytes_per_item"] = static_cast<double>(table->shard().bytes().table()) *
                                  control_.size() /
                                  static_cast<double>(std::max<int64_t>(1, items));
    for (const int64_t batch : flags_.batch) {
      ASSIGN_OR_RETURN(Json rows, RunBatch(*table, items, batch));
      out["batches"].push_back(std::move(rows));
    }
    // The eager twin works on the host.
    if (control_.size() == 1 && job_->group().stream->device().spec().host_memory) {
      ASSIGN_OR_RETURN(out["eager"], RunEager(*table));
    }
    tables_.push_back(std::move(out));
    return absl::OkStatus();
  }

  absl::StatusOr<Json> RunBatch(const RetrievalTable& table, int64_t items, int64_t batch) {
    const std::vector<RetrievalQuery> queries = job_->Queries(batch);
    RetrievalOptions options;
    options.k = std::min(flags_.k, items);
    std::vector<RetrievalAnswer> exact;
    Json out;
    out["batch"] = batch;
    const auto measure = [&](const char* name, const RetrievalOptions& how) -> absl::Status {
      std::vector<RetrievalAnswer> answers;
      RetrievalCounts counts;
      ASSIGN_OR_RETURN(const Ceilings before, SumOfCeilings());
      ASSIGN_OR_RETURN(const double seconds, Time([&]() -> absl::Status {
                         counts = {};
                         ASSIGN_OR_RETURN(answers,
                                          SearchTable(table, queries, how, {.counts = &counts}));
                         return FirstFailure(answers);
                       }));
      ASSIGN_OR_RETURN(const Ceilings after, SumOfCeilings());
      if (exact.empty()) exact = answers;
      const double matmul = (before.matmul_flops_f32 + after.matmul_flops_f32) / 2;
      const double pairs = static_cast<double>(items * batch);
      const OpCost cost =
          MolScoreCost(table.model().shape(), MolStorage::kF32, items, items * batch);
      Json row;
      row["mode"] = name;
      row["ms"] = seconds * 1e3;
      row["pairs_per_s"] = pairs / seconds;
      if (how.mode == RetrievalMode::kExact) row["share_of_matmul"] = cost.flops / seconds / matmul;
      row["gated_share"] = static_cast<double>(counts.scan.gated) * control_.size() / pairs;
      row["recall"] = Recall(exact, answers);
      row["proven_exact"] =
          static_cast<double>(std::count_if(answers.begin(), answers.end(),
                                            [](const RetrievalAnswer& a) { return a.exact; })) /
          static_cast<double>(batch);
      row["merge_us"] = counts.merge_seconds * 1e6;
      PrintRow(items, batch, row);
      out["modes"].push_back(std::move(row));
      return absl::OkStatus();
    };
    options.mode = RetrievalMode::kExact;
    RETURN_IF_ERROR(measure("exact", options));
    options.mode = RetrievalMode::kPruned;
    RETURN_IF_ERROR(measure("pruned", options));
    options.mode = RetrievalMode::kTwoStage;
    options.first_stage = FirstStage::kAverage;
    // 1%, 2.5% and 10% of the items.
    for (const double share : {0.01, 0.025, 0.1}) {
      options.average_k =
          std::clamp<int64_t>(static_cast<int64_t>(share * items), 1, kMaxFirstStageK);
      RETURN_IF_ERROR(measure(absl::StrCat("average-", options.average_k).c_str(), options));
    }
    options.first_stage = FirstStage::kPerEmbedding;
    for (const int64_t each_k : {10, 100}) {
      options.each_k = each_k;
      RETURN_IF_ERROR(measure(absl::StrCat("per-embedding-", each_k).c_str(), options));
    }
    RETURN_IF_ERROR(MeasureDots(table, queries, options.k, &out));
    return out;
  }

  static double Recall(const std::vector<RetrievalAnswer>& exact,
                       const std::vector<RetrievalAnswer>& found) {
    double hits = 0, all = 0;
    for (size_t b = 0; b < exact.size(); ++b) {
      const std::set<int64_t> ids(found[b].ids.begin(), found[b].ids.end());
      for (const int64_t id : exact[b].ids) hits += ids.count(id);
      all += static_cast<double>(exact[b].ids.size());
    }
    return all > 0 ? hits / all : 1.0;
  }

  // The plain dot-product search of the same items and k: one vector an item.
  absl::Status MeasureDots(const RetrievalTable& table, const std::vector<RetrievalQuery>& queries,
                           int64_t k, Json* out) {
    Stream& stream = *job_->group().stream;
    const MolShape& shape = table.model().shape();
    const auto batch = static_cast<int64_t>(queries.size());
    const Shape component_shape = {batch, shape.query_components * shape.component_dim};
    const Shape gate_shape = {batch, shape.gate_width()};
    const Shape mask_shape = {1, table.shard().mask_words()}, key_shape = {batch, k};
    const bool host_memory = stream.device().spec().host_memory;
    const MolTableView view = table.shard().view();
    const int64_t workspace_bytes =
        MolWorkspaceBytes(stream, shape, {MolScanOp::kAverage, view.storage, batch, view.slots, k});
    ASSIGN_OR_RETURN(
        Arena memory,
        Arena::Create(stream.device(), Arena::Footprint(DType::kF32, component_shape) +
                                           Arena::Footprint(DType::kF32, gate_shape) +
                                           ArgumentBytes(host_memory, DType::kI32, mask_shape) +
                                           ArgumentBytes(host_memory, DType::kI32, {batch}) +
                                           ArgumentBytes(host_memory, DType::kI64, key_shape) +
                                           ArgumentBytes(host_memory, DType::kI32, key_shape) +
                                           Arena::Footprint(DType::kU8, {workspace_bytes})));
    const TensorView components = memory.Allocate(DType::kF32, component_shape);
    const TensorView gates = memory.Allocate(DType::kF32, gate_shape);
    for (int64_t b = 0; b < batch; ++b) {
      stream.Copy(components.row<float>(b), queries[b].embedding.data(),
                  queries[b].embedding.size() * sizeof(float));
    }
    std::vector<int32_t> mask(std::max<int64_t>(1, table.shard().mask_words())), which(batch);
    table.shard().FillMask({}, nullptr, mask.data());
    const OpInput<int32_t> masks(stream, memory, mask.data(), mask_shape);
    const OpInput<int32_t> query_mask(stream, memory, which.data(), {batch});
    MolAllowed allowed;
    allowed.masks = masks.view();
    allowed.query_mask = query_mask.view();
    std::vector<uint64_t> keys(batch * k);
    std::vector<int32_t> slots(batch * k);
    const OpOutput<uint64_t> key_output(stream, memory, keys.data(), DType::kI64, key_shape);
    const OpOutput<int32_t> slot_output(stream, memory, slots.data(), DType::kI32, key_shape);
    const MolTopK topk{key_output.view(), slot_output.view()};
    const TensorView workspace = memory.Allocate(DType::kU8, {workspace_bytes});
    ASSIGN_OR_RETURN(
        const double seconds, Time([&] {
          MolAverageTopK(stream, shape, {components, gates}, view, allowed, topk, workspace, {});
          return stream.Synchronize();
        }));
    (*out)["dot_product_ms"] = seconds * 1e3;
    PrintRow(table.size(), batch, {{"mode", "dot-product"}, {"ms", seconds * 1e3}});
    return absl::OkStatus();
  }

  absl::StatusOr<Json> RunEager(const RetrievalTable& table) {
    Stream& stream = *job_->group().stream;
    const int64_t items = std::min(table.size(), kEagerItems), batch = 8;
    const MolConfig& config = job_->planted().config();
    ASSIGN_OR_RETURN(const EagerMol eager, EagerMol::Load(job_->model_dir(), stream));
    ASSIGN_OR_RETURN(const Tensor x,
                     Tensor::Create(stream.device(), DType::kF32, {items, config.item_dim}));
    ASSIGN_OR_RETURN(const Tensor q,
                     Tensor::Create(stream.device(), DType::kF32, {batch, config.query_dim}));
    job_->planted().FillItems(0, items, x.view().as<float>());
    job_->planted().FillQueries(0, batch, q.view().as<float>());
    ASSIGN_OR_RETURN(const double seconds, Time([&]() -> absl::Status {
                       ASSIGN_OR_RETURN(std::vector<float> scores,
                                        eager.Scores(table.model(), stream, q.view(), x.view()));
                       const int64_t k = std::min(flags_.k, items);
                       for (int64_t b = 0; b < batch; ++b) {
                         const auto row = scores.begin() + b * items;
                         std::partial_sort(row, row + k, row + items, std::greater<>());
                       }
                       return absl::OkStatus();
                     }));
    PrintRow(items, batch, {{"mode", "eager"}, {"ms", seconds * 1e3}});
    return Json{{"items", items},
                {"batch", batch},
                {"ms", seconds * 1e3},
                {"pairs_per_s", static_cast<double>(items * batch) / seconds}};
  }

  // A line of the table for people, on stderr as soon as it is measured: a sweep takes minutes.
  void PrintRow(int64_t items, int64_t batch, const Json& row) {
    if (control_.rank() != 0) return;
    if (!std::exchange(header_printed_, true)) {
      std::fprintf(stderr, "%10s %6s  %-18s %10s %12s %8s %8s %8s %9s\n", "items", "batch", "mode",
                   "ms", "pairs/s", "recall", "proven", "gated", "of matmul");
    }
    const auto share = [&row](const char* key) {
      return row.contains(key) ? absl::StrFormat("%.1f%%", 100.0 * row[key].get<double>()) : "-";
    };
    const double ms = row["ms"].get<double>();
    std::fprintf(stderr, "%10lld %6lld  %-18s %10.3f %12.3g %8s %8s %8s %9s\n",
                 static_cast<long long>(items), static_cast<long long>(batch),
                 row["mode"].get<std::string>().c_str(), ms,
                 static_cast<double>(items * batch) / ms * 1e3, share("recall").c_str(),
                 share("proven_exact").c_str(), share("gated_share").c_str(),
                 share("share_of_matmul").c_str());
  }

  absl::Status Report() const {
    Json out;
    out["bench"] = "mol";
    out["version"] = TRIREME_VERSION;
    out["shape"] = flags_.shape;
    out["storage"] = flags_.storage;
    out["alpha"] = flags_.alpha;
    out["k"] = flags_.k;
    out["ranks"] = control_.size();
    out["threads"] = job_->group().stream->device().spec().threads;
    out["tables"] = tables_;
    RETURN_IF_ERROR(WriteOut(control_, out.dump(2) + "\n"));
    if (flags_.save.empty()) return absl::OkStatus();
    std::ofstream file(flags_.save);
    file << out.dump(2) << "\n";
    return file.flush() ? absl::OkStatus()
                        : absl::UnavailableError(
                              absl::StrCat("--save ", flags_.save, ": cannot be written"));
  }

  ControlPlane& control_;
  const BenchMolFlags& flags_;
  std::unique_ptr<PlantedJob> job_;
  Json tables_ = Json::array();
  int64_t step_ = 0;  // searches so far
  bool header_printed_ = false;
};

}  // namespace

CLI::App* AddBenchMol(CLI::App* bench, BenchMolFlags* flags, JobFlags* job) {
  CLI::App* command = bench->add_subcommand(
      "mol", "Mixture-of-Logits retrieval on planted data: modes, recall, shares of the ceilings");
  command->add_option("--shape", flags->shape, "Query components x item components x size")
      ->capture_default_str();
  command->add_option("--storage", flags->storage, "How items are held: f32, bf16 or int8")
      ->capture_default_str();
  command->add_option("--items", flags->items, "Items of the table (several: a sweep)")
      ->delimiter(',')
      ->capture_default_str()
      ->check(PositiveNumber());
  command->add_option("--batch", flags->batch, "Queries searched together (several: a sweep)")
      ->delimiter(',')
      ->capture_default_str()
      ->check(PositiveNumber());
  command->add_option("--k", flags->k, "Items to answer with")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, kMaxRetrievalK));
  command->add_option("--alpha", flags->alpha, "How different the planted components are")
      ->capture_default_str()
      ->check(NotNegativeNumber());
  command->add_option("--iterations", flags->iterations, "Measured iterations; medians are shown")
      ->capture_default_str()
      ->check(PositiveNumber());
  command
      ->add_option("--threads", flags->threads, "Threads a rank (default: its share of the cores)")
      ->check(NumberBetween(1, 1024));
  command->add_option("--seed", flags->seed, "Same seed, same data")
      ->capture_default_str()
      ->transform(SeedNumber());
  command->add_option("--scratch", flags->scratch, "Folder for the generated items");
  command->add_option("--save", flags->save, "Write the result as JSON");
  AddJobFlags(command, job);
  return command;
}

absl::Status RunBenchMol(ControlPlane& control, const BenchMolFlags& flags) {
  return MolBench(control, flags).Run();
}

}  // namespace trireme
