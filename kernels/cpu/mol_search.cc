// MoL's scans: blocks of 32 items shared out between threads, every query of the batch against a
// block while the block is in the cache; what survives the pruning is collected into full blocks
// for the gate. The hot loops are mol-inl.h's.
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "kernels/cpu/mol_ops.h"
#include "kernels/cpu/mol_topk.h"

namespace trireme::cpu {
namespace {

constexpr float kNoFloor = -std::numeric_limits<float>::infinity();
constexpr uint32_t kAllLanes = 0xffffffffu;

// Queries a scan takes at once: 32 x 2 KiB of components and 32 x 8 KiB of survivors (8x4x64) fill
// a third of a 1 MiB second-level cache.
constexpr int64_t kQueriesPerScan = 32;

// Blocks a thread takes at a time: at least 256 pairs of block and query, a quarter of a
// millisecond or more.
int64_t ChunkBlocks(int64_t queries) { return std::max<int64_t>(1, 256 / queries); }

// The k-th best score any thread knows of: what a score must reach. Only ever raised.
class SharedFloor {
 public:
  float Get() const { return value_.load(std::memory_order_relaxed); }
  void Raise(float to) {
    float now = Get();
    while (to > now && !value_.compare_exchange_weak(now, to, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<float> value_{kNoFloor};
};

// Lists of one search op, filled by several threads, each from its own collectors.
class TopKLists {
 public:
  TopKLists(int64_t lists, int64_t k) : k_(k), all_(lists) {}
  void Add(int64_t list, const std::vector<MolCandidate>& candidates) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_[list].insert(all_[list].end(), candidates.begin(), candidates.end());
  }
  void Write(const MolTopK& out, int64_t first_list) {
    for (size_t i = 0; i < all_.size(); ++i) {
      std::vector<MolCandidate>& list = all_[i];
      const auto count = std::min<int64_t>(k_, static_cast<int64_t>(list.size()));
      std::partial_sort(list.begin(), list.begin() + count, list.end(),
                        [](const MolCandidate& a, const MolCandidate& b) { return a.key > b.key; });
      uint64_t* keys = out.keys.row<uint64_t>(first_list + static_cast<int64_t>(i));
      int32_t* slots = out.slots.row<int32_t>(first_list + static_cast<int64_t>(i));
      for (int64_t j = 0; j < k_; ++j) {
        keys[j] = j < count ? list[j].key : 0;
        slots[j] = j < count ? list[j].slot : -1;
      }
    }
  }

 private:
  const int64_t k_;
  std::mutex mutex_;
  std::vector<std::vector<MolCandidate>> all_;
};

// Blocks to work on, for threads that take them a chunk at a time.
class BlockQueue {
 public:
  BlockQueue(int64_t blocks, int64_t chunk) : blocks_(blocks), chunk_(chunk) {}
  bool Take(int64_t* begin, int64_t* end) {
    *begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
    *end = std::min(blocks_, *begin + chunk_);
    return *begin < blocks_;
  }

 private:
  const int64_t blocks_, chunk_;
  std::atomic<int64_t> next_{0};
};

MolLogitsArgs LogitsOf(const MolShape& shape, const MolTableView& table, int64_t block) {
  const int64_t vectors = block * shape.item_components;
  MolLogitsArgs args;
  args.components = static_cast<const char*>(table.components) +
                    vectors * shape.component_dim * kMolLanes * ElementBytes(table.storage);
  if (table.scales != nullptr) args.scales = table.scales + vectors * kMolLanes;
  args.element = ElementOf(table.storage);
  args.query_components = shape.query_components;
  args.item_components = shape.item_components;
  args.dim = shape.component_dim;
  args.diagonal = shape.pairing == MolPairing::kDiagonal;
  args.inverse_temperature = 1.0f / shape.temperature;
  args.floor = kNoFloor;
  return args;
}

// What a thread needs to score pairs of one query after the other: dots, floor, gate, top-k.
class PairScorer {
 public:
  PairScorer(const PackedMolGate& gate, const MolQueries& queries, const MolTableView& table,
             int64_t first_query, int64_t count, int64_t k)
      : gate_(gate),
        shape_(gate.shape),
        queries_(queries),
        table_(table),
        first_query_(first_query),
        survivors_(count),
        logits_(shape_.logits() * kMolLanes),
        scratch_(MolGateScratchFloats(shape_.logits(), shape_.cross_hidden)) {
    collectors_.reserve(count);
    for (int64_t q = 0; q < count; ++q) collectors_.emplace_back(k);
  }

  // Scores the lanes of `mask`. `floor` (null: no pruning) is raised when this query's k-th best
  // is.
  void Score(int64_t q, int64_t block, uint32_t mask, SharedFloor* floor) {
    MolLogitsArgs args = LogitsOf(shape_, table_, block);
    args.query = queries_.components.row<float>(first_query_ + q);
    args.logits = logits_.data();
    if (floor != nullptr) args.floor = MolPruneFloor(floor->Get(), shape_.logits());
    counts_.pairs += __builtin_popcount(mask);
    mask &= BestIsa().mol_logits(args);
    if (mask == 0) return;
    if (mask == kAllLanes) {
      MolGateArgs args;
      args.item_gate = GatesOf(block);
      args.item_gate_element = ElementOf(table_.storage);
      if (table_.gate_scales != nullptr) {
        args.item_gate_scales = table_.gate_scales + block * kMolLanes;
      }
      Gate(q, logits_.data(), args);
      for (int64_t i = 0; i < kMolLanes; ++i) Push(q, block * kMolLanes + i, scores_[i], floor);
      return;
    }
    for (; mask != 0; mask &= mask - 1) Keep(q, block, __builtin_ctz(mask), floor);
  }

  // Gates what is left of a query's survivors.
  void Flush(int64_t q, SharedFloor* floor) {
    Survivors& kept = survivors_[q];
    if (kept.count == 0) return;
    MolGateArgs args;
    args.item_gate = kept.gates.data();
    Gate(q, kept.logits.data(), args);
    for (int64_t i = 0; i < kept.count; ++i) Push(q, kept.slots[i], scores_[i], floor);
    kept.count = 0;
  }

  MolTopKCollector& collector(int64_t q) { return collectors_[q]; }
  const MolScanCounts& counts() const { return counts_; }

 private:
  // Lanes waiting for a full block.
  struct Survivors {
    int64_t count = 0;
    int64_t slots[kMolLanes];
    std::vector<float> logits, gates;  // [L, 32], [G, 32]
  };

  const void* GatesOf(int64_t block) const {
    return static_cast<const char*>(table_.gates) +
           block * shape_.gate_width() * kMolLanes * ElementBytes(table_.storage);
  }
  // As the gate's loops take it.
  float GateValue(int64_t block, int64_t g, int64_t lane) const {
    const void* gates = GatesOf(block);
    const int64_t at = g * kMolLanes + lane;
    if (table_.storage == MolStorage::kF32) return static_cast<const float*>(gates)[at];
    if (table_.storage == MolStorage::kBF16) return ToFloat(static_cast<const BF16*>(gates)[at]);
    return static_cast<float>(static_cast<const int8_t*>(gates)[at]) *
           ToFloat(table_.gate_scales[block * kMolLanes + lane]);
  }

  void Keep(int64_t q, int64_t block, int64_t lane, SharedFloor* floor) {
    Survivors& kept = survivors_[q];
    const int64_t width = shape_.gate_width();
    if (kept.logits.empty()) {
      kept.logits.resize(logits_.size());
      kept.gates.resize(width * kMolLanes);
    }
    float* logits = kept.logits.data() + kept.count;
    for (int64_t l = 0; l < shape_.logits(); ++l) {
      logits[l * kMolLanes] = logits_[l * kMolLanes + lane];
    }
    float* gates = kept.gates.data() + kept.count;
    for (int64_t g = 0; g < width; ++g) gates[g * kMolLanes] = GateValue(block, g, lane);
    kept.slots[kept.count++] = block * kMolLanes + lane;
    if (kept.count == kMolLanes) Flush(q, floor);
  }

  // `args`: the items' gates alone.
  void Gate(int64_t q, const float* logits, MolGateArgs args) {
    args.logits = logits;
    args.query_gate = queries_.gates.row<float>(first_query_ + q);
    args.hidden = gate_.hidden();
    args.output = gate_.output();
    args.concat = shape_.gating == MolGating::kConcatRelu;
    args.scratch = scratch_.data();
    args.scores = scores_;
    BestIsa().mol_gate(args);
  }

  void Push(int64_t q, int64_t slot, float score, SharedFloor* floor) {
    ++counts_.gated;
    if (!std::isfinite(score)) {
      ++counts_.not_finite;
      return;
    }
    MolTopKCollector& best = collectors_[q];
    if (best.Push(MolKey(score, table_.order[slot]), static_cast<int32_t>(slot)) &&
        floor != nullptr) {
      floor->Raise(MolKeyScore(best.threshold()));
    }
  }

  const PackedMolGate& gate_;
  const MolShape& shape_;
  const MolQueries& queries_;
  const MolTableView& table_;
  const int64_t first_query_;
  std::vector<Survivors> survivors_;
  std::vector<MolTopKCollector> collectors_;
  std::vector<float> logits_, scratch_;
  float scores_[kMolLanes] = {};
  MolScanCounts counts_;
};

// Runs work(thread) on every thread that is free; `work` takes blocks until there are none.
template <typename Work>
void OnAllThreads(ThreadPool& pool, int64_t blocks, int64_t chunk, Work&& work) {
  const int64_t useful = std::min<int64_t>(pool.threads(), (blocks + chunk - 1) / chunk);
  pool.ParallelFor(useful, 1, [&](int64_t, int64_t) { work(); });
}

// Words of one query's mask, its excluded slots cleared.
class QueryMask {
 public:
  QueryMask(const MolAllowed& allowed, int64_t query)
      : words_(allowed.masks.row<uint32_t>(allowed.query_mask.as<int32_t>()[query])) {
    if (!allowed.excluded_begin) return;
    const int32_t* begin = allowed.excluded_begin.as<int32_t>();
    first_ = allowed.excluded.as<int32_t>() + begin[query];
    last_ = allowed.excluded.as<int32_t>() + begin[query + 1];
  }
  uint32_t Word(int64_t block) const {
    uint32_t word = words_[block];
    if (word == 0 || first_ == last_) return word;
    const int64_t slot = block * kMolLanes;
    for (const int32_t* at = std::lower_bound(first_, last_, slot);
         at != last_ && *at < slot + kMolLanes; ++at) {
      word &= ~(1u << (*at - slot));
    }
    return word;
  }

 private:
  const uint32_t* words_;
  const int32_t *first_ = nullptr, *last_ = nullptr;
};

std::vector<QueryMask> MasksOf(const MolAllowed& allowed, int64_t first, int64_t count) {
  std::vector<QueryMask> masks;
  for (int64_t q = 0; q < count; ++q) masks.emplace_back(allowed, first + q);
  return masks;
}

void AddCounts(const MolScanCounts& from, std::mutex& mutex, const TensorView& to) {
  if (!to) return;
  const std::lock_guard<std::mutex> lock(mutex);
  to.as<int64_t>()[0] += from.pairs;
  to.as<int64_t>()[1] += from.gated;
  to.as<int64_t>()[2] += from.not_finite;
}

// The part of a first-stage scan that both kinds share: `lists` lists a query, and
// block_work(query, block, mask, collectors of that query).
template <typename MakeWorker>
void ScanLists(Stream& stream, const MolTableView& table, const MolAllowed& allowed, int64_t batch,
               int64_t lists, const MolTopK& topk, TensorView counts, MakeWorker&& make_worker) {
  const int64_t k = topk.keys.dim(1), blocks = table.slots / kMolLanes;
  std::mutex mutex;
  for (int64_t first = 0; first < batch; first += kQueriesPerScan) {
    const int64_t count = std::min(kQueriesPerScan, batch - first), chunk = ChunkBlocks(count);
    const std::vector<QueryMask> masks = MasksOf(allowed, first, count);
    TopKLists results(count * lists, k);
    BlockQueue queue(blocks, chunk);
    OnAllThreads(PoolOf(stream), blocks, chunk, [&] {
      std::vector<MolTopKCollector> collectors(count * lists, MolTopKCollector(k));
      auto worker = make_worker();
      MolScanCounts local;
      for (int64_t begin, end; queue.Take(&begin, &end);) {
        for (int64_t block = begin; block < end; ++block) {
          for (int64_t q = 0; q < count; ++q) {
            const uint32_t mask = masks[q].Word(block);
            if (mask == 0) continue;
            local.pairs += __builtin_popcount(mask);
            worker(first + q, block, mask, &collectors[q * lists]);
          }
        }
      }
      for (int64_t i = 0; i < count * lists; ++i) results.Add(i, collectors[i].Finish());
      AddCounts(local, mutex, counts);
    });
    results.Write(topk, first * lists);
  }
}

// Pushes the finite values of the lanes of `mask`.
void PushLanes(const float* values, uint32_t mask, int64_t block, const MolTableView& table,
               MolTopKCollector* collector) {
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    const int64_t slot = block * kMolLanes + lane;
    if (!std::isfinite(values[lane])) continue;
    collector->Push(MolKey(values[lane], table.order[slot]), static_cast<int32_t>(slot));
  }
}

}  // namespace

int64_t MolWorkspaceBytes(const Stream&, const MolShape&, const MolScanSize&) { return 0; }

void MolSearch(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
               const MolTableView& table, const MolAllowed& allowed, bool prune,
               const MolTopK& topk, TensorView /*workspace*/, TensorView counts) {
  const auto& packed = static_cast<const PackedMolGate&>(gate);
  const int64_t batch = queries.components.dim(0), k = topk.keys.dim(1);
  const int64_t blocks = table.slots / kMolLanes;
  std::mutex mutex;
  for (int64_t first = 0; first < batch; first += kQueriesPerScan) {
    const int64_t count = std::min(kQueriesPerScan, batch - first), chunk = ChunkBlocks(count);
    const std::vector<QueryMask> masks = MasksOf(allowed, first, count);
    std::vector<SharedFloor> floors(count);
    TopKLists results(count, k);
    BlockQueue queue(blocks, chunk);
    OnAllThreads(PoolOf(stream), blocks, chunk, [&] {
      PairScorer scorer(packed, queries, table, first, count, k);
      const auto floor = [&](int64_t q) { return prune ? &floors[q] : nullptr; };
      for (int64_t begin, end; queue.Take(&begin, &end);) {
        for (int64_t block = begin; block < end; ++block) {
          for (int64_t q = 0; q < count; ++q) {
            const uint32_t mask = masks[q].Word(block);
            if (mask != 0) scorer.Score(q, block, mask, floor(q));
          }
        }
      }
      for (int64_t q = 0; q < count; ++q) {
        scorer.Flush(q, floor(q));
        results.Add(q, scorer.collector(q).Finish());
      }
      AddCounts(scorer.counts(), mutex, counts);
    });
    results.Write(topk, first);
  }
}

void MolAverageTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                    const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                    TensorView /*workspace*/, TensorView counts) {
  const int64_t dim = shape.component_dim, pq = shape.query_components;
  const int64_t batch = queries.components.dim(0);
  // With means one vector an item, else the sum over its components.
  const int64_t vectors = table.means != nullptr ? 1 : shape.item_components;
  const void* from = table.means != nullptr ? table.means : table.components;
  const BF16* scales = table.means != nullptr ? table.mean_scales : table.scales;
  std::vector<float> means(batch * dim);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < pq; ++n) {
      const float* component = queries.components.row<float>(b) + n * dim;
      for (int64_t k = 0; k < dim; ++k) {
        means[b * dim + k] += component[k] / static_cast<float>(pq * vectors);
      }
    }
  }
  ScanLists(stream, table, allowed, batch, 1, topk, counts, [&] {
    return [&](int64_t query, int64_t block, uint32_t mask, MolTopKCollector* collector) {
      float sums[kMolLanes] = {};
      for (int64_t m = 0; m < vectors; ++m) {
        const int64_t vector = block * vectors + m;
        MolDotArgs args;
        args.vectors =
            static_cast<const char*>(from) + vector * dim * kMolLanes * ElementBytes(table.storage);
        if (scales != nullptr) args.scales = scales + vector * kMolLanes;
        args.element = ElementOf(table.storage);
        args.query = means.data() + query * dim;
        args.dim = dim;
        args.sums = sums;
        BestIsa().mol_dot(args);
      }
      const float floor = MolKeyScore(collector->threshold());
      uint32_t above = kAllLanes;
      if (collector->threshold() != 0) BestIsa().mol_above(sums, &floor, 1, &above);
      PushLanes(sums, mask & above, block, table, collector);
    };
  });
}

