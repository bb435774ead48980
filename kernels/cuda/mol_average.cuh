// The first stage by the mean: one dot product an item. Internal to kernels/cuda/mol_*.cu.
#pragma once

#include "kernels/cuda/mol_tiles.cuh"

namespace trireme::cuda {

// Sums of bf16 numbers that a query's values are split into: 24 bits, which is all of an f32.
inline constexpr int kMolSplits = 3;

inline int64_t MolPadded(int64_t dim) {
  return (dim + kMolQueryStep - 1) / kMolQueryStep * kMolQueryStep;
}

// A query's components as the one vector that items' means are compared with.
struct MolMeanQueries {
  MolMeanQueries(Workspace& workspace, const MolShape& shape, MolStorage storage, int64_t batch);
  // For tables with `vectors` vectors an item.
  void Fill(Stream& stream, const MolShape& shape, const MolQueries& queries,
            int64_t vectors) const;
  int64_t batch;
  int tiles = 0;  // of eight queries for the tensor cores; 0: they do not take this head
  float* means;   // [batch, padded dim]
  uint2* splits;  // [kMolSplits][tiles][d / 16][32]: a lane's B fragment of an mma.m16n8k16
};

// `a`: item_components vectors an item and one a query.
void LaunchMolAverage(Stream& stream, MolStorage storage, const MolMeanQueries& queries,
                      const MolScanArguments& a);

}  // namespace trireme::cuda
