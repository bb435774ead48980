// The first stage by the mean. Tables of bf16 and int8 go to the tensor cores with queries split
// into three bf16 numbers each, whose sum is the query in f32: items are bf16 numbers as they are,
// products are exact and sums f32, so that the lists are those of an f32 dot product, not of a
// rounded query. Three products for one leave it bound by the table's bytes up to some 30 queries.
#include "kernels/cuda/mol_average.cuh"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kColumns = 8;  // queries of a tile

// Sum of a query's components over `divisor`, [batch, padded].
__global__ void SumComponents(const float* from, int64_t elements, int components, int dim,
                              int padded, float divisor, float* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int k = static_cast<int>(i % padded);
  float sum = 0.0f;
  for (int n = 0; n < components && k < dim; ++n) {
    sum = __fadd_rn(sum, from[(i / padded * components + n) * dim + k] / divisor);
  }
  to[i] = sum;
}

// What is left of x after `split` bf16 numbers were taken from it.
__device__ inline float Remainder(float x, int split) {
  for (int s = 0; s < split; ++s) x = __fadd_rn(x, -Float(Rounded<__nv_bfloat16>(x)));
  return x;
}

// A thread a lane of a fragment.
__global__ void SplitMeans(const float* means, int batch, int dim, int padded, int tiles,
                           int64_t lanes, uint2* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= lanes) return;
  const int steps = dim / 16, lane = static_cast<int>(i % 32);
  const int step = static_cast<int>(i / 32 % steps);
  const int tile = static_cast<int>(i / (32 * steps) % tiles);
  const int split = static_cast<int>(i / (int64_t{32} * steps * tiles));
  const int query = tile * kColumns + lane / 4;
  uint32_t words[2] = {0, 0};
  if (query < batch) {
    const float* x = means + int64_t{query} * padded + step * 16 + lane % 4 * 2;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      words[w] = gpu::RoundedPair(Remainder(x[w * 8], split), Remainder(x[w * 8 + 1], split),
                                  __nv_bfloat16());
    }
  }
  to[i] = make_uint2(words[0], words[1]);
}

// Two neighbouring values of an item as bf16.
__device__ inline uint32_t PairAt(const __nv_bfloat16* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
__device__ inline uint32_t PairAt(const int8_t* p) {
  const auto pair = *reinterpret_cast<const Pack<int8_t, 2>*>(p);
  return gpu::RoundedPair(Float(pair.v[0]), Float(pair.v[1]), __nv_bfloat16());
}

// Offers a block's dot products: of 16 rows, a thread those of two rows and two columns.
struct AverageOffer {
  const MolScanArguments& a;
  int first_query;
  int64_t block;
  uint32_t mask;  // lane q < 8: of the tile's query q
  __device__ void operator()(int rows, const float (&totals)[4], MolTally& tally) const {
    const int lane = gpu::LaneId();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = lane % 4 * 2 + i % 2, item = rows + lane / 4 + i / 2 * 8;
      const uint32_t own = __shfl_sync(0xffffffffu, mask, column);
      if ((own >> item & 1) == 0) continue;
      ++tally.pairs;
      const int slot = static_cast<int>(block * kMolLanes) + item;
      if (IsFinite(totals[i])) {
        Offer(a.lists, first_query + column, KeyOf(totals[i], a.order[slot]), slot);
      }
    }
  }
};

// A warp a block of items, against eight queries at a time. A pair's sums are one chain of mma over
// the dimension, whichever row and column it has.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    AverageTiles(MolScanArguments a, const uint2* queries, int tiles) {
  const int lane = gpu::LaneId(), steps = a.dim / 16;
  MolTally tally;
  for (int64_t block = a.begin / kMolLanes + int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
       block * kMolLanes < a.end; block += int64_t{gridDim.x} * kWarps) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int own = tile * kColumns + lane;
      const uint32_t mask = lane < kColumns && own < a.batch ? MaskWord(a, own, block) : 0;
      if (__ballot_sync(0xffffffffu, mask != 0) == 0) continue;
      float totals[2][4] = {};
      for (int m = 0; m < a.item_components; ++m) {
        const int64_t vector = block * a.item_components + m;
        const T* from = static_cast<const T*>(a.components) + vector * a.dim * kMolLanes;
        float sums[2][4] = {};
        for (int step = 0; step < steps; ++step) {
          uint32_t x[2][4];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              x[r][i] = PairAt(from + PlaceOf(step * 16 + i / 2 * 8 + lane % 4 * 2,
                                              r * 16 + i % 2 * 8 + lane / 4, a.shift));
            }
          }