void MolLogitTopK(Stream& stream, const MolShape& shape, const MolQueries& queries,
                  const MolTableView& table, const MolAllowed& allowed, const MolTopK& topk,
                  TensorView /*workspace*/, TensorView counts) {
  const int64_t lists = shape.logits();
  ScanLists(stream, table, allowed, queries.components.dim(0), lists, topk, counts, [&] {
    return [&, logits = std::vector<float>(lists * kMolLanes), floors = std::vector<float>(lists),
            above = std::vector<uint32_t>(lists)](int64_t query, int64_t block, uint32_t mask,
                                                  MolTopKCollector* collectors) mutable {
      MolLogitsArgs args = LogitsOf(shape, table, block);
      args.query = queries.components.row<float>(query);
      args.logits = logits.data();
      BestIsa().mol_logits(args);
      for (int64_t l = 0; l < lists; ++l) {
        const uint64_t threshold = collectors[l].threshold();
        floors[l] = threshold == 0 ? kNoFloor : MolKeyScore(threshold);
      }
      BestIsa().mol_above(logits.data(), floors.data(), lists, above.data());
      for (int64_t l = 0; l < lists; ++l) {
        if ((above[l] & mask) == 0) continue;
        PushLanes(logits.data() + l * kMolLanes, above[l] & mask, block, table, &collectors[l]);
      }
    };
  });
}

