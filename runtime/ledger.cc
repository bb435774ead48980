#include "runtime/ledger.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "models/memory_plan.h"
#include "models/weights.h"
#include "parallel/mpi_communicator.h"
#include "runtime/sampler.h"

namespace trireme {
namespace {

constexpr double kTolerance = 0.02;
constexpr int64_t kPaddingBytes = int64_t{1} << 20;  // of weights in panels

std::string HumanBytes(int64_t bytes) { return absl::StrFormat("%.2f MiB", bytes / 1048576.0); }

}  // namespace

const char* Name(Owner owner) {
  switch (owner) {
    case Owner::kWeights:
      return "weights";
    case Owner::kKvCache:
      return "KV cache";
    case Owner::kItems:
      return "items";
    case Owner::kActivations:
      return "activations";
    case Owner::kBatch:
      return "batch";
    case Owner::kCommunicator:
      return "communicator";
    case Owner::kGraphs:
      return "graphs";
    case Owner::kWorkspace:
      return "workspace";
    case Owner::kUnaccounted:
      return "unaccounted";
  }
  return "?";
}

int64_t Ledger::total() const { return std::accumulate(bytes.begin(), bytes.end(), int64_t{0}); }

std::vector<Ledger> PlanLedgers(const ModelConfig& config, const Topology& topology,
                                const LedgerOptions& o) {
  const auto size = static_cast<int64_t>(SizeOf(o.dtype));
  const int64_t pages_per_sequence = (o.max_model_len + o.page_size - 1) / o.page_size;
  std::vector<Ledger> out;
  for (const RankBytes& rank :
       PlanRankBytes(config, topology, o.dtype, o.pp_split, o.quantization)) {
    const bool last = topology.PpIndex(rank.rank) == topology.pp_size - 1;
    const int tp = topology.TpIndex(rank.rank);
    Ledger ledger;
    ledger[Owner::kWeights] = rank.weight_bytes;
    ledger[Owner::kKvCache] = o.num_pages * o.page_size * rank.kv_bytes_per_token;
    int64_t activations = ArenaBytes(config, tp, topology.tp_size, o.dtype,
                                     o.max_num_batched_tokens, o.max_logit_rows);
    activations += (last ? 1 : 2) * o.max_num_batched_tokens * config.hidden_size * size;
    activations += o.max_model_len * config.head_dim * int64_t{sizeof(float)};  // rotation
    if (last) {
      const int64_t vocabulary = PieceOf(config.vocab_size, topology.tp_size, tp).size();
      activations += o.max_logit_rows * vocabulary * int64_t{sizeof(float)};
    }
    ledger[Owner::kActivations] = activations;
    ledger[Owner::kBatch] = 4 * (3 * o.max_num_batched_tokens + 2 * o.max_num_seqs + 1 +
                                 o.max_num_seqs * pages_per_sequence) +
                            8 * o.max_num_batched_tokens;
    if (last) ledger[Owner::kBatch] += Sampler::ReservedBytes(o.max_logit_rows, topology.tp_size);
    if (o.host_memory) {
      ledger[Owner::kCommunicator] =
          MpiCommunicatorBytes(topology.tp_size, LargestSumBytes(config, o), o.spans_hosts);
    }
    out.push_back(ledger);
  }
  return out;
}

std::vector<int64_t> PlanCudaWorkspaces(const ModelConfig& config, const Topology& topology,
                                        const LedgerOptions& o) {
  const int64_t pages = (o.max_model_len + o.page_size - 1) / o.page_size;
  const KernelLimits limits{.dtype = o.dtype,
                            .quantization = o.quantization,
                            .max_batch_tokens = o.max_num_batched_tokens,
                            .max_logit_rows = o.max_logit_rows,
                            .max_sequences = o.max_num_seqs,
                            .max_kv_len = pages * o.page_size,
                            .cublas_lt = o.cublas_lt};
  std::vector<int64_t> bytes;
  for (int rank = 0; rank < topology.world_size(); ++rank) {
    bytes.push_back(CudaWorkspaceBytes(config, topology.TpIndex(rank), topology.tp_size,
                                       topology.PpIndex(rank) == topology.pp_size - 1, limits));
  }
  return bytes;
}

int64_t LargestSumBytes(const ModelConfig& config, const LedgerOptions& options) {
  return options.max_num_batched_tokens * config.hidden_size *
         static_cast<int64_t>(SizeOf(options.dtype));
}

absl::StatusOr<int64_t> PagesWithinLimit(const ModelConfig& config, const Topology& topology,
                                         LedgerOptions options, int64_t limit_bytes,
                                         int64_t taken_bytes) {
  options.num_pages = 1;
  const std::vector<Ledger> ledgers = PlanLedgers(config, topology, options);
  int64_t pages = std::numeric_limits<int64_t>::max();
  for (size_t rank = 0; rank < ledgers.size(); ++rank) {
    const int64_t page = ledgers[rank][Owner::kKvCache];
    const int64_t rest = ledgers[rank].total() - page + taken_bytes;
    if (limit_bytes < rest + page) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "--memory-limit: rank ", rank, " needs ", HumanBytes(rest),
          taken_bytes > 0 ? absl::StrCat(" (workspaces: ", HumanBytes(taken_bytes), ")") : "",
          " besides its KV cache, of which one page takes ", HumanBytes(page), "; the limit is ",
          HumanBytes(limit_bytes), ". Use more ranks, or lower --max-num-batched-tokens"));
    }
    pages = std::min(pages, (limit_bytes - rest) / std::max<int64_t>(1, page));
  }
  return pages;
}

