// One function pointer per MoL op and backend, reached through OpTable::mol. Only mol_ops.cc calls
// through it, after the shapes were checked.
#pragma once

#include "kernels/mol_ops.h"

namespace trireme {

struct MolOpTable {
  decltype(&PackMolGate) pack_gate;
  decltype(&Silu) silu;
  decltype(&GeluAndMul) gelu_and_mul;
  decltype(&L2Normalize) l2_normalize;
  decltype(&MolStore) store;
  decltype(&MolWorkspaceBytes) workspace_bytes;
  decltype(&MolSearch) search;
  decltype(&MolAverageTopK) average_topk;
  decltype(&MolLogitTopK) logit_topk;
  decltype(&MolLastKeys) last_keys;
  decltype(&MolCandidates) candidates;
  decltype(&MolRescore) rescore;
  int64_t piece_bytes;  // of MolPiece; 0: one value
};

}  // namespace trireme
