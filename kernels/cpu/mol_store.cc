// MoL's work per query or item alone: activations and norms of the projections, packing of the gate
// and of items into blocks of lanes.
#include <cmath>
#include <vector>

#include "kernels/cpu/mol_ops.h"

namespace trireme::cpu {
namespace {

// W [outputs, inputs] as [outputs / 8][inputs][8].
std::vector<float> PackLayer(const ConstTensorView& w, int64_t outputs, int64_t inputs) {
  const int64_t tiles = (outputs + kMolGateTile - 1) / kMolGateTile;
  std::vector<float> packed(tiles * inputs * kMolGateTile);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < inputs; ++i) {
      packed[(o / kMolGateTile * inputs + i) * kMolGateTile + o % kMolGateTile] =
          w.row<float>(o)[i];
    }
  }
  return packed;
}

std::vector<float> PackBias(const ConstTensorView& bias, int64_t outputs) {
  std::vector<float> packed((outputs + kMolGateTile - 1) / kMolGateTile * kMolGateTile);
  if (bias) std::copy_n(bias.as<float>(), outputs, packed.begin());
  return packed;
}

// The smallest bf16 that is at least x, so that no element of the vector needs more than 127 steps.
BF16 RoundUp(float x) {
  BF16 rounded = FromFloat<BF16>(x);
  if (ToFloat(rounded) < x) ++rounded.bits;
  return rounded;
}

// One vector [dim] into lane `lane` of its block [dim, 32].
void StoreVector(const float* x, int64_t dim, MolStorage storage, int64_t lane, void* block,
                 BF16* scales) {
  if (storage == MolStorage::kF32) {
    float* out = static_cast<float*>(block) + lane;
    for (int64_t k = 0; k < dim; ++k) out[k * kMolLanes] = x[k];
    return;
  }
  if (storage == MolStorage::kBF16) {
    BF16* out = static_cast<BF16*>(block) + lane;
    for (int64_t k = 0; k < dim; ++k) out[k * kMolLanes] = FromFloat<BF16>(x[k]);
    return;
  }
  float largest = 0;
  for (int64_t k = 0; k < dim; ++k) largest = std::max(largest, std::abs(x[k]));
  const BF16 scale = RoundUp(largest / 127.0f);
  const float step = ToFloat(scale);
  scales[lane] = scale;
  int8_t* out = static_cast<int8_t*>(block) + lane;
  for (int64_t k = 0; k < dim; ++k) {
    out[k * kMolLanes] = static_cast<int8_t>(step > 0 ? std::nearbyint(x[k] / step) : 0.0f);
  }
}

// One item's vectors, gate and mean into its slot.
class ItemWriter {
 public:
  ItemWriter(const MolShape& shape, const MolTableView& table)
      : shape_(shape),
        table_(table),
        vector_bytes_(shape.component_dim * kMolLanes * ElementBytes(table.storage)),
        mean_(shape.component_dim) {}

  void Write(const float* components, const float* gates, int64_t slot) {
    const int64_t px = shape_.item_components, dim = shape_.component_dim;
    const int64_t block = slot / kMolLanes, lane = slot % kMolLanes;
    for (int64_t m = 0; m < px; ++m) {
      const int64_t vector = block * px + m;
      StoreVector(components + m * dim, dim, table_.storage, lane,
                  static_cast<char*>(table_.components) + vector * vector_bytes_,
                  table_.scales == nullptr ? nullptr : table_.scales + vector * kMolLanes);
    }
    const int64_t gate_width = shape_.gate_width();
    StoreVector(gates, gate_width, table_.storage, lane,
                static_cast<char*>(table_.gates) +
                    block * gate_width * kMolLanes * ElementBytes(table_.storage),
                table_.gate_scales == nullptr ? nullptr : table_.gate_scales + block * kMolLanes);
    if (table_.means != nullptr) WriteMean(components, block, lane);
  }

 private:
  void WriteMean(const float* components, int64_t block, int64_t lane) {
    const int64_t px = shape_.item_components, dim = shape_.component_dim;
    for (int64_t k = 0; k < dim; ++k) {
      float sum = 0;
      for (int64_t m = 0; m < px; ++m) sum += components[m * dim + k];
      mean_[k] = sum / static_cast<float>(px);
    }
    StoreVector(mean_.data(), dim, table_.storage, lane,
                static_cast<char*>(table_.means) + block * vector_bytes_,
                table_.mean_scales == nullptr ? nullptr : table_.mean_scales + block * kMolLanes);
  }

  const MolShape& shape_;
  const MolTableView& table_;
  const int64_t vector_bytes_;
  std::vector<float> mean_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MolGateWeights>> PackMolGate(Stream&, const MolShape& shape,
                                                            const MolGateTensors& tensors) {
  auto packed = std::make_unique<PackedMolGate>();
  packed->shape = shape;
  const int64_t l = shape.logits(), h = shape.cross_hidden;
  packed->output_inputs = h > 0 ? h : l;
  if (shape.gating == MolGating::kGluSilu && h > 0) {
    packed->hidden_outputs = h;
    packed->hidden_weights = PackLayer(tensors.w1, h, l);
    packed->hidden_bias = PackBias(tensors.b1, h);
  }
  packed->output_weights = PackLayer(tensors.w2, l, packed->output_inputs);
  packed->output_bias = PackBias(tensors.b2, l);
  packed->bytes =
      static_cast<int64_t>((packed->hidden_weights.size() + packed->hidden_bias.size() +
                            packed->output_weights.size() + packed->output_bias.size()) *
                           sizeof(float));
  return std::unique_ptr<MolGateWeights>(std::move(packed));
}

void Silu(Stream& stream, TensorView x) {
  const int64_t n = x.dim(1);
  PoolOf(stream).ParallelFor(x.dim(0), RowGrain(n), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) BestIsa().silu(x.row<float>(t), n);
  });
}

void GeluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out) {
  const int64_t n = out.dim(1);
  PoolOf(stream).ParallelFor(out.dim(0), RowGrain(2 * n), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float *gate = gate_up.row<float>(t), *up = gate + n;
      float* y = out.row<float>(t);
      for (int64_t i = 0; i < n; ++i) {
        y[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678118654752f)) * up[i];
      }
    }
  });
}

void L2Normalize(Stream& stream, TensorView x, int64_t dim, float eps) {
  const int64_t n = x.dim(1);
  PoolOf(stream).ParallelFor(x.dim(0), RowGrain(n), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < n; i += dim) BestIsa().l2_normalize(x.row<float>(t) + i, dim, eps);
    }
  });
}

void MolStore(Stream& stream, const MolShape& shape, ConstTensorView components,
              ConstTensorView gates, ConstTensorView slots, const MolTableView& table) {
  const int32_t* slot = slots.as<int32_t>();
  PoolOf(stream).ParallelFor(slots.dim(0), kMolLanes, [&](int64_t begin, int64_t end) {
    ItemWriter writer(shape, table);
    for (int64_t i = begin; i < end; ++i) {
      CHECK(slot[i] >= 0 && slot[i] < table.slots) << "slot " << slot[i];
      writer.Write(components.row<float>(i), gates.row<float>(i), slot[i]);
    }
  });
}

}  // namespace trireme::cpu