void AccountFor(int64_t device_bytes, Ledger* held) {
  (*held)[Owner::kUnaccounted] = 0;
  const int64_t owned = held->total() - (*held)[Owner::kCommunicator] - (*held)[Owner::kGraphs];
  (*held)[Owner::kUnaccounted] = std::max<int64_t>(0, device_bytes - owned);
}

absl::Status CompareLedgers(const Ledger& planned, const Ledger& measured) {
  const auto differ = [&](const std::string& what) {
    return absl::FailedPreconditionError(absl::StrCat("memory held is not memory planned (", what,
                                                      "):\n", LedgerTable(planned, &measured)));
  };
  for (int i = 0; i < kOwners; ++i) {
    const auto owner = static_cast<Owner>(i);
    const int64_t base = owner == Owner::kUnaccounted ? planned.total() : planned[owner];
    const double allowed = std::max<double>(kTolerance * static_cast<double>(base),
                                            owner == Owner::kWeights ? kPaddingBytes : 0);
    if (static_cast<double>(std::abs(measured[owner] - planned[owner])) > allowed)
      return differ(Name(owner));
  }
  const double allowed = kTolerance * static_cast<double>(planned.total()) + kPaddingBytes;
  if (static_cast<double>(std::abs(measured.total() - planned.total())) > allowed)
    return differ("all");
  return absl::OkStatus();
}

std::string LedgerTable(const Ledger& planned, const Ledger* measured) {
  std::string out;
  const auto line = [&](const char* name, int64_t plan, int64_t held) {
    absl::StrAppendFormat(&out, "  %-13s planned %14s", name, HumanBytes(plan));
    if (measured != nullptr) absl::StrAppendFormat(&out, "  measured %14s", HumanBytes(held));
    out += "\n";
  };
  for (int i = 0; i < kOwners; ++i) {
    const int64_t held = measured != nullptr ? measured->bytes[i] : 0;
    // A language model has no items.
    if (static_cast<Owner>(i) == Owner::kItems && planned.bytes[i] == 0 && held == 0) continue;
    line(Name(static_cast<Owner>(i)), planned.bytes[i], held);
  }
  line("total", planned.total(), measured != nullptr ? measured->total() : 0);
  return out;
}

std::string HeldTable(const Ledger& held) {
  std::string out;
  const auto line = [&](const char* name, int64_t bytes) {
    if (bytes > 0) absl::StrAppendFormat(&out, "  %-13s holds %14s\n", name, HumanBytes(bytes));
  };
  for (int i = 0; i < kOwners; ++i) line(Name(static_cast<Owner>(i)), held.bytes[i]);
  line("total", held.total());
  return out;
}

absl::Status WithTable(const absl::Status& status, int rank, const std::string& host,
                       const char* caption, const std::string& table) {
  if (!absl::IsResourceExhausted(status)) return status;
  std::string text = absl::StrCat(std::string(status.message()), "\nrank ", rank, " (", host, ") ",
                                  caption, ":\n", table);
  text.pop_back();  // the last line's end
  return absl::ResourceExhaustedError(text);
}

}  // namespace trireme
