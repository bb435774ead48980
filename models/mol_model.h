// MolModel: a Mixture-of-Logits head. Turns raw embeddings into components and gate partials, each
// side on its own: items once, when they enter a table; queries when they come. Scoring the two is
// MolSearch (kernels/mol_ops.h). Never changed after Load; any thread, one stream at a time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/mol_ops.h"
#include "models/mol_config.h"

namespace trireme {

class MolModel {
 public:
  // Reads DIR/config.json and DIR/model.safetensors (f32, bf16 or f16; held as f32). A tensor that
  // is missing, of another shape, not finite or not of this head is an error that names it.
  static absl::StatusOr<std::unique_ptr<MolModel>> Load(const std::string& model_dir,
                                                        Stream& stream);
  const MolConfig& config() const { return config_; }
  const MolShape& shape() const { return shape_; }
  const MolGateWeights& gate() const { return *gate_; }
  int64_t weight_bytes() const { return weight_bytes_; }
  // A hash of config and weights: a snapshot of projected items belongs to one model.
  uint64_t fingerprint() const { return fingerprint_; }

  // What ProjectQueries or ProjectItems of `rows` rows take of an arena.
  size_t ArenaBytes(int64_t rows) const;
  // The callers' user ids (>= 0) as rows of each user-id table: [tables, B], for ProjectQueries.
  std::vector<int32_t> UserRows(const std::vector<int64_t>& user_ids) const;
  int64_t user_tables() const { return static_cast<int64_t>(user_tables_.size()); }
  // q [B, D_q] f32, user_rows [tables, B] i32. Gives components [B, Pq * d] and gates [B, G].
  // `arena` holds intermediates, and is as before at return.
  void ProjectQueries(Stream& stream, ConstTensorView q, ConstTensorView user_rows, Arena& arena,
                      TensorView components, TensorView gates) const;
  // x [n, D_x] f32 -> components [n, Px * d], gates [n, G].
  void ProjectItems(Stream& stream, ConstTensorView x, Arena& arena, TensorView components,
                    TensorView gates) const;

 private:
  MolModel() = default;
  struct Linear {
    std::unique_ptr<LinearWeight> weight;
    Tensor bias;  // or none
  };
  // Raw embedding -> components: GLU (if any) and a linear layer.
  struct Projection {
    Linear glu;  // [2 hidden, D]; no weight: none
    bool geglu = false;
    Linear out;
  };
  // Raw embedding -> gate partial: linear, SiLU, linear; concat_relu: the one layer.
  struct GatePartial {
    Linear hidden, out;
  };
  class Loader;

  void Project(Stream& stream, const Projection& projection, ConstTensorView x, Arena& arena,
               TensorView components) const;
  void Partial(Stream& stream, const GatePartial& partial, ConstTensorView x, Arena& arena,
               TensorView gates) const;

  MolConfig config_;
  MolShape shape_;
  Projection query_, item_;
  GatePartial query_gate_, item_gate_;
  std::vector<std::unique_ptr<LinearWeight>> user_tables_;
  std::unique_ptr<MolGateWeights> gate_;
  int64_t weight_bytes_ = 0;
  uint64_t fingerprint_ = 0;
};

}  // namespace trireme
