#include "models/memory_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/matmul_workspace.h"
#include "kernels/device.h"
#include "models/weights.h"

namespace trireme {
namespace {

// Elements of the piece of `spec` that one tensor-parallel rank holds.
int64_t PieceElements(const WeightSpec& spec, int part, int parts) {
  if (spec.split == Split::kNone) return spec.shape.elements();
  const int64_t cut_extent = spec.shape[spec.split == Split::kCols ? 1 : 0];
  return spec.shape.elements() / cut_extent * PieceOfSpec(spec, part, parts).size();
}

// All layers have the same shapes, so one stands for each.
LayerWeightSpecs AnyLayer(const ModelConfig& config) {
  ModelConfig one = config;
  one.num_layers = 1;
  return WeightSpecsOf(one).layers[0];
}

int64_t LayerElements(const LayerWeightSpecs& layer, int part, int parts) {
  int64_t sum = 0;
  for (const WeightSpec& spec : SpecsOfLayer(layer)) sum += PieceElements(spec, part, parts);
  return sum;
}

// What quantising a layer's matrices saves: each element but a byte, less a scale for each row.
int64_t SavedBytes(const LayerWeightSpecs& layer, int part, int parts, int64_t size) {
  int64_t saved = 0;
  for (const WeightSpec* spec : LinearSpecsOf(layer)) {
    const int64_t elements = PieceElements(*spec, part, parts);
    const int64_t rows =
        spec->split == Split::kRows ? PieceOfSpec(*spec, part, parts).size() : spec->shape[0];
    saved += elements * (size - 1) - rows * int64_t{sizeof(float)};
  }
  return saved;
}

}  // namespace

absl::Status CheckSplit(const ModelConfig& config, int pp, const std::vector<int64_t>& split) {
  if (split.empty()) return absl::OkStatus();
  if (static_cast<int>(split.size()) != pp) {
    return absl::InvalidArgumentError(
        absl::StrCat("--pp-split has ", split.size(), " numbers for ", pp, " stages"));
  }
  int64_t sum = 0;
  for (const int64_t layers : split) {
    if (layers < 1 || layers > config.num_layers) {
      return absl::InvalidArgumentError(
          absl::StrCat("--pp-split: ", layers, " layers for a stage; there are ", config.num_layers,
                       " and each stage needs one"));
    }
    sum += layers;
  }
  if (sum == config.num_layers) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--pp-split adds up to ", sum, " layers; the model has ", config.num_layers));
}

std::vector<Range> StageLayers(const ModelConfig& config, int pp,
                               const std::vector<int64_t>& split) {
  CHECK(pp >= 1 && pp <= config.num_layers)
      << pp << " stages of " << config.num_layers << " layers";
  if (!split.empty()) {
    CHECK(CheckSplit(config, pp, split).ok());
    std::vector<Range> stages;
    for (const int64_t layers : split) {
      const int64_t begin = stages.empty() ? 0 : stages.back().end;
      stages.push_back({begin, begin + layers});
    }
    return stages;
  }
  const auto layer_cost = static_cast<double>(LayerElements(AnyLayer(config), 0, 1));
  // One token in five is an output token in everyday use (512 in, 128 out), and only those go
  // through the head. The embedding is a look-up, which costs nothing.
  constexpr double kHeadShare = 0.2;
  const auto head_cost = kHeadShare * static_cast<double>(config.hidden_size * config.vocab_size);
  return SplitLayers(std::vector<double>(config.num_layers, layer_cost), pp, 0.0, head_cost);
}

std::vector<RankBytes> PlanRankBytes(const ModelConfig& config, const Topology& topology,
                                     DType dtype, const std::vector<int64_t>& split,
                                     Quantization quantization) {
  const std::vector<Range> stages = StageLayers(config, topology.pp_size, split);
  const LayerWeightSpecs layer = AnyLayer(config);
  ModelConfig one = config;
  one.num_layers = 1;
  const DecoderWeightSpecs specs = WeightSpecsOf(one);
  const auto size = static_cast<int64_t>(SizeOf(dtype));
  std::vector<RankBytes> out;
  for (int rank = 0; rank < topology.world_size(); ++rank) {
    const int stage = topology.PpIndex(rank), tp = topology.TpIndex(rank), parts = topology.tp_size;
    const bool first = stage == 0, last = stage == topology.pp_size - 1;
    RankBytes bytes;
    bytes.rank = rank;
    bytes.layers = stages[stage];
    bytes.parameters = bytes.layers.size() * LayerElements(layer, tp, parts);
    if (first) bytes.parameters += PieceElements(specs.embedding, tp, parts);
    if (last) {
      for (const WeightSpec& spec : SpecsOfFinalNorm(specs))
        bytes.parameters += PieceElements(spec, tp, parts);
    }
    if (last && !(first && config.tied_head))
      bytes.parameters += PieceElements(specs.head, tp, parts);
    bytes.weight_bytes = bytes.parameters * size;
    if (quantization != Quantization::kNone)
      bytes.weight_bytes -= bytes.layers.size() * SavedBytes(layer, tp, parts, size);
    bytes.kv_bytes_per_token =
        2 * bytes.layers.size() * PieceOfSpec(layer.k, tp, parts).size() * size;
    out.push_back(bytes);
  }
  return out;
}

absl::StatusOr<int64_t> PagesOfMemory(const ModelConfig& config, const Topology& topology,
                                      DType dtype, int64_t page_size, int64_t bytes,
                                      const std::vector<int64_t>& split) {
  int64_t per_token = 1;
  for (const RankBytes& rank : PlanRankBytes(config, topology, dtype, split))
    per_token = std::max(per_token, rank.kv_bytes_per_token);
  const int64_t page = per_token * page_size;
  if (bytes >= page) return bytes / page;
  return absl::InvalidArgumentError(
      absl::StrCat("one page of ", page_size, " tokens takes ", page, " bytes; there are ", bytes));
}

int64_t ArenaBytes(const ModelConfig& config, int tp_index, int tp_size, DType dtype,
                   int64_t tokens, int64_t logit_rows) {
  const LayerWeightSpecs layer = AnyLayer(config);
  const auto columns = [&](const WeightSpec& spec) {
    return PieceOfSpec(spec, tp_index, tp_size).size();
  };
  const int64_t hidden = config.hidden_size;
  const int64_t attention = 2 * columns(layer.q) + 2 * columns(layer.k);  // qkv, attended
  const int64_t mlp = columns(layer.up);                                  // activated
  // Up to two tensors share each of these: room for both their alignments.
  const auto footprint = [&](int64_t rows, int64_t width) {
    return static_cast<int64_t>(Arena::Footprint(dtype, {rows, width})) + 512;
  };
  const int64_t forward = 2 * footprint(tokens, hidden) +
                          std::max(footprint(tokens, attention), footprint(tokens, mlp));
  return std::max(forward, footprint(logit_rows, hidden));
}

int64_t CudaWorkspaceBytes(const ModelConfig& config, int tp_index, int tp_size, bool last,
                           const KernelLimits& limits) {
  const LayerWeightSpecs layer = AnyLayer(config);
  const auto columns = [&](const WeightSpec& spec) {
    return PieceOfSpec(spec, tp_index, tp_size).size();
  };
  const bool gated = config.mlp == MlpKind::kSwiGlu;
  const bool quantized = limits.quantization != Quantization::kNone;
  std::vector<cuda::MatMulShape> shapes;
  const auto add = [&](int64_t n, int64_t k, DType dtype, bool is_gated) {
    const bool codes = dtype == DType::kE4M3 && limits.quantization == Quantization::kFp8Dynamic;
    shapes.push_back({.n = n,
                      .k = k,
                      .permuted = cuda::StoredPermuted(dtype, k),
                      .gated = is_gated,
                      .codes = codes,
                      .by_cublas = limits.cublas_lt && (codes || SizeOf(dtype) == 2)});
  };
  const DType type = quantized ? DType::kE4M3 : limits.dtype;
  const int64_t hidden = config.hidden_size, q = columns(layer.q), up = columns(layer.up);
  add(q + 2 * columns(layer.k), hidden, type, false);
  add(hidden, q, type, false);
  add(gated ? 2 * up : up, hidden, type, gated);
  add(hidden, up, type, false);
  if (last) {
    add(PieceOf(config.vocab_size, tp_size, tp_index).size(), hidden, limits.dtype, false);
  }
  const int64_t rows = std::max(limits.max_batch_tokens, limits.max_logit_rows);
  return cuda::RoomsOf(rows, shapes).bytes() +
         cuda::WorkspaceBytes({.dtype = limits.dtype,
                               .sequences = limits.max_sequences,
                               .q_heads = q / config.head_dim,
                               .kv_heads = columns(layer.k) / config.head_dim,
                               .head_dim = config.head_dim,
                               .max_kv_len = limits.max_kv_len});
}

int64_t TotalParameters(const ModelConfig& config) {
  const int64_t vocabulary = config.vocab_size * config.hidden_size;
  const int64_t final_norm = config.hidden_size * (config.norm == NormKind::kLayer ? 2 : 1);
  return config.num_layers * LayerElements(AnyLayer(config), 0, 1) +
         vocabulary * (config.tied_head ? 1 : 2) + final_norm;
}

}  // namespace trireme
