// MoL's work per query or item alone: activations and norms of the projections, packing of the gate
// and of items into blocks of lanes. Stored items have the CPU backend's bits.
#include <algorithm>
#include <cfloat>
#include <vector>

#include "kernels/cuda/matmul_launch.h"
#include "kernels/cuda/mol_tiles.cuh"
#include "kernels/status.h"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLanes = static_cast<int>(kMolBlockRows);

__global__ void SiluElements(float* x, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) x[i] = x[i] / (1.0f + expf(-x[i]));
}

__global__ void GeluAndMulElements(const float* gate_up, float* out, int64_t n, int64_t elements) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const float* gate = gate_up + i / n * 2 * n + i % n;
  out[i] = 0.5f * gate[0] * (1.0f + erff(gate[0] * 0.70710678118654752f)) * gate[n];
}

// A warp a vector.
__global__ void NormalizeVectors(float* x, int64_t vectors, int dim, float eps) {
  const int64_t vector = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (vector >= vectors) return;
  float* v = x + vector * dim;
  float squares = 0.0f;
  for (int k = gpu::LaneId(); k < dim; k += 32) squares = __fmaf_rn(v[k], v[k], squares);
  const float norm = sqrtf(gpu::WarpSum(squares));
  const float bounded = norm > eps ? norm : eps;
  const float divisor = bounded <= FLT_MAX ? bounded : NAN;
  for (int k = gpu::LaneId(); k < dim; k += 32) v[k] = v[k] / divisor;
}

// The smallest bf16 that is at least x, so that no element of the vector needs more than 127 steps.
__device__ inline __nv_bfloat16 RoundedUp(float x) {
  const __nv_bfloat16 rounded = Rounded<__nv_bfloat16>(x);
  if (!(Float(rounded) < x)) return rounded;
  return __ushort_as_bfloat16(static_cast<unsigned short>(__bfloat16_as_ushort(rounded) + 1));
}

// x(k), k in [0, dim), into lane `lane` of its block, 2^shift values side by side; by a warp.
template <typename X>
__device__ void StoreVector(X&& x, int dim, int shift, MolStorage storage, void* block, int lane,
                            __nv_bfloat16* scale) {
  const int thread = gpu::LaneId();
  if (storage == MolStorage::kF32) {
    float* out = static_cast<float*>(block);
    for (int k = thread; k < dim; k += 32) out[PlaceOf(k, lane, shift)] = x(k);
  } else if (storage == MolStorage::kBF16) {
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(block);
    for (int k = thread; k < dim; k += 32) {
      out[PlaceOf(k, lane, shift)] = Rounded<__nv_bfloat16>(x(k));
    }
  } else {
    float largest = 0.0f;
    for (int k = thread; k < dim; k += 32) largest = fmaxf(largest, fabsf(x(k)));
    const __nv_bfloat16 rounded = RoundedUp(gpu::WarpMax(largest) / 127.0f);
    const float step = Float(rounded);
    if (thread == 0) *scale = rounded;
    int8_t* out = static_cast<int8_t*>(block);
    for (int k = thread; k < dim; k += 32) {
      out[PlaceOf(k, lane, shift)] = static_cast<int8_t>(step > 0.0f ? rintf(x(k) / step) : 0.0f);
    }
  }
}

struct StoreArguments {
  const float *components, *gates;
  const int32_t* slots;
  int64_t count;
  int item_components, dim, gate_width, shift, gate_shift, parts;
  MolStorage storage;
  int vector_bytes, gate_bytes;  // of a block's 32
  char *to_components, *to_means;
  __nv_bfloat16 *scales, *mean_scales, *gate_scales;
  char* to_gates;
};

// A warp a part of an item: its vectors, its gate and, if the table has them, its mean.
__global__ void StoreItems(StoreArguments a) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (warp >= a.count * a.parts) return;
  const int64_t item = warp / a.parts, block = a.slots[item] / kLanes;
  const int part = static_cast<int>(warp % a.parts), lane = a.slots[item] % kLanes;
  const float* components = a.components + item * a.item_components * a.dim;
  if (part < a.item_components) {
    const int64_t vector = block * a.item_components + part;
    const float* x = components + part * a.dim;
    StoreVector([x](int k) { return x[k]; }, a.dim, a.shift, a.storage,
                a.to_components + vector * a.vector_bytes, lane, a.scales + vector * kLanes + lane);
  } else if (part == a.item_components) {
    const float* gate = a.gates + item * a.gate_width;
    StoreVector([gate](int g) { return gate[g]; }, a.gate_width, a.gate_shift, a.storage,
                a.to_gates + block * a.gate_bytes, lane, a.gate_scales + block * kLanes + lane);
  } else {
    const auto mean = [&](int k) {
      float sum = 0.0f;
      for (int m = 0; m < a.item_components; ++m) sum = __fadd_rn(sum, components[m * a.dim + k]);
      return sum / static_cast<float>(a.item_components);
    };
    StoreVector(mean, a.dim, a.shift, a.storage, a.to_means + block * a.vector_bytes, lane,
                a.mean_scales + block * kLanes + lane);
  }
}

