// Every byte a rank holds on its device has an owner. The plan needs no device and no checkpoint:
// `inspect --ledger` prints it for any layout, the KV pool is sized by it, and a worker compares it
// with what it holds after loading, and after capturing graphs. Pure functions, any thread.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"
#include "kernels/quantize.h"
#include "models/config.h"
#include "parallel/topology.h"

namespace trireme {

enum class Owner : uint8_t {
  kWeights,
  kKvCache,
  kItems,        // of a retrieval table, with what its updates work in
  kActivations,  // of one step: arena, hidden states in flight, logits, rotation table; of searches
  kBatch,        // token ids, positions, page tables; what sampling sends and has back
  kCommunicator,  // of the device's memory: on a CPU the shared window or the parts of a sum
  kGraphs,        // captured steps and searches: what the driver took, known only afterwards
  kWorkspace,     // of libraries; none on a CPU
  kUnaccounted,   // allocated on the device by nobody above; planned as nothing
};
inline constexpr int kOwners = 9;
const char* Name(Owner owner);

struct Ledger {
  std::array<int64_t, kOwners> bytes{};
  int64_t& operator[](Owner owner) { return bytes[static_cast<size_t>(owner)]; }
  int64_t operator[](Owner owner) const { return bytes[static_cast<size_t>(owner)]; }
  int64_t total() const;
};

// Sizes as in WorkerOptions, with every 0 resolved.
struct LedgerOptions {
  DType dtype = DType::kF32;
  Quantization quantization = Quantization::kNone;
  int64_t max_model_len = 0;
  int64_t max_num_seqs = 0;
  int64_t max_num_batched_tokens = 0;
  int64_t max_logit_rows = 0;
  int64_t page_size = 0;
  int64_t num_pages = 0;
  std::vector<int64_t> pp_split{};
  bool host_memory = true;   // the device is a CPU
  bool cublas_lt = false;    // of a GPU: DeviceOptions.cublas_lt
  bool spans_hosts = false;  // tensor-parallel ranks exchange messages, not a window
};

// One ledger for each rank of the layout.
std::vector<Ledger> PlanLedgers(const ModelConfig& config, const Topology& topology,
                                const LedgerOptions& options);

// What each rank's kernels will hold on a GPU, the workspace of its ledger (CudaWorkspaceBytes); a
// worker knows it once its decoder is loaded.
std::vector<int64_t> PlanCudaWorkspaces(const ModelConfig& config, const Topology& topology,
                                        const LedgerOptions& options);

// The largest tensor that tensor-parallel ranks sum: the hidden states of a micro-batch.
int64_t LargestSumBytes(const ModelConfig& config, const LedgerOptions& options);

// KV pages for a limit on all bytes of a rank: what the tightest rank has left over. `taken_bytes`
// are those of a rank's that no plan knows: workspaces, and communicators of a GPU.
// ResourceExhausted names the rank and what the rest takes when there is no room for a page.
absl::StatusOr<int64_t> PagesWithinLimit(const ModelConfig& config, const Topology& topology,
                                         LedgerOptions options, int64_t limit_bytes,
                                         int64_t taken_bytes = 0);

// Completes what the owners hold by what nobody of them does: of `device_bytes`, all that was
// allocated on the device, among which a communicator's buffers and graphs are not.
void AccountFor(int64_t device_bytes, Ledger* held);

// OK when the total and each owner's bytes are within 2% of the plan; weights also within 1 MiB:
// padding of small matrices. What is unaccounted for may be 2% of all. FailedPrecondition with the
// table otherwise.
absl::Status CompareLedgers(const Ledger& planned, const Ledger& measured);

// "weights   planned 1.2 GiB   measured 1.2 GiB" lines; `measured` may be null.
std::string LedgerTable(const Ledger& planned, const Ledger* measured);
// "items   holds 1.2 GiB" lines, of those that hold something, and of all.
std::string HeldTable(const Ledger& held);
// ResourceExhausted: the same with a table of this rank's behind its line, under `caption`; all
// else as it is. `rank`: of the job.
absl::Status WithTable(const absl::Status& status, int rank, const std::string& host,
                       const char* caption, const std::string& table);

}  // namespace trireme
