// What each rank of a topology holds of a model, in bytes and parameters, without opening a
// checkpoint. The decoder, the ledger, `plan` and `inspect` all cut a model by these functions.
// Pure functions, any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"
#include "kernels/quantize.h"
#include "models/config.h"
#include "parallel/topology.h"

namespace trireme {

struct RankBytes {
  int rank = 0;
  Range layers;              // of this rank's stage
  int64_t weight_bytes = 0;  // parameters * SizeOf(dtype); quantised ones 1, and 4 a row
  int64_t kv_bytes_per_token =
      0;  // keys and values of this stage's layers and this rank's KV heads, stored as dtype
  int64_t parameters = 0;
};

// Layers of each pipeline stage, balanced by what a token costs on average: the parameters of a
// layer, and on the last stage those of the output head times the share of tokens that need it (an
// embedding is a look-up and costs nothing). `split` overrides: layers of each stage; empty =
// balanced. REQUIRES: 1 <= pp <= config.num_layers; CheckSplit(config, pp, split).ok().
std::vector<Range> StageLayers(const ModelConfig& config, int pp,
                               const std::vector<int64_t>& split = {});
// InvalidArgument names what is wrong: each stage needs a layer, and their sum is the model's.
absl::Status CheckSplit(const ModelConfig& config, int pp, const std::vector<int64_t>& split);

// One entry for each of topology.world_size() ranks. A tied embedding counts once where the first
// stage is the last, else on both. REQUIRES: CheckTensorParallel(config, topology).ok().
std::vector<RankBytes> PlanRankBytes(const ModelConfig& config, const Topology& topology,
                                     DType dtype, const std::vector<int64_t>& split = {},
                                     Quantization quantization = Quantization::kNone);

// KV pages of page_size tokens that `bytes` of a rank hold, on the rank where a page is largest.
// InvalidArgument when there is no room for one.
absl::StatusOr<int64_t> PagesOfMemory(const ModelConfig& config, const Topology& topology,
                                      DType dtype, int64_t page_size, int64_t bytes,
                                      const std::vector<int64_t>& split = {});

// What a forward pass of `tokens` tokens and `logit_rows` rows of logits takes of its arena.
int64_t ArenaBytes(const ModelConfig& config, int tp_index, int tp_size, DType dtype,
                   int64_t tokens, int64_t logit_rows);

// What a run's kernels are loaded for; as in DecoderOptions.
struct KernelLimits {
  DType dtype = DType::kBF16;
  Quantization quantization = Quantization::kNone;
  int64_t max_batch_tokens = 0, max_logit_rows = 0, max_sequences = 0;
  int64_t max_kv_len = 0;
  bool cublas_lt = false;  // DeviceOptions.cublas_lt
};
// What attention and matmuls work in on a GPU, by the rules that loading goes by. With cublas_lt
// and e4m3 activations the chip is one of 9.0. `last`: of the last pipeline stage.
int64_t CudaWorkspaceBytes(const ModelConfig& config, int tp_index, int tp_size, bool last,
                           const KernelLimits& limits);

// Parameters of the whole model, a tied head counted once.
int64_t TotalParameters(const ModelConfig& config);

}  // namespace trireme