// W [outputs, inputs] as [outputs / 8][inputs][8], or, with `columns`, its columns like that.
void PackTiles(const ConstTensorView& w, bool columns, int64_t tiles, float* out) {
  const int64_t rows = w.dim(0), width = w.dim(1);
  const int64_t tiled = columns ? width : rows, others = columns ? rows : width;
  for (int64_t t = 0; t < tiles * kMolHiddenTile && t < tiled; ++t) {
    for (int64_t o = 0; o < others; ++o) {
      out[(t / kMolHiddenTile * others + o) * kMolHiddenTile + t % kMolHiddenTile] =
          columns ? w.row<float>(o)[t] : w.row<float>(t)[o];
    }
  }
}

// An element of a bf16 layer [outputs, inputs] as B fragments, `step` blocks of 32 inputs and
// `tile` of 8 outputs in.
BF16& FragmentElement(BF16* layer, int64_t index, int64_t output, int64_t input) {
  return layer[index * 256 + output % 8 * kPermutedBlock +
               PermutedIndex(static_cast<int>(input % kPermutedBlock))];
}

// The gate for the tensor cores, if they take this head.
absl::Status PackTileGate(Stream& stream, const MolGateTensors& tensors, CudaMolGate* gate) {
  const MolShape& shape = gate->shape;
  const MolTiling tiling = TilingOf(shape, MolStorage::kBF16);
  if (tiling.columns == 0) return absl::OkStatus();
  const int64_t columns = tiling.columns, units = tiling.hidden, weights = columns * units;
  std::vector<char> host(2 * weights * sizeof(BF16) + (units + columns) * sizeof(float));
  auto* w1 = reinterpret_cast<BF16*>(host.data());
  BF16* w2 = w1 + weights;
  auto* b1 = reinterpret_cast<float*>(w2 + weights);
  float* b2 = b1 + units;
  std::copy_n(tensors.b1.as<float>(), shape.cross_hidden, b1);
  for (int64_t m = 0; m < shape.item_components; ++m) {
    for (int64_t n = 0; n < shape.query_components; ++n) {
      const int64_t logit = n * shape.item_components + m;
      const int64_t column = m * 8 * tiling.query_tiles + n;
      b2[column] = tensors.b2.as<float>()[logit];
      for (int64_t h = 0; h < shape.cross_hidden; ++h) {
        FragmentElement(w1, h / 8 * (columns / 32) + column / 32, h, column) =
            FromFloat<BF16>(tensors.w1.row<float>(h)[logit]);
        FragmentElement(w2, h / 32 * (columns / 8) + column / 8, column, h) =
            FromFloat<BF16>(tensors.w2.row<float>(logit)[h]);
      }
    }
  }
  const auto bytes = static_cast<int64_t>(host.size());
  ASSIGN_OR_RETURN(gate->tile_memory, stream.device().Allocate(bytes));
  const char* base = static_cast<const char*>(gate->tile_memory.data());
  gate->bytes += bytes;
  gate->tile_w1 = base;
  gate->tile_w2 = base + weights * sizeof(BF16);
  gate->tile_b1 = reinterpret_cast<const float*>(base + 2 * weights * sizeof(BF16));
  gate->tile_b2 = gate->tile_b1 + units;
  stream.Copy(gate->tile_memory.data(), host.data(), bytes);
  return stream.Synchronize();
}

}  // namespace

void Silu(Stream& stream, TensorView x) {
  if (x.elements() == 0) return;
  gpu::Launch({dim3(Blocks(x.elements(), kThreads)), dim3(kThreads), 0, NativeHandle(stream)},
              SiluElements, x.as<float>(), x.elements());
}

