// Dynamic batching of retrieval requests: pure logic, the clock is an argument. Requests for the
// same table with the same options are answered together, when a batch is full or its oldest
// request has waited long enough. Updates keep their place: a request sees every update that was
// added before it, and none that was added after it. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/retrieval_search.h"

namespace trireme {

struct RetrievalRequest {
  int table = 0;
  RetrievalOptions options;
  RetrievalQuery query;
  std::function<void(RetrievalAnswer)> done;  // once, on the thread that steps the service
};

struct RetrievalUpdate {
  int table = 0;
  RetrievalItems upsert;  // or
  std::vector<int64_t> delete_ids;
  // Upsert: how many are not finite; delete: how many there were.
  std::function<void(absl::StatusOr<int64_t>)> done;
};

struct RetrievalBatcherOptions {
  int64_t max_batch = 32;
  std::chrono::microseconds max_wait{1000};  // of the oldest request, before its batch starts
  int64_t max_queued = 65536;
};

class RetrievalBatcher {
 public:
  using Time = std::chrono::steady_clock::time_point;
  explicit RetrievalBatcher(const RetrievalBatcherOptions& options) : options_(options) {}

  // ResourceExhausted when the queue is full; `done` is not called then.
  absl::Status Add(RetrievalRequest request, Time now);
  absl::Status Add(RetrievalUpdate update, Time now);

  // What to do now: an update, or requests of one table and the same options, in order of arrival.
  // Neither: nothing is due yet.
  struct Work {
    std::optional<RetrievalUpdate> update;
    std::vector<RetrievalRequest> requests;
    bool empty() const { return !update && requests.empty(); }
  };
  Work Next(Time now);
  // When Next will have something to do if nothing is added; none when the queue is empty.
  std::optional<Time> Due() const;
  int64_t queued() const { return static_cast<int64_t>(queue_.size()); }

 private:
  struct Entry {
    Time arrived;
    std::optional<RetrievalUpdate> update;
    RetrievalRequest request;
  };
  // Requests that would go with the oldest one, at most max_batch, up to the next update.
  std::vector<size_t> Batch() const;

  const RetrievalBatcherOptions options_;
  std::deque<Entry> queue_;
};

}  // namespace trireme
