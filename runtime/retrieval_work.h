// What one search does on a rank's device, from raw queries to this rank's best: the queries are
// projected, and an exact or a pruned scan follows, or the stages of a two-stage search. Nothing in
// it asks the host, so that it is enqueued the same way by a search that is not replayed and by the
// capture of a graph (retrieval_graphs.h).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "runtime/retrieval_search.h"

namespace trireme {

// The memory of one search by owner.
struct ScanBytes {
  size_t queries = 0;  // as they come, projected, and what projects them
  size_t masks = 0;    // and the lists of excluded slots
  size_t answers = 0;  // lists of all stages, candidates, what all ranks found
  size_t kernels = 0;  // what the ops work in
  size_t total() const { return queries + masks + answers + kernels; }
};

// What a search reads and leaves, in the host's memory.
struct SearchArrays {
  std::vector<float> queries;                     // [B, D_q]
  std::vector<int32_t> user_rows;                 // [tables, B] (MolModel::UserRows)
  std::vector<int32_t> masks;                     // [F, words]
  std::vector<int32_t> query_mask;                // [B]
  std::vector<int32_t> excluded_begin, excluded;  // [B + 1], [E]
};
struct SearchFound {
  std::vector<uint64_t> keys;  // [B, k], as MolTopK's
  std::vector<int32_t> slots;  // [B, k]
  // The last key of every list of a first stage over all ranks, 0 where all allowed items are on
  // it; empty where there is no such stage.
  std::vector<uint64_t> average_last, each_last;  // [B], [B, L]
  MolScanCounts counts;                           // of this rank
};

// The same in the device's memory.
struct SearchInputs {
  TensorView queries, user_rows, masks, query_mask, excluded_begin, excluded;
  // Takes what SearchArrays of these sizes need; `masks` F, `excluded` E.
  static void Plan(const RetrievalTable& table, int64_t batch, int64_t masks, int64_t excluded,
                   ScanBytes* bytes);
  static SearchInputs Take(const RetrievalTable& table, int64_t batch, int64_t masks,
                           int64_t excluded, Arena& arena);
};

class SearchWork {
 public:
  // Of `batch` queries. Table and group must outlive it.
  SearchWork(const RetrievalTable& table, const RetrievalGroup& group,
             const RetrievalOptions& options, int64_t batch);

  // What it takes of an arena, and from where on its kernels may use that.
  const ScanBytes& bytes() const { return bytes_; }
  void Take(Arena& arena);
  // Enqueues all of it. REQUIRES: `arena` is as Take has left it. With ranks and two stages these
  // are collective calls.
  void Enqueue(Stream& stream, Arena& arena, const SearchInputs& in);
  // Enqueues what must come before that, outside of a graph: clears the counts.
  void Begin(Stream& stream);
  // Enqueues the way of the first `queries` answers to the host.
  void Fetch(Stream& stream, int64_t queries, SearchFound* found) const;
  // What Enqueue leaves, for a graph's trial.
  std::vector<ConstTensorView> outputs() const;

 private:
  // A list for each of B * lists, and where the lists of all ranks end.
  struct Stage {
    int64_t lists = 0, k = 0;  // of a query; 0: there is no such stage
    TensorView keys, slots, last;
  };
  template <typename Place>
  void ForEachPlace(Place&& place);
  void PlanKernels();
  void End(Stream& stream, const Stage& stage);
  bool two_stage() const { return options_.mode == RetrievalMode::kTwoStage; }

  const RetrievalTable& table_;
  const RetrievalGroup& group_;
  const RetrievalOptions options_;
  const int64_t batch_;
  int64_t candidates_room_ = 0, workspace_bytes_ = 0;
  ScanBytes bytes_;
  TensorView components_, gates_;  // [B, Pq * d], [B, G]
  Stage average_, each_;
  TensorView gathered_;                       // of the larger stage: keys of all ranks
  TensorView candidates_begin_, candidates_;  // [B + 1], [candidates_room_]
  TensorView keys_, slots_, counts_;          // [B, k], [B, k], [3]
  TensorView workspace_;
};

}  // namespace trireme
