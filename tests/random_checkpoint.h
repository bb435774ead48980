// A checkpoint of any shape with random weights: for tests whose kernels ask for sizes that no
// golden model has.
#pragma once

#include <string>

#include "models/config.h"

namespace trireme {

// Writes config.json and model.safetensors, in the config's dtype, into the folder `dir`. Matrices
// are uniform with unit variance of their products, norms near 1: logits have no particular order.
void WriteRandomCheckpoint(const std::string& dir, const ModelConfig& config);

}  // namespace trireme
