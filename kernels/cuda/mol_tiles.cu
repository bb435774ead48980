// MoL's scans on the tensor cores, for tables of bf16 or int8. The items of a tile are the rows of
// the dot products, the query's components their columns, so that a row's sums over all item
// components are the pair's logits and lie in the registers as the next product's operand: both
// layers of the gate follow without shared memory in between. Logits stay in fp32 for the score and
// are rounded to bf16 for the gate, as are queries and hidden units. The sums of a row are one
// chain of mma whatever row it is, so a score's bits do not depend on where the pair is gated.
#include "kernels/cuda/mol_tile_warp.cuh"

namespace trireme::cuda {
namespace {

using namespace mol_tile;

template <int kTiles, Mode kMode>
__global__ void __launch_bounds__(kThreads, 1) TileScan(MolTileArguments a) {
  GPU_DYNAMIC_SHARED(memory, unsigned char);
  constexpr int kCount = kQueries<kTiles>;
  const MolScanArguments& scan = a.scan;
  const int vectors = scan.item_components * scan.dim;
  const int64_t end = EndOf(scan);
  const int tile_bytes = vectors * kItemBytes * a.tiling.blocks;
  const int weights = a.tiling.hidden * kTiles;  // pieces of 16 bytes, of each layer
  uint4* w1 = reinterpret_cast<uint4*>(memory + 2 * tile_bytes);
  uint4* w2 = w1 + weights;
  auto* queues = reinterpret_cast<Queue<kTiles>*>(w2 + weights);
  if constexpr (kMode != Mode::kLogits) {
    for (int i = threadIdx.x; i < weights; i += kThreads) {
      w1[i] = a.w1[i];
      w2[i] = a.w2[i];
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = gpu::LaneId();
  // A warp has its 16 rows of the tile and shares the queries with others.
  const int groups = a.tiling.blocks * 2, group = warp % groups, half = group % 2;
  TileWarp<kTiles, kMode> worker(a, w1, w2, queues + warp);
  const TileLoader loader(a, vectors, end);
  const int64_t tile_items = int64_t{a.tiling.blocks} * kMolLanes;
  const int64_t stride = int64_t{gridDim.x} * tile_items;
  int64_t first = scan.begin + blockIdx.x * tile_items;
  if (first < end) loader.Load(first, memory);
  for (int stage = 0; first < end; first += stride, stage ^= 1) {
    gpu::CpAsyncWait<0>();
    __syncthreads();  // the tile is here, and all are done with the one before
    if (first + stride < end) {
      loader.Load(first + stride, memory + (stage ^ 1) * tile_bytes);
    }
    const int64_t begin = first + group / 2 * kMolLanes;  // of the warp's block
    if (begin >= end) continue;
    const unsigned char* tile = memory + stage * tile_bytes + group / 2 * vectors * kItemBytes;
    // The block's queries, and the slots of this thread's rows.
    int query = 0, queries_end = scan.batch, own_query = -1;
    int slots[2];
    if (scan.candidates == nullptr) {
      slots[0] = static_cast<int>(begin) + half * kRows + lane / 4;
      slots[1] = slots[0] + 8;
    } else {
      for (int h = 0; h < 2; ++h) {
        slots[h] = scan.candidates[min(begin + half * kRows + lane / 4 + h * 8, end - 1)];
      }
      if (begin + lane < end) {
        own_query = LastNotAbove(scan.candidates_begin, scan.batch, begin + lane);
      }
      query = LastNotAbove(scan.candidates_begin, scan.batch, begin);
      queries_end =
          LastNotAbove(scan.candidates_begin, scan.batch, min(begin + kMolLanes, end) - 1) + 1;
    }
    for (query += warp / groups * kCount; query < queries_end; query += kWarps / groups * kCount) {
      int queries[kCount];
      uint32_t masks[kCount], any = 0;
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        queries[q] = min(query + q, queries_end - 1);
        masks[q] = 0;
        if (query + q >= queries_end) continue;
        masks[q] = scan.candidates != nullptr ? __ballot_sync(0xffffffffu, own_query == query + q)
                                              : MaskWord(scan, query + q, begin / kMolLanes);
        any |= masks[q] >> (half * kRows) & 0xffffu;
      }
      if (any != 0) worker.Step(tile, half, slots, queries, masks);
    }
  }
  worker.Finish();
}

// Fragments as MolTileArguments says; a thread a lane of one.
__global__ void PackQueries(const float* components, const float* gates, int64_t batch,
                            int query_components, int item_components, int dim, int tiles,
                            int columns, uint2* fragments, float* to_gates) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int steps = dim / 16;
  if (i < batch * columns) {
    const int column = static_cast<int>(i % columns);
    const int m = column / (8 * tiles), n = column % (8 * tiles);
    const bool pair = m < item_components && n < query_components;
    to_gates[i] =
        pair ? gates[i / columns * query_components * item_components + n * item_components + m]
             : 0.0f;
  }
  if (i >= batch * tiles * steps * 32) return;
  const int lane = static_cast<int>(i % 32), step = static_cast<int>(i / 32 % steps);
  const int n = static_cast<int>(i / (32 * steps) % tiles) * 8 + lane / 4;
  const int64_t query = i / (int64_t{32} * steps * tiles);
  uint32_t words[2] = {0, 0};
  if (n < query_components) {
    const float* x = components + (query * query_components + n) * dim + step * 16 + lane % 4 * 2;
    words[0] = gpu::RoundedPair(x[0], x[1], __nv_bfloat16());
    words[1] = gpu::RoundedPair(x[8], x[9], __nv_bfloat16());
  }
  fragments[i] = make_uint2(words[0], words[1]);
}

template <int kTiles, Mode kMode>
void LaunchTiles(Stream& stream, const MolTileArguments& a) {
  const int64_t vectors = int64_t{a.scan.item_components} * a.scan.dim;
  const int64_t items = int64_t{a.tiling.blocks} * kMolLanes;
  const int64_t tiles = (a.scan.end - a.scan.begin + items - 1) / items;
  const int64_t blocks = std::min<int64_t>(tiles, stream.device().spec().multiprocessors);
  gpu::Launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
               static_cast<size_t>(SharedBytes<kTiles>(a.tiling, vectors)), NativeHandle(stream)},
              TileScan<kTiles, kMode>, a);
}
template <Mode kMode>
void LaunchTiles(Stream& stream, const MolTileArguments& a) {
  a.tiling.columns > 32 ? LaunchTiles<8, kMode>(stream, a) : LaunchTiles<4, kMode>(stream, a);
}

}  // namespace

