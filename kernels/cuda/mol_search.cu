// MoL's search ops: what they scan, and the order it happens in. The scans are mol_tiles.cu's and
// mol_lanes.cu's; here is also the first stage by the mean, which is a plain dot product.
#include <optional>

#include "kernels/cuda/mol_tiles.cuh"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

int64_t Padded(int64_t dim) { return (dim + kMolQueryStep - 1) / kMolQueryStep * kMolQueryStep; }
// [vectors, dim] as [vectors, padded], filled up with zeros.
__global__ void PadVectors(const float* from, int64_t elements, int dim, int padded, float* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int k = static_cast<int>(i % padded);
  to[i] = k < dim ? from[i / padded * dim + k] : 0.0f;
}

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

// A lane an item: the sum of its vectors' dot products with the query's one, kMolQueryTile queries
// at a time. Here item_components are the table's vectors of an item, query_components 1.
template <typename T>
__global__ void __launch_bounds__(kThreads) AverageScan(MolScanArguments a) {
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
        LaneDots(static_cast<const T*>(a.components) + vector * a.dim * kMolLanes + lane, a.dim,
                 a.queries + int64_t{query} * a.padded_dim, a.padded_dim, count, sums);
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

__global__ void ClearCounters(MolCounters* counters) { *counters = {}; }

// Where everything lies that an op works in.
struct ScanMemory {
  ScanMemory(const Stream& stream, const MolShape& shape, const MolScanSize& size, void* data)
      : workspace(data), counters(workspace.Take<MolCounters>(1)) {
    const bool average = size.op == MolScanOp::kAverage;
    const MolTiling tiling = average ? MolTiling() : TilingOf(shape, size.storage);
    if (tiling.columns > 0) {
      tiles.emplace(workspace, tiling, shape, size.batch);
    } else {
      const int64_t vectors = average ? 1 : shape.query_components;
      queries = workspace.Take<float>(size.batch * vectors * Padded(shape.component_dim));
    }
    const int64_t lists = size.op == MolScanOp::kLogits ? shape.logits() : 1;
    topk.emplace(workspace, size.batch * lists, size.k, size.items);
    if (average || tiling.columns > 0) return;
    lanes = workspace.Take<float>(MolLaneFloats(stream, shape.logits(), topk->longest));
  }

  Workspace workspace;
  MolCounters* counters;
  std::optional<MolTileQueries> tiles;  // where the tensor cores take the head
  float* queries = nullptr;             // else
  std::optional<MolTopKMemory> topk;
  float* lanes = nullptr;
};

// What the ops have in common: arguments, the queries as the kernels want them, counters.
class Scan {
 public:
  Scan(Stream& stream, const MolShape& shape, const MolScanSize& size, const MolQueries& queries,
       const MolTableView& table, const TensorView& workspace, const MolScanCounts* counts)
      : stream_(stream),
        batch_(size.batch),
        storage_(size.storage),
        memory_(stream, shape, size, workspace.data) {
    a_.query_components = static_cast<int>(shape.query_components);
    a_.item_components = static_cast<int>(shape.item_components);
    a_.dim = static_cast<int>(shape.component_dim);
    a_.padded_dim = static_cast<int>(Padded(shape.component_dim));
    a_.logits = static_cast<int>(shape.logits());
    a_.gate_width = static_cast<int>(shape.gate_width());
    a_.cross_hidden = static_cast<int>(shape.cross_hidden);
    a_.diagonal = shape.pairing == MolPairing::kDiagonal;
    a_.concat = shape.gating == MolGating::kConcatRelu;
    a_.inverse_temperature = 1.0f / shape.temperature;
    a_.components = table.components;
    a_.gates = table.gates;
    a_.scales = reinterpret_cast<const __nv_bfloat16*>(table.scales);
    a_.gate_scales = reinterpret_cast<const __nv_bfloat16*>(table.gate_scales);
    a_.order = table.order;
    a_.queries = memory_.queries;
    a_.query_gates = queries.gates.as<float>();
    a_.batch = static_cast<int>(batch_);
    a_.lane_memory = memory_.lanes;
    if (counts == nullptr) return;
    a_.counters = memory_.counters;
    gpu::Launch({dim3(1), dim3(1), 0, handle()}, ClearCounters, a_.counters);
  }

  // The queries, for the tensor cores or the lanes.
  void Take(const MolShape& shape, const MolQueries& queries) {
    if (memory_.tiles) return memory_.tiles->Fill(stream_, shape, queries);
    const int64_t elements = batch_ * a_.query_components * a_.padded_dim;
    if (elements == 0) return;
    gpu::Launch({dim3(Blocks(elements, kThreads)), dim3(kThreads), 0, handle()}, PadVectors,
                queries.components.as<float>(), elements, a_.dim, a_.padded_dim, memory_.queries);
  }
  // One vector a query, for tables with `vectors` vectors an item.
  void AverageQueries(const MolQueries& queries, int64_t vectors) {
    const int64_t elements = batch_ * a_.padded_dim;
    const auto divisor = static_cast<float>(a_.query_components * vectors);
    if (elements == 0) return;
    gpu::Launch({dim3(Blocks(elements, kThreads)), dim3(kThreads), 0, handle()}, SumComponents,
                queries.components.as<float>(), elements, a_.query_components, a_.dim,
                a_.padded_dim, divisor, memory_.queries);
    a_.query_components = 1;
    a_.item_components = static_cast<int>(vectors);
  }
  void Use(const MolGateWeights& weights) {
    const auto& gate = static_cast<const CudaMolGate&>(weights);
    a_.w1 = gate.w1, a_.b1 = gate.b1, a_.w2 = gate.w2, a_.b2 = gate.b2;
    a_.hidden_tiles = static_cast<int>(gate.hidden_tiles);
    gate_ = &gate;
  }
  void Use(const MolAllowed& allowed) {
    a_.masks = allowed.masks.as<uint32_t>();
    a_.mask_words = allowed.masks.dim(1);
    a_.query_mask = allowed.query_mask.as<int32_t>();
    a_.excluded_begin = allowed.excluded_begin.as<int32_t>();
    a_.excluded = allowed.excluded.as<int32_t>();
  }

  // launch(arguments of a piece) for all items; then the answer.
  template <typename Launch>
  void Run(const MolTopK& topk, Launch&& launch) {
    MolTopKScan scan(stream_, *memory_.topk);
    a_.lists = memory_.topk->view;
    if (batch_ > 0) {
      scan.Run([&](int64_t begin, int64_t end) {
        a_.begin = begin, a_.end = end;
        launch(a_);
      });
    }
    scan.Write(topk);
  }
  void AddCounts(MolScanCounts* counts) {
    if (counts == nullptr) return;
    MolCounters found;
    stream_.Copy(&found, memory_.counters, sizeof(found));
    if (!stream_.Synchronize().ok()) return;  // the stream's next user hears of it too
    counts->pairs += static_cast<int64_t>(found.pairs);
    counts->gated += static_cast<int64_t>(found.gated);
    counts->not_finite += static_cast<int64_t>(found.not_finite);
  }

  void LaunchScan(const MolScanArguments& a, bool prune) {
    memory_.tiles ? LaunchMolTileScan(stream_, prune, TileArguments(a))
                  : LaunchMolLaneScan(stream_, storage_, prune, a);
  }
  void LaunchLogits(const MolScanArguments& a) {
    memory_.tiles ? LaunchMolTileLogits(stream_, TileArguments(a))
                  : LaunchMolLaneLogits(stream_, storage_, a);
  }

  MolScanArguments& arguments() { return a_; }

 private:
  gpu::StreamHandle handle() const { return NativeHandle(stream_); }
  MolTileArguments TileArguments(const MolScanArguments& a) const {
    MolTileArguments tiles = {};
    tiles.scan = a;
    tiles.tiling = memory_.tiles->tiling;
    tiles.int8 = storage_ == MolStorage::kInt8;
    tiles.queries = memory_.tiles->fragments;
    tiles.query_gates = memory_.tiles->gates;
    if (gate_ == nullptr) return tiles;
    tiles.w1 = static_cast<const uint4*>(gate_->tile_w1);
    tiles.w2 = static_cast<const uint4*>(gate_->tile_w2);
    tiles.b1 = gate_->tile_b1;
    tiles.b2 = gate_->tile_b2;
    return tiles;
  }

  Stream& stream_;
  const int64_t batch_;
  const MolStorage storage_;
  const ScanMemory memory_;
  const CudaMolGate* gate_ = nullptr;
  MolScanArguments a_ = {};
};

MolScanSize SizeOf(MolScanOp op, const MolQueries& queries, const MolTableView& table,
                   const MolTopK& topk) {
  return {op, table.storage, queries.components.dim(0), table.slots, topk.keys.dim(1)};
}

}  // namespace

