// A warp of the tensor-core scans of MoL (mol_tiles.cu): dot products, both layers of the gate and
// the softmax of 16 pairs at a time, all in registers.
#pragma once

#include "kernels/cuda/mol_tile_loader.cuh"

namespace trireme::cuda::mol_tile {

// x * sigmoid(x), one special function.
__device__ inline float TileSilu(float x) {
  const float half = __fmul_rn(0.5f, x);
  return __fmaf_rn(half, gpu::Tanh(half), half);
}

// A warp at work on 16 rows. Thread t of a quad has columns 8 j + 2 t and the next of rows g and
// g + 8 (PTX ISA, "Matrix fragments for mma.m16n8k16").
template <int kTiles, Mode kMode>
class TileWarp {
 public:
  static constexpr int kCount = kQueries<kTiles>;
  struct Rows {
    int slot[2], query[2];
    bool active[2];
  };

  __device__ TileWarp(const MolTileArguments& a, const uint4* w1, const uint4* w2,
                      Queue<kTiles>* queue)
      : a_(a),
        w1_(w1),
        w2_(w2),
        queue_(queue),
        row_(gpu::LaneId() / 4),
        column_(gpu::LaneId() % 4 * 2) {}

  // Rows [half * 16, half * 16 + 16) of a block in shared memory, whose slots are given, against
  // kCount queries; bit r of masks[q]: row r of the block and query q are a pair.
  __device__ void Step(const unsigned char* tile, int half, const int (&slots)[2],
                       const int (&queries)[kCount], const uint32_t (&masks)[kCount]) {
    float logits[kCount][kTiles][4];
    Dots(tile, half, slots, queries, logits);
    Rows rows[kCount];
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rows[q].slot[h] = slots[h];
        rows[q].query[h] = queries[q];
        rows[q].active[h] = (masks[q] >> (half * kRows + row_ + h * 8) & 1) != 0;
        if (column_ == 0) tally.pairs += rows[q].active[h] ? 1 : 0;
      }
    }
    if constexpr (kMode == Mode::kLogits) {
#pragma unroll
      for (int q = 0; q < kCount; ++q) OfferLogits(logits[q], rows[q]);
    } else if constexpr (kMode == Mode::kPrune) {
#pragma unroll
      for (int q = 0; q < kCount; ++q) Defer(logits[q], rows[q]);
      while (queued_ >= kRows) ScoreQueued(kRows);
    } else {
      Score<kCount>(logits, rows);
    }
  }
  __device__ void Finish() {
    if (kMode == Mode::kPrune && queued_ > 0) ScoreQueued(queued_);
    tally.AddTo(a_.scan.counters);
  }

  MolTally tally;

 private:
  // The query component and the item component of tile j's column e, and whether there is such a
  // pair.
  __device__ int ItemComponent(int j) const { return j * a_.tiling.reciprocal >> 16; }
  __device__ int QueryTile(int j) const { return j - ItemComponent(j) * a_.tiling.query_tiles; }
  __device__ int QueryComponent(int j, int e) const { return QueryTile(j) * 8 + column_ + e; }
  __device__ bool IsPair(int j, int e) const {
    return ItemComponent(j) < a_.scan.item_components &&
           QueryComponent(j, e) < a_.scan.query_components;
  }
  __device__ int Logit(int j, int e) const {
    return QueryComponent(j, e) * a_.scan.item_components + ItemComponent(j);
  }

  __device__ void Dots(const unsigned char* tile, int half, const int (&slots)[2],
                       const int (&queries)[kCount], float (&logits)[kCount][kTiles][4]) const {
    const int lane = gpu::LaneId(), steps = a_.scan.dim / 16, tiles = a_.tiling.query_tiles;
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[q][j][i] = 0.0f;
      }
    }
    for (int step = 0; step < steps; ++step) {
      uint32_t b[kCount][2] = {};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int m = ItemComponent(j);
        if (m >= a_.scan.item_components) break;
        if (j == 0 || tiles > 1) {
#pragma unroll
          for (int q = 0; q < kCount; ++q) {
            const uint2 pair =
                a_.queries[((int64_t{queries[q]} * tiles + QueryTile(j)) * steps + step) * 32 +
                           lane];
            b[q][0] = pair.x;
            b[q][1] = pair.y;
          }
        }
        uint32_t x[4];
        const int piece = (m * a_.scan.dim + step * 16) / 8 + lane / 16;
        gpu::LdMatrixX4(x, tile + PieceOffset(piece, half * kRows + lane % 16));
#pragma unroll
        for (int q = 0; q < kCount; ++q) gpu::Mma(logits[q][j], x, b[q], __nv_bfloat16());
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int m = ItemComponent(j);
      if (m >= a_.scan.item_components) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float scale = a_.scan.inverse_temperature;
        if (a_.int8) {
          const int64_t vector = slots[h] / kMolLanes * a_.scan.item_components + m;
          scale =
              __fmul_rn(scale, Float(a_.scan.scales[vector * kMolLanes + slots[h] % kMolLanes]));
        }
#pragma unroll
        for (int q = 0; q < kCount; ++q) {
          logits[q][j][h * 2] = __fmul_rn(logits[q][j][h * 2], scale);
          logits[q][j][h * 2 + 1] = __fmul_rn(logits[q][j][h * 2 + 1], scale);
        }
      }
    }
  }

  __device__ void OfferLogits(const float (&logits)[kTiles][4], const Rows& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!rows.active[h]) continue;
      const uint32_t order = a_.scan.order[rows.slot[h]];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float logit = logits[j][h * 2 + e];
          if (!IsPair(j, e) || !IsFinite(logit)) continue;
          Offer(a_.scan.lists, int64_t{rows.query[h]} * a_.scan.logits + Logit(j, e),
                KeyOf(logit, order), rows.slot[h]);
        }
      }
    }
  }

  // Puts the rows aside whose largest logit reaches the floor of their list. One query's.
  __device__ void Defer(const float (&logits)[kTiles][4], const Rows& rows) {
    const float floor =
        PruneFloor(a_.scan.lists.thresholds[rows.query[0]], MolPruneMargin(a_.scan.logits));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (IsPair(j, e)) top = fmaxf(top, logits[j][h * 2 + e]);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const bool survives = rows.active[h] && !(top < floor);
      // One bit a row, that of the quad's first lane.
      const uint32_t mask = __ballot_sync(0xffffffffu, survives && column_ == 0);
      if (survives) {
        const int at = queued_ + __popc(mask & ((1u << (row_ * 4)) - 1));
        if (column_ == 0) {
          queue_->slots[at] = rows.slot[h];
          queue_->queries[at] = rows.query[h];
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          *reinterpret_cast<float2*>(&queue_->logits[at][j * 8 + column_]) =
              make_float2(logits[j][h * 2], logits[j][h * 2 + 1]);
        }
      }
      queued_ += __popc(mask);
    }
    __syncwarp();
  }
  // Gates the last `count` (up to 16) of the queue.
  __device__ void ScoreQueued(int count) {
    queued_ -= count;
    float logits[1][kTiles][4];
    Rows rows[1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_ + h * 8, from = queued_ + (row < count ? row : 0);
      rows[0].slot[h] = queue_->slots[from];
      rows[0].query[h] = queue_->queries[from];
      rows[0].active[h] = row < count;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 pair =
            *reinterpret_cast<const float2*>(&queue_->logits[from][j * 8 + column_]);
        logits[0][j][h * 2] = pair.x;
        logits[0][j][h * 2 + 1] = pair.y;
      }
    }
    Score<1>(logits, rows);
    __syncwarp();  // read before the next rows come
  }

  // out = W2 silu(W1 logits + b1) + b2.
  template <int kSets>
  __device__ void CrossGate(const float (&logits)[kSets][kTiles][4],
                            float (&out)[kSets][kTiles][4]) const {
    const int lane = gpu::LaneId();
    constexpr int kSteps = kTiles / 4;  // of 32 logits
    uint32_t packed[kSets][kTiles / 2][4];
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int p = 0; p < kTiles / 2; ++p)
        Pack16(logits[s][2 * p], logits[s][2 * p + 1], packed[s][p]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        out[s][j][0] = out[s][j][2] = a_.b2[j * 8 + column_];
        out[s][j][1] = out[s][j][3] = a_.b2[j * 8 + column_ + 1];
      }
    }
    for (int chunk = 0; chunk < a_.tiling.hidden / 32; ++chunk) {
      uint32_t hidden[kSets][2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[kSets][2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int tile = chunk * 4 + half * 2 + n;
          const float low = a_.b1[tile * 8 + column_], high = a_.b1[tile * 8 + column_ + 1];
#pragma unroll
          for (int s = 0; s < kSets; ++s) {
            sums[s][n][0] = sums[s][n][2] = low;
            sums[s][n][1] = sums[s][n][3] = high;
          }
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            const uint4 w = gpu::Load16(w1_ + (tile * kSteps + step) * 32 + lane);
            const uint32_t first[2] = {w.x, w.y}, second[2] = {w.z, w.w};
#pragma unroll
            for (int s = 0; s < kSets; ++s) {
              gpu::Mma(sums[s][n], packed[s][2 * step], first, __nv_bfloat16());
              gpu::Mma(sums[s][n], packed[s][2 * step + 1], second, __nv_bfloat16());
            }
          }
#pragma unroll
          for (int s = 0; s < kSets; ++s) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[s][n][i] = TileSilu(sums[s][n][i]);
          }
        }