MolTiling TilingOf(const MolShape& shape, MolStorage storage) {
  MolTiling tiling;
  if (storage == MolStorage::kF32 || shape.pairing != MolPairing::kAll ||
      shape.gating != MolGating::kGluSilu || shape.cross_hidden == 0 ||
      shape.component_dim % 16 != 0) {
    return tiling;
  }
  const int64_t vectors = shape.item_components * shape.component_dim;
  const int64_t query_tiles = (shape.query_components + 7) / 8;
  const int64_t columns = shape.item_components * query_tiles * 8;
  if (columns > 64 || vectors > 1024 || shape.cross_hidden > 1024) return tiling;
  tiling.query_tiles = static_cast<int>(query_tiles);
  tiling.reciprocal = ((1 << 16) + tiling.query_tiles - 1) / tiling.query_tiles;
  tiling.hidden = static_cast<int>((shape.cross_hidden + 31) / 32 * 32);
  tiling.blocks = columns <= 32 && vectors <= 256 ? 2 : 1;
  tiling.columns = columns <= 32 ? 32 : 64;
  const int64_t bytes =
      tiling.columns > 32 ? SharedBytes<8>(tiling, vectors) : SharedBytes<4>(tiling, vectors);
  if (bytes > kSharedBytes) tiling.columns = 0;
  return tiling;
}

MolTileQueries::MolTileQueries(Workspace& workspace, const MolTiling& tiling_in,
                               const MolShape& shape, int64_t batch_in)
    : tiling(tiling_in),
      batch(batch_in),
      fragments(
          workspace.Take<uint2>(batch * tiling.query_tiles * (shape.component_dim / 16) * 32)),
      gates(workspace.Take<float>(batch * tiling.columns)) {}

void MolTileQueries::Fill(Stream& stream, const MolShape& shape, const MolQueries& queries) const {
  const int64_t work = std::max(batch * tiling.query_tiles * (shape.component_dim / 16) * 32,
                                batch * tiling.columns);
  if (work == 0) return;
  gpu::Launch({dim3(static_cast<unsigned>((work + kThreads - 1) / kThreads)), dim3(kThreads), 0,
               NativeHandle(stream)},
              PackQueries, queries.components.as<float>(), queries.gates.as<float>(), batch,
              static_cast<int>(shape.query_components), static_cast<int>(shape.item_components),
              static_cast<int>(shape.component_dim), tiling.query_tiles, tiling.columns, fragments,
              gates);
}

void LaunchMolTileScan(Stream& stream, bool prune, const MolTileArguments& a) {
  prune ? LaunchTiles<Mode::kPrune>(stream, a) : LaunchTiles<Mode::kScan>(stream, a);
}
void LaunchMolTileLogits(Stream& stream, const MolTileArguments& a) {
  LaunchTiles<Mode::kLogits>(stream, a);
}

}  // namespace trireme::cuda
