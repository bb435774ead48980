// What each rank of a topology holds of a model, in bytes and parameters, without opening a
// checkpoint. The decoder, the ledger, `plan` and `inspect` all cut a model by these functions.
// Pure functions, any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/dtype.h"
#include "models/config.h"
#include "parallel/topology.h"

namespace trireme {

struct RankBytes {
  int rank = 0;
  Range layers;              // of this rank's stage
  int64_t weight_bytes = 0;  // parameters * SizeOf(dtype)
  int64_t kv_bytes_per_token =
      0;  // keys and values of this stage's layers and this rank's KV heads, stored as dtype
  int64_t parameters = 0;
};

// Layers of each pipeline stage, balanced by what a token costs on average: the parameters of a
// layer, and on the last stage those of the output head times the share of tokens that need it (an
// embedding is a look-up and costs nothing). REQUIRES: 1 <= pp <= config.num_layers.
std::vector<Range> StageLayers(const ModelConfig& config, int pp);

// One entry for each of topology.world_size() ranks. A tied embedding counts once where the first
// stage is the last, else on both. REQUIRES: CheckTensorParallel(config, topology).ok().
std::vector<RankBytes> PlanRankBytes(const ModelConfig& config, const Topology& topology,
                                     DType dtype);

// Parameters of the whole model, a tied head counted once.
int64_t TotalParameters(const ModelConfig& config);

}  // namespace trireme
