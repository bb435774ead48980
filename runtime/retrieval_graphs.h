// Searches of one table that are replayed (graph_cache.h): all that a search does on the device
// (retrieval_work.h), from the queries as they come to this rank's best, as one call. That is an
// exact or a pruned scan, or both stages of a two-stage search with the candidates between them;
// over several ranks the latter gather the lists of the first stage, so that they are replayed
// where the communicator's calls may be captured (NCCL's may, MPI's not). Work is counted like
// anywhere else. Batches are padded to the sizes that were captured; a query that is padding may be
// answered with nothing. What differs between two searches (queries, user ids, masks, excluded
// slots) lies at addresses of this object; items change under the graph, whose addresses are the
// table's for its life.
//
// Outside stay the copies from and to the host, and the merge over ranks: its second exchange
// follows only where the host finds equal scores in the first. Used by one search at a time, on the
// stream it was made with. Must go before table and communicator.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/graph_cache.h"
#include "runtime/ledger.h"
#include "runtime/retrieval_work.h"

namespace trireme {

struct RetrievalGraphOptions {
  // What is captured, each for all sizes of batches.
  std::vector<RetrievalOptions> searches = {RetrievalOptions()};
  std::vector<int64_t> batches = {1, 2, 4, 8, 16, 32};  // ascending
  int64_t max_excluded = 4096;                          // slots, of a batch's queries
  // Why nothing is to be captured (kOff: --no-graphs); empty: the device decides.
  std::optional<EagerReason> never{};
  // Takes a line about what could not be captured, with the ledger's behind it where memory is why;
  // of one rank for all. May be empty.
  std::function<void(const std::string& line)> warn{};
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

  // Whether a search of so many queries, which exclude so many slots, is replayed. The same on all
  // ranks where it is a collective one.
  bool Replays(const RetrievalOptions& search, int64_t batch, int64_t excluded) const;
  // Enqueues all of it, with the way from `in` and to `found`. REQUIRES: Replays.
  void Replay(const RetrievalOptions& search, int64_t batch, const SearchArrays& in,
              SearchFound* found);
  // Of a search that is not replayed, for the reason that its size has.
  void RunEagerly(const RetrievalOptions& search, int64_t batch, absl::FunctionRef<void()> work);

  const GraphStats& stats() const { return cache_.stats(); }
  // Of the device's memory: what the searches work in; the graphs' own bytes are in stats().
  int64_t bytes() const { return static_cast<int64_t>(memory_.capacity()); }

 private:
  // A search for one size of batches. All of them lie over each other, behind the inputs.
  struct Entry {
    size_t search;
    int64_t batch;
    SearchWork work;
    size_t end = 0;  // of its memory
  };
  RetrievalGraphs(const RetrievalTable& table, const RetrievalGroup& group,
                  RetrievalGraphOptions options);
  absl::Status TakeMemory();
  void CaptureAll();
  void TellOfCaptures() const;
  // The inputs for a batch of so many.
  SearchInputs InputsOf(int64_t batch) const;
  // Enqueues a trial's inputs.
  void FillTrial(Entry& entry, int round);
  // What is captured.
  void Run(Entry& entry);
  // Takes over what a search of `batch` queries reads; what is beyond is answered with nothing.
  void CopyInputs(const SearchArrays& in, int64_t batch, int64_t padded);
  GraphKey KeyOf(const Entry& entry) const;
  // Its ranks exchange something within it.
  bool Collective(const RetrievalOptions& search) const;
  const Entry* Find(const RetrievalOptions& search, int64_t batch) const;

  const RetrievalTable& table_;
  const RetrievalGroup group_;
  Stream& stream_;
  const RetrievalGraphOptions options_;
  std::vector<Entry> entries_;
  bool capturing_collective_ = false;
  GraphCache cache_;
  Arena memory_;
  // For the largest batch; row 0 of the masks allows nothing.
  SearchInputs inputs_;
  // What copies read until the stream has been waited for.
  std::vector<int32_t> user_rows_, query_mask_, excluded_begin_;
};

// What a table holds on this rank's device, by owner, with the head it was made with and its graphs
// (may be null): for the ledger of the job. Not while a search is under way.
Ledger RetrievalLedger(const RetrievalTable& table, const RetrievalGraphs* graphs);
// Out of memory: the same with that ledger, short of what searches under way have; all else as it
// is.
absl::Status WithRetrievalLedger(const absl::Status& status, const RetrievalGroup& group,
                                 const RetrievalTable& table, const RetrievalGraphs* graphs);

}  // namespace trireme