void MolRescore(Stream& stream, const MolGateWeights& gate, const MolQueries& queries,
                const MolTableView& table, ConstTensorView candidates_begin,
                ConstTensorView candidates, const MolTopK& topk, TensorView /*workspace*/,
                TensorView counts) {
  const auto& packed = static_cast<const PackedMolGate&>(gate);
  const int64_t batch = queries.components.dim(0), k = topk.keys.dim(1);
  const int32_t* begin = candidates_begin.as<int32_t>();
  const int32_t* slots = candidates.as<int32_t>();
  // Pieces of the lists, cut between blocks, so that one query too is work for all threads.
  struct Piece {
    int64_t query, begin, end;
  };
  constexpr int64_t kPieceCandidates = 1024;
  std::vector<Piece> pieces;
  for (int64_t q = 0; q < batch; ++q) {
    for (int64_t i = begin[q]; i < begin[q + 1];) {
      int64_t end = std::min<int64_t>(begin[q + 1], i + kPieceCandidates);
      while (end < begin[q + 1] && slots[end] / kMolLanes == slots[end - 1] / kMolLanes) ++end;
      pieces.push_back({q, i, end});
      i = end;
    }
  }
  TopKLists results(batch, k);
  std::vector<SharedFloor> floors(batch);
  std::mutex mutex;
  PoolOf(stream).ParallelFor(static_cast<int64_t>(pieces.size()), 1,
                             [&](int64_t first, int64_t last) {
                               for (int64_t p = first; p < last; ++p) {
                                 const Piece& piece = pieces[p];
                                 PairScorer scorer(packed, queries, table, piece.query, 1, k);
                                 for (int64_t i = piece.begin; i < piece.end;) {
                                   const int64_t block = slots[i] / kMolLanes;
                                   uint32_t mask = 0;
                                   for (; i < piece.end && slots[i] / kMolLanes == block; ++i) {
                                     mask |= 1u << (slots[i] % kMolLanes);
                                   }
                                   scorer.Score(0, block, mask, &floors[piece.query]);
                                 }
                                 scorer.Flush(0, &floors[piece.query]);
                                 results.Add(piece.query, scorer.collector(0).Finish());
                                 AddCounts(scorer.counts(), mutex, counts);
                               }
                             });
  results.Write(topk, 0);
}

}  // namespace trireme::cpu