void GeluAndMul(Stream& stream, ConstTensorView gate_up, TensorView out) {
  if (out.elements() == 0) return;
  gpu::Launch({dim3(Blocks(out.elements(), kThreads)), dim3(kThreads), 0, NativeHandle(stream)},
              GeluAndMulElements, gate_up.as<float>(), out.as<float>(), out.dim(1), out.elements());
}

void L2Normalize(Stream& stream, TensorView x, int64_t dim, float eps) {
  const int64_t vectors = x.elements() / dim;
  if (vectors == 0) return;
  gpu::Launch({dim3(Blocks(vectors, kWarps)), dim3(kThreads), 0, NativeHandle(stream)},
              NormalizeVectors, x.as<float>(), vectors, static_cast<int>(dim), eps);
}

void MolStore(Stream& stream, const MolShape& shape, ConstTensorView components,
              ConstTensorView gates, ConstTensorView slots, const MolTableView& table) {
  if (slots.dim(0) == 0) return;
  const int64_t element = table.storage == MolStorage::kF32    ? 4
                          : table.storage == MolStorage::kBF16 ? 2
                                                               : 1;
  StoreArguments a{.components = components.as<float>(),
                   .gates = gates.as<float>(),
                   .slots = slots.as<int32_t>(),
                   .count = slots.dim(0),
                   .item_components = static_cast<int>(shape.item_components),
                   .dim = static_cast<int>(shape.component_dim),
                   .gate_width = static_cast<int>(shape.gate_width()),
                   .shift = MolShift(table.storage, shape.component_dim),
                   .gate_shift = MolShift(table.storage, shape.gate_width()),
                   .parts = static_cast<int>(shape.item_components) + 1,
                   .storage = table.storage,
                   .vector_bytes = static_cast<int>(shape.component_dim * kLanes * element),
                   .gate_bytes = static_cast<int>(shape.gate_width() * kLanes * element),
                   .to_components = static_cast<char*>(table.components),
                   .to_means = static_cast<char*>(table.means),
                   .scales = reinterpret_cast<__nv_bfloat16*>(table.scales),
                   .mean_scales = reinterpret_cast<__nv_bfloat16*>(table.mean_scales),
                   .gate_scales = reinterpret_cast<__nv_bfloat16*>(table.gate_scales),
                   .to_gates = static_cast<char*>(table.gates)};
  if (table.means != nullptr) ++a.parts;
  gpu::Launch({dim3(Blocks(a.count * a.parts, kWarps)), dim3(kThreads), 0, NativeHandle(stream)},
              StoreItems, a);
}

absl::StatusOr<std::unique_ptr<MolGateWeights>> PackMolGate(Stream& stream, const MolShape& shape,
                                                            const MolGateTensors& tensors) {
  const int64_t l = shape.logits(), h = shape.cross_hidden;
  auto packed = std::make_unique<CudaMolGate>();
  packed->shape = shape;
  packed->hidden_tiles = ((h > 0 ? h : l) + kMolHiddenTile - 1) / kMolHiddenTile;
  const int64_t hidden = packed->hidden_tiles * kMolHiddenTile;
  // W1, W2, b1, b2: 16-byte pieces up to b2.
  std::vector<float> host(2 * hidden * l + hidden + l);
  float *w1 = host.data(), *w2 = w1 + hidden * l, *b1 = w2 + hidden * l, *b2 = b1 + hidden;
  if (tensors.w1) PackTiles(tensors.w1, /*columns=*/false, packed->hidden_tiles, w1);
  PackTiles(tensors.w2, /*columns=*/true, packed->hidden_tiles, w2);
  if (tensors.b1) std::copy_n(tensors.b1.as<float>(), h, b1);
  if (tensors.b2) std::copy_n(tensors.b2.as<float>(), l, b2);
  packed->bytes = static_cast<int64_t>(host.size() * sizeof(float));
  ASSIGN_OR_RETURN(packed->memory, stream.device().Allocate(packed->bytes));
  const auto* base = static_cast<const float*>(packed->memory.data());
  packed->w1 = base;
  packed->w2 = base + (w2 - host.data());
  packed->b1 = base + (b1 - host.data());
  packed->b2 = base + (b2 - host.data());
  stream.Copy(packed->memory.data(), host.data(), packed->bytes);
  RETURN_IF_ERROR(stream.Synchronize());
  RETURN_IF_ERROR(PackTileGate(stream, tensors, packed.get()));
  return std::unique_ptr<MolGateWeights>(std::move(packed));
}

}  // namespace trireme::cuda
