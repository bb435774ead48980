// RetrievalService: the tables of a job, served by all its ranks. Rank 0 takes requests and updates
// from any thread, batches them and tells the others what to do; they sit in Follow(). Several
// tables may be there, each with its own model.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "runtime/graph_stats.h"
#include "runtime/ledger.h"
#include "runtime/retrieval_batcher.h"

namespace trireme {

// Of rank 0. Plain data; as Prometheus text: PrometheusText (metrics.h).
struct RetrievalServiceStats {
  int64_t batches = 0, requests = 0, updates = 0;
  int64_t failed = 0;  // requests whose answer was an error
  GraphStats graphs;   // of all tables
  Ledger held;         // likewise, on the device
};

class RetrievalService {
 public:
  RetrievalService(const RetrievalGroup& group, const RetrievalBatcherOptions& options)
      : group_(group), batcher_(options) {}

  // On every rank, in the same order, before anything is submitted. Gives the table's number.
  // `graphs`: of the table, on the group's stream; may be null.
  int AddTable(RetrievalTable* table, RetrievalGraphs* graphs = nullptr);

  // Rank 0, any thread. `done` is called once unless this gives an error.
  absl::Status Submit(RetrievalRequest request);
  absl::Status Submit(RetrievalUpdate update);

  // Rank 0, the thread of the control plane. Does what is due and gives whether anything is left.
  bool Step();
  // Steps until Stop() was called and nothing is left.
  void Run();
  void Stop();  // any thread
  // Rank 0, after the last Step: lets the other ranks out of Follow().
  void Finish();

  // The other ranks: takes part in what rank 0 decides, until Finish().
  void Follow();

  RetrievalServiceStats stats() const;

 private:
  void Tell(const std::string& command);
  void Search(std::vector<RetrievalRequest> requests);
  void Update(RetrievalUpdate update);
  // Graphs and memory of all tables, for stats().
  void CountTables();

  const RetrievalGroup group_;
  std::vector<RetrievalTable*> tables_;
  std::vector<RetrievalGraphs*> graphs_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  RetrievalBatcher batcher_;  // by mutex_, as the next two
  bool stopping_ = false;
  RetrievalServiceStats stats_;
};

}  // namespace trireme