int64_t MolWorkspaceBytes(const Stream& stream, const MolShape& shape, const MolScanSize& size) {
  return ScanMemory(stream, shape, size, nullptr).workspace.bytes();
}

void MolSearch(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
               const MolTableView& table, const MolAllowed& allowed, bool prune,
               const MolTopK& topk, TensorView workspace, MolScanCounts* counts) {
  Scan scan(stream, gate.shape, SizeOf(MolScanOp::kSearch, queries, table, topk), queries, table,
            workspace, counts);
  scan.Take(gate.shape, queries);
  scan.Use(gate);
  scan.Use(allowed);
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchScan(a, prune); });
  scan.AddCounts(counts);
}

void MolAverageTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                    const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                    TensorView workspace, MolScanCounts* counts) {
  Scan scan(stream, shape, SizeOf(MolScanOp::kAverage, queries, table, topk), queries, table,
            workspace, counts);
  const bool means = table.means != nullptr;
  scan.AverageQueries(queries, means ? 1 : shape.item_components);
  scan.Use(allowed);
  if (means) {
    scan.arguments().components = table.means;
    scan.arguments().scales = reinterpret_cast<const __nv_bfloat16*>(table.mean_scales);
  }
  const int64_t most = int64_t{8} * stream.device().spec().multiprocessors;
  scan.Run(topk, [&](const MolScanArguments& a) {
    const int64_t blocks = std::min<int64_t>(most, Blocks(a.end - a.begin, kWarps * kMolLanes));
    DispatchMolStorage(table.storage, [&](auto zero) {
      gpu::Launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, NativeHandle(stream)},
                  AverageScan<decltype(zero)>, a);
    });
  });
  scan.AddCounts(counts);
}

void MolLogitTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                  const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                  TensorView workspace, MolScanCounts* counts) {
  Scan scan(stream, shape, SizeOf(MolScanOp::kLogits, queries, table, topk), queries, table,
            workspace, counts);
  scan.Take(shape, queries);
  scan.Use(allowed);
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchLogits(a); });
  scan.AddCounts(counts);
}

void MolRescore(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
                const MolTableView& table, ConstTensorView candidates_begin,
                ConstTensorView candidates, const MolTopK& topk, TensorView workspace,
                MolScanCounts* counts) {
  MolScanSize size = SizeOf(MolScanOp::kRescore, queries, table, topk);
  size.items = candidates.dim(0);
  Scan scan(stream, gate.shape, size, queries, table, workspace, counts);
  scan.Take(gate.shape, queries);
  scan.Use(gate);
  scan.arguments().candidates_begin = candidates_begin.as<int32_t>();
  scan.arguments().candidates = candidates.as<int32_t>();
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchScan(a, /*prune=*/true); });
  scan.AddCounts(counts);
}

}  // namespace trireme::cuda