#pragma unroll
        for (int s = 0; s < kSets; ++s) Pack16(sums[s][0], sums[s][1], hidden[s][half]);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 w = gpu::Load16(w2_ + (chunk * kTiles + j) * 32 + lane);
        const uint32_t first[2] = {w.x, w.y}, second[2] = {w.z, w.w};
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
          gpu::Mma(out[s][j], hidden[s][0], first, __nv_bfloat16());
          gpu::Mma(out[s][j], hidden[s][1], second, __nv_bfloat16());
        }
      }
    }
  }
  // Two tiles of sums as the A fragment of the next product.
  __device__ static void Pack16(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
    a[0] = gpu::RoundedPair(low[0], low[1], __nv_bfloat16());
    a[1] = gpu::RoundedPair(low[2], low[3], __nv_bfloat16());
    a[2] = gpu::RoundedPair(high[0], high[1], __nv_bfloat16());
    a[3] = gpu::RoundedPair(high[2], high[3], __nv_bfloat16());
  }

  template <int kSets>
  __device__ void Score(const float (&logits)[kSets][kTiles][4], const Rows (&rows)[kSets]) {
    float gate[kSets][kTiles][4];
    CrossGate(logits, gate);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float score = Softmax(logits[s], gate[s], rows[s], h);
        if (rows[s].active[h] && column_ == h * 2) {
          OfferScore(a_.scan, score, rows[s].slot[h], rows[s].query[h], tally);
        }
      }
    }
  }
  // Logit `l` of the item gates in the block at `block`.
  __device__ float ItemGate(int64_t block, int l, int lane, float scale) const {
    const int64_t at = block + PlaceOf(l, lane, a_.scan.gate_shift);
    return a_.int8 ? __fmul_rn(Float(static_cast<const int8_t*>(a_.scan.gates)[at]), scale)
                   : Float(static_cast<const __nv_bfloat16*>(a_.scan.gates)[at]);
  }
  // The score of row g (h = 0) or g + 8, the same in all lanes of its quad.
  __device__ float Softmax(const float (&logits)[kTiles][4], float (&gate)[kTiles][4],
                           const Rows& rows, int h) const {
    const float* query_gate = a_.query_gates + int64_t{rows.query[h]} * (kTiles * 8) + column_;
    const int64_t block = int64_t{rows.slot[h] / kMolLanes} * a_.scan.logits * kMolLanes;
    const int lane = rows.slot[h] % kMolLanes;
    const float scale = a_.int8 ? Float(a_.scan.gate_scales[rows.slot[h]]) : 1.0f;
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& w = gate[j][h * 2 + e];
        if (!IsPair(j, e)) {
          w = -INFINITY;
          continue;
        }
        const float item = ItemGate(block, Logit(j, e), lane, scale);
        w = TileSilu(__fmaf_rn(query_gate[j * 8 + e], item, w));
        top = fmaxf(top, w);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float base = __fmul_rn(top, kLog2E);
    float total = 0.0f, score = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float weight = gpu::Exp2(__fmaf_rn(gate[j][h * 2 + e], kLog2E, -base));
        total = __fadd_rn(total, weight);
        score = __fmaf_rn(weight, logits[j][h * 2 + e], score);
      }
    }
#pragma unroll
    for (int o = 1; o <= 2; o *= 2) {
      total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, o));
      score = __fadd_rn(score, __shfl_xor_sync(0xffffffffu, score, o));
    }
    return score / total;
  }

  const MolTileArguments& a_;
  const uint4 *w1_, *w2_;
  Queue<kTiles>* const queue_;
  const int row_, column_;
  int queued_ = 0;
};

}  // namespace trireme::cuda::mol_tile
