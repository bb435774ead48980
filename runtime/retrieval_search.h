// Search over a RetrievalTable: each rank finds its own k best, then k scores and ids a query
// travel and every rank merges them. Modes:
//
//   exact      every allowed pair is scored
//   pruned     the same answer, bit for bit: a pair whose largest logit is below the k-th best
//   score
//              needs no gate, since a score is a convex combination of its logits
//   two-stage  candidates by cheap scores, then their exact scores. "average": the mean of all
//              logits; "per-embedding": the best of each logit; "combined": both. Per-embedding
//              lists carry a certificate: no item outside of them scores more than the largest of
//              their last logits, so an answer whose k-th score is above that is proven exact.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/retrieval_table.h"

namespace trireme {

enum class RetrievalMode : uint8_t { kExact, kPruned, kTwoStage };
enum class FirstStage : uint8_t { kAverage, kPerEmbedding, kCombined };

inline constexpr int64_t kMaxRetrievalK = 2048;
inline constexpr int64_t kMaxFirstStageK = 100'000;
// Queries that go through a shard together; more of one call are several scans.
inline constexpr int64_t kMaxScanQueries = 64;

struct RetrievalOptions {
  int64_t k = 100;  // at most kMaxRetrievalK
  RetrievalMode mode = RetrievalMode::kPruned;
  FirstStage first_stage = FirstStage::kCombined;
  int64_t average_k = 1000;  // candidates by the mean
  int64_t each_k = 100;      // candidates by each logit
  // Two-stage: answers not proven exact are searched again by the pruned scan.
  bool exact_or_certified = false;
  bool operator==(const RetrievalOptions&) const = default;
};
// InvalidArgument with the number that is wrong and its limits.
absl::Status CheckRetrievalOptions(const RetrievalOptions& options);

struct RetrievalQuery {
  std::vector<float> embedding;      // [D_q]
  int64_t user_id = 0;               // used where the model has user-id tables
  std::string filter;                // retrieval_filter.h; empty: none
  std::vector<int64_t> exclude_ids;  // never answered; unknown ones do not matter
};

struct RetrievalAnswer {
  absl::Status status;  // not OK: this query alone failed
  // k of each, best first; where fewer items are allowed, id -1 and score -infinity.
  std::vector<int64_t> ids;
  std::vector<float> scores;
  bool exact = false;  // proven to be the k best
};

// The status of the first query that failed; OK where none did.
inline absl::Status FirstFailure(const std::vector<RetrievalAnswer>& answers) {
  for (const RetrievalAnswer& answer : answers) {
    if (!answer.status.ok()) return answer.status;
  }
  return absl::OkStatus();
}

struct RetrievalCounts {
  MolScanCounts scan;          // of this rank
  int64_t rescanned = 0;       // queries that exact_or_certified searched again
  double merge_seconds = 0.0;  // from the end of this rank's scan to the merged answer
};

class RetrievalGraphs;  // retrieval_graphs.h

struct RetrievalContext {
  // Only items whose bit is set, by place in the order (row of the file that the table was built
  // from); null: all.
  const std::vector<uint32_t>* rows = nullptr;
  RetrievalCounts* counts = nullptr;  // added to
  // Made for the table, on the stream of this search; exact and pruned searches that it holds are
  // replayed. Null: none is.
  RetrievalGraphs* graphs = nullptr;
  // Another stream and communicator than the table's, so that several threads of one rank may
  // search at the same time; null: the table's.
  const RetrievalGroup* group = nullptr;
};

// Collective: all ranks with the same arguments; all get the answers, one a query. Holds the shard
// for reading, so that updates wait. A query for which a rank lacks memory, even alone, fails alone
// and on all ranks.
absl::StatusOr<std::vector<RetrievalAnswer>> SearchTable(const RetrievalTable& table,
                                                         const std::vector<RetrievalQuery>& queries,
                                                         const RetrievalOptions& options,
                                                         const RetrievalContext& context = {});

// Merges sorted lists of keys (descending; 0 ends a list): calls take(list, index) for the k
// largest in order. `lists` hold `length` keys each, `stride` keys apart. False where equal keys of
// two lists met: which of them comes first is then left open.
template <typename Take>
bool MergeKeys(const uint64_t* keys, int64_t lists, int64_t length, int64_t stride, int64_t k,
               Take&& take) {
  std::vector<int64_t> next(lists);
  bool ordered = true;
  for (int64_t taken = 0; taken < k; ++taken) {
    int64_t best = -1;
    uint64_t best_key = 0;
    bool tied = false;
    for (int64_t l = 0; l < lists; ++l) {
      const uint64_t key = next[l] < length ? keys[l * stride + next[l]] : 0;
      if (key == 0 || key < best_key) continue;
      if (key == best_key) {
        tied = true;
      } else {
        best = l, best_key = key, tied = false;
      }
    }
    if (best < 0) return ordered;
    ordered = ordered && !tied;
    take(best, next[best]++);
  }
  return ordered;
}

}  // namespace trireme
