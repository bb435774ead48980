// What MolCandidates works in. Internal to kernels/cuda/mol_*.cu.
#pragma once

#include "kernels/cuda/mol_topk.cuh"

namespace trireme::cuda {

// Words of a map that a block counts and writes out: some rounds of its threads.
inline constexpr int64_t kMolMapWords = 4096;

// A bit for every slot and query, and how many of them each part of a map has.
struct MolMaps {
  // At least one part a query, so that an empty table too has beginnings.
  MolMaps(Workspace& workspace, int64_t batch, int64_t slots)
      : words((slots + 31) / 32),
        parts(static_cast<int>(std::max<int64_t>(1, (words + kMolMapWords - 1) / kMolMapWords))),
        bits(workspace.Take<uint32_t>(batch * words)),
        counts(workspace.Take<int>(batch * parts)) {}
  int64_t words;  // of a query
  int parts;      // of a query
  uint32_t* bits;
  int* counts;
};

}  // namespace trireme::cuda
