// MoL's search ops: what they scan, and the order it happens in. The scans are mol_tiles.cu's,
// mol_lanes.cu's and mol_average.cu's.
#include <optional>

#include "kernels/cuda/mol_average.cuh"
#include "kernels/cuda/mol_candidates.cuh"

namespace trireme::cuda {
namespace {

constexpr int kThreads = 128;

// [vectors, dim] as [vectors, padded], filled up with zeros.
__global__ void PadVectors(const float* from, int64_t elements, int dim, int padded, float* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int k = static_cast<int>(i % padded);
  to[i] = k < dim ? from[i / padded * dim + k] : 0.0f;
}

// Where everything lies that an op works in.
struct ScanMemory {
  ScanMemory(const Stream& stream, const MolShape& shape, const MolScanSize& size, void* data)
      : workspace(data) {
    const bool average = size.op == MolScanOp::kAverage;
    const MolTiling tiling = average ? MolTiling() : TilingOf(shape, size.storage);
    if (average) {
      means.emplace(workspace, shape, size.storage, size.batch);
    } else if (tiling.columns > 0) {
      tiles.emplace(workspace, tiling, shape, size.batch);
    } else {
      queries = workspace.Take<float>(size.batch * shape.query_components *
                                      MolPadded(shape.component_dim));
    }
    const int64_t lists = size.op == MolScanOp::kLogits ? shape.logits() : 1;
    topk.emplace(workspace, size.batch * lists, size.k, size.items);
    if (average || tiling.columns > 0) return;
    lanes = workspace.Take<float>(MolLaneFloats(stream, shape.logits(), topk->longest));
  }

  Workspace workspace;
  std::optional<MolMeanQueries> means;  // of kAverage; others
  std::optional<MolTileQueries> tiles;  // where the tensor cores take the head,
  float* queries = nullptr;             // and else
  std::optional<MolTopKMemory> topk;
  float* lanes = nullptr;
};

// What the ops have in common: arguments, and the queries as the kernels want them.
class Scan {
 public:
  Scan(Stream& stream, const MolShape& shape, const MolScanSize& size, const MolQueries& queries,
       const MolTableView& table, const TensorView& workspace, const TensorView& counts)
      : stream_(stream),
        batch_(size.batch),
        storage_(size.storage),
        memory_(stream, shape, size, workspace.data) {
    a_.query_components = static_cast<int>(shape.query_components);
    a_.item_components = static_cast<int>(shape.item_components);
    a_.dim = static_cast<int>(shape.component_dim);
    a_.padded_dim = static_cast<int>(MolPadded(shape.component_dim));
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
    a_.shift = MolShift(storage_, shape.component_dim);
    a_.gate_shift = MolShift(storage_, shape.gate_width());
    a_.queries = memory_.queries;
    a_.query_gates = queries.gates.as<float>();
    a_.batch = static_cast<int>(batch_);
    a_.lane_memory = memory_.lanes;
    a_.counters = counts.as<MolCounters>();
  }

  // The queries, for the tensor cores or the lanes.
  void Take(const MolShape& shape, const MolQueries& queries) {
    if (memory_.tiles) return memory_.tiles->Fill(stream_, shape, queries);
    const int64_t elements = batch_ * a_.query_components * a_.padded_dim;
    if (elements == 0) return;
    gpu::Launch({dim3(Blocks(elements, kThreads)), dim3(kThreads), 0, handle()}, PadVectors,
                queries.components.as<float>(), elements, a_.dim, a_.padded_dim, memory_.queries);
  }
  // Their means, for tables with `vectors` vectors an item.
  void TakeMeans(const MolShape& shape, const MolQueries& queries, int64_t vectors) {
    memory_.means->Fill(stream_, shape, queries, vectors);
    a_.query_components = 1;
    a_.item_components = static_cast<int>(vectors);
    a_.queries = memory_.means->means;
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
  void LaunchScan(const MolScanArguments& a, bool prune) {
    memory_.tiles ? LaunchMolTileScan(stream_, prune, TileArguments(a))
                  : LaunchMolLaneScan(stream_, storage_, prune, a);
  }
  void LaunchLogits(const MolScanArguments& a) {
    memory_.tiles ? LaunchMolTileLogits(stream_, TileArguments(a))
                  : LaunchMolLaneLogits(stream_, storage_, a);
  }

  void LaunchAverage(const MolScanArguments& a) {
    LaunchMolAverage(stream_, storage_, *memory_.means, a);
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
  if (size.op == MolScanOp::kCandidates) {
    Workspace workspace(nullptr);
    MolMaps(workspace, size.batch, size.items);
    return workspace.bytes();
  }
  return ScanMemory(stream, shape, size, nullptr).workspace.bytes();
}

void MolSearch(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
               const MolTableView& table, const MolAllowed& allowed, bool prune,
               const MolTopK& topk, TensorView workspace, TensorView counts) {
  Scan scan(stream, gate.shape, SizeOf(MolScanOp::kSearch, queries, table, topk), queries, table,
            workspace, counts);
  scan.Take(gate.shape, queries);
  scan.Use(gate);
  scan.Use(allowed);
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchScan(a, prune); });
}

void MolAverageTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                    const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                    TensorView workspace, TensorView counts) {
  Scan scan(stream, shape, SizeOf(MolScanOp::kAverage, queries, table, topk), queries, table,
            workspace, counts);
  const bool means = table.means != nullptr;
  scan.TakeMeans(shape, queries, means ? 1 : shape.item_components);
  scan.Use(allowed);
  if (means) {
    scan.arguments().components = table.means;
    scan.arguments().scales = reinterpret_cast<const __nv_bfloat16*>(table.mean_scales);
  }
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchAverage(a); });
}

void MolLogitTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                  const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                  TensorView workspace, TensorView counts) {
  Scan scan(stream, shape, SizeOf(MolScanOp::kLogits, queries, table, topk), queries, table,
            workspace, counts);
  scan.Take(shape, queries);
  scan.Use(allowed);
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchLogits(a); });
}

void MolRescore(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
                const MolTableView& table, ConstTensorView candidates_begin,
                ConstTensorView candidates, const MolTopK& topk, TensorView workspace,
                TensorView counts) {
  MolScanSize size = SizeOf(MolScanOp::kRescore, queries, table, topk);
  size.items = candidates.dim(0);
  Scan scan(stream, gate.shape, size, queries, table, workspace, counts);
  scan.Take(gate.shape, queries);
  scan.Use(gate);
  scan.arguments().candidates_begin = candidates_begin.as<int32_t>();
  scan.arguments().candidates = candidates.as<int32_t>();
  scan.Run(topk, [&](const MolScanArguments& a) { scan.LaunchScan(a, /*prune=*/true); });
}

}  // namespace trireme::cuda
