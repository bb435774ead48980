// Searches of one table that are replayed (graph_cache.h): the kernels of an exact or a pruned
// scan, which host code does not interrupt, as one call. Batches are padded to the sizes that were
// captured; a query that is padding may be answered with nothing. What differs between two searches
// (queries, masks, excluded slots) lies at addresses of this object; items change under the graph,
// whose addresses are the table's for its life.
//
// Projecting the queries, copies from and to the host and the merge over ranks stay outside, as do
// first and second stages, between which the host makes lists. Used by one search at a time, on the
// stream it was made with. Must go before the table.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/graph_cache.h"
#include "runtime/retrieval_search.h"

namespace trireme {

struct RetrievalGraphOptions {
  int64_t k = 100;
  std::vector<RetrievalMode> modes = {RetrievalMode::kPruned};  // and kExact
  std::vector<int64_t> batches = {1, 2, 4, 8, 16, 32};          // ascending
  int64_t max_excluded = 4096;                                  // slots, of a batch's queries
  // Why nothing is to be captured (kOff: --no-graphs); empty: the device decides.
  std::optional<EagerReason> never{};
  std::function<void(const std::string& line)> warn{};  // as GraphCache's
};

// What a search leaves to be answered by a replay. Host memory.
struct RetrievalReplay {
  int64_t batch = 0;
  const std::vector<int32_t>*masks, *query_mask;         // [F, mask_words], [B]: a row of masks
  const std::vector<int32_t>*excluded_begin, *excluded;  // [B + 1], [E]
  std::vector<uint64_t>* keys = nullptr;                 // out: [B, k]
  std::vector<int32_t>* slots = nullptr;                 // out: [B, k]
};

class RetrievalGraphs {
 public:
  // Start-up, collective: takes all memory there will be (ResourceExhausted, on all ranks, where
  // one lacks it) and captures, which runs each search four times. Where nothing is captured, it
  // takes nothing and all searches run as without it.
  static absl::StatusOr<std::unique_ptr<RetrievalGraphs>> Create(
      const RetrievalTable& table, const RetrievalGroup& group,
      const RetrievalGraphOptions& options);
  RetrievalGraphs(const RetrievalGraphs&) = delete;
  RetrievalGraphs& operator=(const RetrievalGraphs&) = delete;

  // Whether a search of so many queries, which exclude so many slots, is replayed.
  bool Replays(RetrievalMode mode, int64_t k, int64_t batch, int64_t excluded) const;
  // Where its projected queries go.
  TensorView components(int64_t batch) const { return places_.components.Rows(0, batch); }
  TensorView gates(int64_t batch) const { return places_.gates.Rows(0, batch); }
  // Enqueues all of it, with the way to `keys` and `slots`.
  void Replay(RetrievalMode mode, const RetrievalReplay& search);
  // Of a search that is not replayed.
  void RunEagerly(absl::FunctionRef<void()> work);

  const GraphStats& stats() const { return cache_.stats(); }
  // Of the device's memory: what the searches work in; the graphs' own bytes are in stats().
  int64_t bytes() const { return static_cast<int64_t>(memory_.capacity()); }

 private:
  // For the largest batch.
  struct Places {
    TensorView components, gates;         // [B, Pq * d], [B, G]
    TensorView masks, query_mask;         // [1 + B, words]: none, then filters; [B]
    TensorView excluded_begin, excluded;  // [B + 1], [max_excluded]
    TensorView keys, slots;               // [B, k]
    TensorView workspace;
  };
  RetrievalGraphs(const RetrievalTable& table, Stream& stream, RetrievalGraphOptions options);
  absl::Status TakeMemory();
  int64_t WorkspaceBytes() const;
  void CaptureAll();
  // Enqueues a trial's inputs.
  void FillTrial(int64_t batch, int round);
  // What is captured.
  void Search(RetrievalMode mode, int64_t batch);
  // Takes one batch's masks and lists over; what is beyond `search.batch` is answered with nothing.
  void CopyInputs(const RetrievalReplay& search, int64_t padded);

  const RetrievalTable& table_;
  Stream& stream_;
  const RetrievalGraphOptions options_;
  GraphCache cache_;
  Arena memory_;
  Places places_;
  // What copies read until the stream has been waited for.
  std::vector<int32_t> query_mask_, excluded_begin_;
};

}  // namespace trireme