#pragma unroll
          for (int split = 0; split < kMolSplits; ++split) {
            const uint2 q = queries[((split * tiles + tile) * steps + step) * 32 + lane];
            const uint32_t b[2] = {q.x, q.y};
#pragma unroll
            for (int r = 0; r < 2; ++r) gpu::Mma(sums[r], x[r], b, __nv_bfloat16());
          }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float scale = 1.0f;
            if constexpr (sizeof(T) == 1) {
              scale = Float(a.scales[vector * kMolLanes + r * 16 + i / 2 * 8 + lane / 4]);
            }
            totals[r][i] = __fadd_rn(totals[r][i], __fmul_rn(sums[r][i], scale));
          }
        }
      }
      const AverageOffer offer{a, tile * kColumns, block, mask};
      offer(0, totals[0], tally);
      offer(16, totals[1], tally);
    }
  }
  tally.AddTo(a.counters);
}

// Any head: a lane an item, kMolQueryTile queries at a time, fp32.
template <typename T>
__global__ void __launch_bounds__(kThreads) AverageLanes(MolScanArguments a) {
  const int lane = gpu::LaneId();
  MolTally tally;
  for (int64_t first = a.begin + (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kMolLanes;
       first < a.end; first += int64_t{gridDim.x} * kWarps * kMolLanes) {
    const int slot = static_cast<int>(first) + lane;
    for (int query = 0; query < a.batch; query += kMolQueryTile) {
      const int count = min(kMolQueryTile, a.batch - query);
      float totals[kMolQueryTile] = {};
      for (int m = 0; m < a.item_components; ++m) {
        const int64_t vector = first / kMolLanes * a.item_components + m;
        float sums[kMolQueryTile];
        LaneDots(static_cast<const T*>(a.components) + vector * a.dim * kMolLanes, lane, a.shift,
                 a.dim, a.queries + int64_t{query} * a.padded_dim, a.padded_dim, count, sums);
        float scale = 1.0f;
        if constexpr (sizeof(T) == 1) scale = Float(a.scales[vector * kMolLanes + lane]);
#pragma unroll
        for (int i = 0; i < kMolQueryTile; ++i) {
          totals[i] = __fadd_rn(totals[i], __fmul_rn(sums[i], scale));
        }
      }
#pragma unroll
      for (int i = 0; i < kMolQueryTile; ++i) {
        if (i >= count) break;
        if ((MaskWord(a, query + i, first / kMolLanes) >> lane & 1) == 0) continue;
        ++tally.pairs;
        if (IsFinite(totals[i])) {
          Offer(a.lists, query + i, KeyOf(totals[i], a.order[slot]), slot);
        }
      }
    }
  }
  tally.AddTo(a.counters);
}

int64_t Lanes(const MolMeanQueries& queries, int64_t dim) {
  return int64_t{kMolSplits} * queries.tiles * (dim / 16) * 32;
}

}  // namespace

MolMeanQueries::MolMeanQueries(Workspace& workspace, const MolShape& shape, MolStorage storage,
                               int64_t batch_in)
    : batch(batch_in) {
  const int64_t dim = shape.component_dim;
  if (storage != MolStorage::kF32 && dim % 16 == 0) {
    tiles = static_cast<int>((batch + kColumns - 1) / kColumns);
  }
  means = workspace.Take<float>(batch * MolPadded(dim));
  splits = workspace.Take<uint2>(Lanes(*this, dim));
}

void MolMeanQueries::Fill(Stream& stream, const MolShape& shape, const MolQueries& queries,
                          int64_t vectors) const {
  const int dim = static_cast<int>(shape.component_dim), padded = static_cast<int>(MolPadded(dim));
  const int64_t elements = batch * padded, lanes = Lanes(*this, dim);
  if (elements == 0) return;
  gpu::Launch({dim3(Blocks(elements, kThreads)), dim3(kThreads), 0, NativeHandle(stream)},
              SumComponents, queries.components.as<float>(), elements,
              static_cast<int>(shape.query_components), dim, padded,
              static_cast<float>(shape.query_components * vectors), means);
  if (lanes == 0) return;
  gpu::Launch({dim3(Blocks(lanes, kThreads)), dim3(kThreads), 0, NativeHandle(stream)}, SplitMeans,
              means, static_cast<int>(batch), dim, padded, tiles, lanes, splits);
}

void LaunchMolAverage(Stream& stream, MolStorage storage, const MolMeanQueries& queries,
                      const MolScanArguments& a) {
  const int64_t most = int64_t{8} * stream.device().spec().multiprocessors;
  const int64_t blocks = std::min<int64_t>(most, Blocks(a.end - a.begin, kWarps * kMolLanes));
  const gpu::Config config{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                           NativeHandle(stream)};
  DispatchMolStorage(storage, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < 4) {
      if (queries.tiles > 0) {
        return gpu::Launch(config, AverageTiles<T>, a, queries.splits, queries.tiles);
      }
    }
    gpu::Launch(config, AverageLanes<T>, a);
  });
}

}  // namespace trireme::cuda
