#include "runtime/retrieval_batcher.h"

#include "absl/strings/str_cat.h"

namespace trireme {
namespace {

bool Same(const RetrievalRequest& a, const RetrievalRequest& b) {
  return a.table == b.table && a.options == b.options;
}

absl::Status Full(int64_t queued) {
  return absl::ResourceExhaustedError(
      absl::StrCat("retrieval: ", queued, " requests are waiting already; try again later"));
}

}  // namespace

absl::Status RetrievalBatcher::Add(RetrievalRequest request, Time now) {
  if (queued() >= options_.max_queued) return Full(queued());
  queue_.push_back({now, std::nullopt, std::move(request)});
  return absl::OkStatus();
}

absl::Status RetrievalBatcher::Add(RetrievalUpdate update, Time now) {
  if (queued() >= options_.max_queued) return Full(queued());
  queue_.push_back({now, std::move(update), {}});
  return absl::OkStatus();
}

std::vector<size_t> RetrievalBatcher::Batch() const {
  std::vector<size_t> batch;
  for (size_t i = 0; i < queue_.size() && !queue_[i].update; ++i) {
    if (!Same(queue_[i].request, queue_.front().request)) continue;
    batch.push_back(i);
    if (static_cast<int64_t>(batch.size()) == options_.max_batch) break;
  }
  return batch;
}

std::optional<RetrievalBatcher::Time> RetrievalBatcher::Due() const {
  if (queue_.empty()) return std::nullopt;
  const Entry& oldest = queue_.front();
  if (oldest.update) return oldest.arrived;
  const std::vector<size_t> batch = Batch();
  // Full, or held up by an update that cannot go before it: waiting longer gains nothing.
  const bool full = static_cast<int64_t>(batch.size()) == options_.max_batch;
  bool update_waits = false;
  for (const Entry& entry : queue_) update_waits = update_waits || entry.update.has_value();
  return full || update_waits ? oldest.arrived : oldest.arrived + options_.max_wait;
}

RetrievalBatcher::Work RetrievalBatcher::Next(Time now) {
  Work work;
  const std::optional<Time> due = Due();
  if (!due || *due > now) return work;
  if (queue_.front().update) {
    work.update = std::move(queue_.front().update);
    queue_.pop_front();
    return work;
  }
  const std::vector<size_t> batch = Batch();
  std::deque<Entry> rest;
  size_t next = 0;
  for (size_t i = 0; i < queue_.size(); ++i) {
    if (next < batch.size() && batch[next] == i) {
      work.requests.push_back(std::move(queue_[i].request));
      ++next;
    } else {
      rest.push_back(std::move(queue_[i]));
    }
  }
  queue_ = std::move(rest);
  return work;
}

}  // namespace trireme
