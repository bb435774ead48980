// Writes checkpoints with the real shapes of well-known models and random weights, in Hugging Face
// layout: for benches, dry runs and tests where no download is possible. What such a model says
// means nothing. One thread calls; a second one is used inside.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/dtype.h"
#include "models/config.h"

namespace trireme {

struct CheckpointRecipe {
  std::string like;    // one of CheckpointRecipeNames()
  int64_t layers = 0;  // 0 = as many as the model has
  DType dtype = DType::kBF16;
  std::string out_dir;                      // made when it is not there, else it must be empty
  uint64_t seed = 1;                        // the same seed gives the same bytes
  int64_t max_shard_bytes = 5'000'000'000;  // a tensor larger than this gets a shard of its own
};

// In the order of CheckpointRecipeNames().
std::vector<std::string> CheckpointRecipeNames();
// The config of a named model, with its own number of layers. InvalidArgument lists the names there
// are.
absl::StatusOr<ModelConfig> CheckpointRecipeConfig(const std::string& like);
// The text of a config.json that ParseModelConfig reads back as `config`.
std::string ConfigJson(const ModelConfig& config);

// Bytes of tensor data written so far and in all.
using CheckpointProgress = std::function<void(int64_t done_bytes, int64_t total_bytes)>;

// Writes config.json and model.safetensors, or model-0000i-of-0000n.safetensors and
// model.safetensors.index.json when one shard is not enough. Linear weights and embeddings are
// normal with standard deviation 0.02 (those that write to the residual stream divided by sqrt(2
// layers)), norms are 1. Every file gets its name only when it is complete; after an error nothing
// of it is left in out_dir.
absl::Status MakeCheckpoint(const CheckpointRecipe& recipe,
                            const CheckpointProgress& progress = {});

}  // namespace trireme
