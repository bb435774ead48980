// Tensor-core scans of MoL: which heads they take, and how weights and queries lie for them.
// Internal to kernels/cuda/mol_*.cu.
//
// A pair's logits are in the order of the tensor cores here, column m * 8 P + n for item component
// m and query component n, P the tiles of eight that query components fill; columns without a pair
// have zero weights in the gate and no part in the softmax.
#pragma once

#include "kernels/cuda/mol_scan.cuh"

namespace trireme::cuda {

// Sizes of a head in tiles; `columns` is 0 where the tensor cores do not take it.
struct MolTiling {
  int columns = 0;      // logits, filled up: 32 or 64
  int query_tiles = 0;  // P
  int reciprocal = 0;   // j / P is j * reciprocal >> 16, for a tile j
  int hidden = 0;       // units of the cross gate, filled up to a multiple of 32
  int blocks = 0;       // of items, in shared memory at a time (and as many on their way)
};
// Depends on head and storage alone: a pair's bits do not depend on what it is scored with.
MolTiling TilingOf(const MolShape& shape, MolStorage storage);

struct MolTileArguments {
  MolScanArguments scan;
  MolTiling tiling;
  bool int8;
  const uint2* queries;      // [batch][P][d / 16][32]: a lane's B fragment of an mma.m16n8k16
  const float* query_gates;  // [batch][columns]
  const uint4 *w1, *w2;      // CudaMolGate's
  const float *b1, *b2;
};

// The queries for the kernels below.
struct MolTileQueries {
  MolTileQueries(Workspace& workspace, const MolTiling& tiling, const MolShape& shape,
                 int64_t batch);
  void Fill(Stream& stream, const MolShape& shape, const MolQueries& queries) const;
  MolTiling tiling;
  int64_t batch;
  uint2* fragments;
  float* gates;
};

void LaunchMolTileScan(Stream& stream, bool prune, const MolTileArguments& a);
void LaunchMolTileLogits(Stream& stream, const MolTileArguments& a);

}  // namespace trireme::cuda
