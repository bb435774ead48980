// trireme inspect: architecture, parameters, and the bytes each rank of a layout will hold. Reads
// headers only.

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "launch/session.h"
#include "models/memory_plan.h"
#include "nlohmann/json.hpp"

namespace trireme {
namespace {

const char* LinearLayers(Quantization quantization) {
  switch (quantization) {
    case Quantization::kNone:
      return "";
    case Quantization::kFp8:
      return ", linear layers e4m3";
    case Quantization::kFp8Dynamic:
      return ", linear layers e4m3 with e4m3 activations";
  }
  return "?";
}

// As LoadWorker would plan it: without a limit, room for max-num-seqs of the longest sequences.
absl::StatusOr<std::string> DescribeLedger(const InspectFlags& flags, const ModelConfig& config,
                                           const Topology& topology, DType storage,
                                           Quantization quantization,
                                           const std::vector<int64_t>& split) {
  const ModelFlags& model = flags.model;
  WorkerOptions options;
  options.dtype = storage;
  options.quantization = quantization;
  options.pp_split = split;
  options.page_size = model.page_size;
  options.max_num_seqs = model.max_num_seqs;
  options.max_num_batched_tokens = model.max_num_batched_tokens;
  options.max_logit_rows = model.max_num_seqs;
  options.max_model_len = model.max_model_len > 0 ? model.max_model_len : config.max_positions;
  options.device.cublas_lt = model.matmul == "cublaslt";
  const bool gpu = model.device == "cuda";
  const auto sizes = [&] {
    LedgerOptions of_ranks = LedgerOptionsOf(options, storage);
    of_ranks.host_memory = !gpu;
    return of_ranks;
  };
  std::vector<int64_t> workspaces(topology.world_size());
  if (gpu) workspaces = PlanCudaWorkspaces(config, topology, sizes());
  ASSIGN_OR_RETURN(options.num_pages, NumPages(model, config, topology, options));
  if (options.num_pages == 0) options.num_pages = options.most_pages();
  ASSIGN_OR_RETURN(const int64_t limit, MemoryLimit(model));
  if (limit > 0) {
    ASSIGN_OR_RETURN(const int64_t fit,
                     PagesWithinLimit(config, topology, sizes(), limit,
                                      *std::max_element(workspaces.begin(), workspaces.end())));
    options.num_pages = std::min(options.num_pages, fit);
  }
  std::vector<Ledger> ledgers = PlanLedgers(config, topology, sizes());
  std::string out =
      absl::StrFormat("%d KV pages of %d tokens\n", options.num_pages, options.page_size);
  for (size_t rank = 0; rank < ledgers.size(); ++rank) {
    ledgers[rank][Owner::kWorkspace] = workspaces[rank];
    absl::StrAppend(&out, "rank ", rank, "\n", LedgerTable(ledgers[rank], nullptr));
  }
  return out;
}

absl::StatusOr<std::string> Describe(const InspectFlags& flags) {
  const ModelFlags& model = flags.model;
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(model.model_dir));
  // The layout is a question here, not the world's: it defaults to one rank.
  const Topology topology{.tp_size = std::max(1, model.tp),
                          .pp_size = std::max(1, model.pp),
                          .dp_size = std::max(1, model.dp)};
  constexpr int64_t kMaxRanks = 1 << 16;
  if (int64_t{topology.tp_size} * topology.pp_size > kMaxRanks ||
      int64_t{topology.tp_size} * topology.pp_size * topology.dp_size > kMaxRanks) {
    return UsageError(absl::StrCat("--tp x --pp x --dp: more than ", kMaxRanks, " ranks"));
  }
  if (absl::Status fits = CheckTensorParallel(config, topology); !fits.ok())
    return UsageError(std::string(fits.message()));
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseDType(model.dtype));
  ASSIGN_OR_RETURN(const std::unique_ptr<WeightLoader> loader, WeightLoader::Open(model.model_dir));
  RETURN_IF_ERROR(loader->Check(AllWeightSpecs(config)));
  const DType storage = dtype.value_or(config.dtype);
  ASSIGN_OR_RETURN(const Quantization quantization, ParseQuantization(model.quantization));
  ASSIGN_OR_RETURN(const std::vector<int64_t> split, ParseSplit(model.pp_split));
  if (absl::Status fits = CheckSplit(config, topology.pp_size, split); !fits.ok())
    return UsageError(std::string(fits.message()));
  // --ledger needs them; a wrong one is wrong without it too.
  if (!model.kv_cache_memory.empty())
    RETURN_IF_ERROR(ParseBytes("--kv-cache-memory", model.kv_cache_memory).status());
  RETURN_IF_ERROR(MemoryLimit(model).status());
  if (flags.ledger) return DescribeLedger(flags, config, topology, storage, quantization, split);
  const std::vector<RankBytes> ranks =
      PlanRankBytes(config, topology, storage, split, quantization);
  if (flags.json) {
    nlohmann::ordered_json out{{"architecture", config.architecture},
                               {"parameters", TotalParameters(config)},
                               {"hidden_size", config.hidden_size},
                               {"layers", config.num_layers},
                               {"heads", config.num_heads},
                               {"kv_heads", config.num_kv_heads},
                               {"head_dim", config.head_dim},
                               {"intermediate_size", config.intermediate_size},
                               {"vocab_size", config.vocab_size},
                               {"max_positions", config.max_positions},
                               {"dtype", Name(storage)},
                               {"quantization", Name(quantization)},
                               {"tp", topology.tp_size},
                               {"pp", topology.pp_size},
                               {"dp", topology.dp_size}};
    out["ranks"] = nlohmann::ordered_json::array();
    for (const RankBytes& rank : ranks) {
      out["ranks"].push_back({{"rank", rank.rank},
                              {"layers", {rank.layers.begin, rank.layers.end}},
                              {"parameters", rank.parameters},
                              {"weight_bytes", rank.weight_bytes},
                              {"kv_bytes_per_token", rank.kv_bytes_per_token}});
    }
    return out.dump(2) + "\n";
  }
  std::string out = absl::StrFormat(
      "%s, %d parameters, %s%s\n"
      "hidden %d, intermediate %d, layers %d, heads %d (KV %d) of %d, vocabulary %d, positions "
      "%d%s%s\n\n"
      "tp %d x pp %d x dp %d\n%6s  %-10s %12s %12s %14s\n",
      config.architecture, TotalParameters(config), Name(storage), LinearLayers(quantization),
      config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads,
      config.num_kv_heads, config.head_dim, config.vocab_size, config.max_positions,
      config.tied_head ? ", tied head" : "",
      config.sliding_window > 0 ? absl::StrCat(", sliding window ", config.sliding_window)
                                : std::string(),
      topology.tp_size, topology.pp_size, topology.dp_size, "rank", "layers", "parameters",
      "weights", "KV per token");
  for (const RankBytes& rank : ranks) {
    absl::StrAppendFormat(&out, "%6d  %-10s %12d %12s %14s\n", rank.rank,
                          absl::StrCat(rank.layers.begin, " to ", rank.layers.end - 1),
                          rank.parameters, HumanBytes(rank.weight_bytes),
                          HumanBytes(rank.kv_bytes_per_token));
  }
  return out;
}

}  // namespace

absl::Status RunInspect(ControlPlane& control, const InspectFlags& flags) {
  absl::Status status;
  if (control.rank() == 0) {
    const absl::StatusOr<std::string> text = Describe(flags);
    status = text.ok() ? WriteOut(control, *text) : text.status();
  }
  return control.Agree(status);
}

}  // namespace trireme
