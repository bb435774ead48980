// A checkpoint with other numbers in it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "models/weights.h"

namespace trireme {

// Copies the checkpoint in `from` into the folder `to`, its weights in f32, each tensor after
// `edit` has changed its values [spec.shape].
void RewriteCheckpoint(const std::string& from, const std::string& to,
                       const std::function<void(const WeightSpec&, std::vector<float>*)>& edit);

// The weights that --quantization fp8 computes with, as a checkpoint: those of the blocks' linear
// layers are rounded to e4m3 under their row's scale, all others are as they were.
void WriteDequantizedCheckpoint(const std::string& from, const std::string& to);

}  // namespace trireme
