// Mixture-of-Logits the way a tensor framework runs it: every call projects all items again and
// every intermediate is an array in memory. The baseline that `trireme bench mol` divides by; its
// matrix products are the fast ones of kernels/.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "models/mol_model.h"

namespace trireme {

// The weights of the cross gate as plain linear layers, which a MolModel no longer has.
struct EagerMol {
  std::unique_ptr<LinearWeight> w1, w2;
  Tensor b1, b2;
  static absl::StatusOr<EagerMol> Load(const std::string& model_dir, Stream& stream);
  // Scores [B, N] of raw queries [B, D_q] and items [N, D_x], f32. glu_silu with a hidden layer.
  absl::StatusOr<std::vector<float>> Scores(const MolModel& model, Stream& stream,
                                            ConstTensorView queries, ConstTensorView items) const;
};

}  // namespace trireme
