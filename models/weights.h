// The only place that knows a checkpoint's tensor names and how each is cut over tensor-parallel
// ranks. Loader, inspect, make-checkpoint and tests all read the one table that WeightSpecsOf
// returns.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "models/config.h"
#include "models/safetensors.h"
#include "parallel/topology.h"

namespace trireme {

// How tensor parallelism cuts a tensor.
enum class Split : uint8_t {
  kNone,  // every rank holds all of it
  kOnce,  // the first rank holds all of it, others nothing: what must enter a sum over ranks once
  kRows,  // dims[0] is cut (column-parallel linear layer, vocabulary)
  kCols,  // dims[1] is cut (row-parallel linear layer)
};

struct WeightSpec {
  std::string name;  // in the checkpoint
  Shape shape;       // of the whole tensor
  Split split = Split::kNone;
  int64_t unit = 1;  // cuts fall on multiples of this (head_dim)
  bool replicate =
      false;  // fewer units than ranks: unit i serves parts/units neighbouring ranks (KV heads)
  std::string fields = {};  // the config.json fields that the shape comes from, for error lines
};

// Which part of the model a tensor belongs to.
struct LayerWeightSpecs {
  // An empty name means that this model has no such tensor.
  WeightSpec input_norm, input_norm_bias, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, o,
      o_bias, post_norm, post_norm_bias, gate, up, down, gate_bias, up_bias, down_bias;
};
struct DecoderWeightSpecs {
  WeightSpec embedding;                  // [V, H]
  std::vector<LayerWeightSpecs> layers;  // all layers of the model
  WeightSpec final_norm;                 // [H]
  WeightSpec final_norm_bias;            // [H], or without a name
  WeightSpec head;                       // [V, H]; the embedding again when tied
};
DecoderWeightSpecs WeightSpecsOf(const ModelConfig& config);
// The linear layers of one layer, those that quantisation is for.
std::vector<const WeightSpec*> LinearSpecsOf(const LayerWeightSpecs& layer);
// The final norm's specs, without empty ones.
std::vector<WeightSpec> SpecsOfFinalNorm(const DecoderWeightSpecs& specs);
// All specs of the whole model, in file order, without empty ones and without the tied head's
// second mention.
std::vector<WeightSpec> AllWeightSpecs(const ModelConfig& config);
// The specs of one layer, in file order, without empty ones.
std::vector<WeightSpec> SpecsOfLayer(const LayerWeightSpecs& layer);

// InvalidArgument with the flag and the numbers when tp does not divide what it must (heads,
// intermediate size; KV heads must divide or be divided by tp) or pp is more than the layers.
absl::Status CheckTensorParallel(const ModelConfig& config, const Topology& topology);

// Rows (or columns) of a spec's tensor that `part` of `parts` holds. The vocabulary may be cut
// unevenly.
Range PieceOfSpec(const WeightSpec& spec, int part, int parts);

// Opens DIR/model.safetensors, or the shards of DIR/model.safetensors.index.json; reads pieces.
// Only the bytes of a piece are read from disk. Thread-safe once opened.
class WeightLoader {
 public:
  static absl::StatusOr<std::unique_ptr<WeightLoader>> Open(const std::string& model_dir);
  // That every spec is there with its shape and a float dtype, and nothing else that would take
  // part in the computation: all problems of a checkpoint are found before anything is read.
  // `specs` are the whole model's. Tensors outside of "model.", and the rotary tables that old
  // checkpoints have there, are ignored.
  absl::Status Check(const std::vector<WeightSpec>& specs) const;
  // What Load will read for this part's piece. REQUIRES: Check has passed.
  int64_t PieceBytes(const WeightSpec& spec, int part, int parts) const;
  // Copies this part's piece to dst (host memory, contiguous, the piece's shape; any float dtype:
  // converted).
  absl::Status Load(const WeightSpec& spec, int part, int parts, TensorView dst);
  // The same for the rows [first_row, first_row + dst.dim(0)) of the piece.
  absl::Status LoadRows(const WeightSpec& spec, int part, int parts, int64_t first_row,
                        TensorView dst);
  // The largest magnitude of each row of this part's piece, into maxima [rows of the piece].
  // InvalidArgument names the tensor where one is not finite.
  absl::Status RowMaxima(const WeightSpec& spec, int part, int parts, float* maxima);
  // InvalidArgument where rows [R, K], f32, that were loaded from row first_row on are not finite.
  absl::Status CheckFinite(const WeightSpec& spec, int64_t first_row, ConstTensorView rows) const;
  // Bytes read from tensor data so far.
  int64_t bytes_read() const { return bytes_read_; }
  // Of all tensors of all files.
  int64_t total_bytes() const { return total_bytes_; }

 private:
  WeightLoader() = default;
  struct Located {
    const SafetensorsFile* file;
    const TensorEntry* entry;
  };
  absl::StatusOr<Located> Locate(const std::string& name) const;
  std::string model_dir_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Located> tensors_;
  std::atomic<int64_t> bytes_read_{0};
  int64_t total_bytes_ = 0;
};

}  // namespace trireme
