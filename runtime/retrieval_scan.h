// One scan of a rank's shard for a batch of queries, from their memory to the merged answers. Part
// of retrieval_search.cc.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "runtime/retrieval_graphs.h"
#include "runtime/retrieval_memory.h"
#include "runtime/retrieval_search.h"
#include "runtime/retrieval_work.h"

namespace trireme {

// Words of a place of an answer on its way to the other ranks.
inline constexpr int64_t kPlaceWords = 3;

// Some queries on their way through one scan of this rank's shard, and through the merge.
class Scan {
 public:
  Scan(const RetrievalTable& table, const RetrievalGroup& group, const RetrievalContext& context,
       const RetrievalOptions& options, int64_t batch)
      : table_(table),
        shard_(table.shard()),
        group_(group),
        stream_(*group.stream),
        rows_(context.rows),
        counts_(context.counts),
        graphs_(context.graphs),
        options_(options),
        batch_(batch) {}

  ~Scan() { table_.search_memory().Give(std::move(memory_)); }

  // Takes all the memory of the device that the scan needs; first of all, so that nothing is on its
  // way when one rank lacks it.
  absl::Status Reserve(const std::vector<const RetrievalQuery*>& queries,
                       const std::vector<const Filter*>& filters) {
    const std::set<const Filter*> distinct(filters.begin(), filters.end());
    masks_count_ = static_cast<int64_t>(distinct.size());
    for (const RetrievalQuery* query : queries)
      excluded_count_ += static_cast<int64_t>(query->exclude_ids.size());
    ScanBytes bytes;
    replayed_ = graphs_ != nullptr && graphs_->Replays(options_, batch_, excluded_count_);
    if (!replayed_) {
      work_.emplace(table_, group_, options_, batch_);
      bytes = work_->bytes();
      SearchInputs::Plan(table_, batch_, masks_count_, excluded_count_, &bytes);
    }
    bytes.answers += MergeBytes();
    auto memory = table_.search_memory().Take(stream_.device(), bytes.total());
    if (!memory.ok()) {
      const auto mega = [](size_t n) { return static_cast<double>(n) * 1e-6; };
      const absl::Status lacks = absl::ResourceExhaustedError(absl::StrFormat(
          "retrieval search: a batch of %d with k %d needs %.1f MB on this rank (queries "
          "%.1f, masks %.1f, answers %.1f, kernels %.1f); use fewer candidates or a smaller table: "
          "%s",
          batch_, options_.k, mega(bytes.total()), mega(bytes.queries), mega(bytes.masks),
          mega(bytes.answers), mega(bytes.kernels), memory.status().message()));
      return WithRetrievalLedger(lacks, group_, table_, graphs_);
    }
    memory_ = *std::move(memory);
    return absl::OkStatus();
  }

  // Fills ids and scores of the answers.
  absl::Status Run(const std::vector<const RetrievalQuery*>& queries,
                   const std::vector<const Filter*>& filters,
                   const std::vector<RetrievalAnswer*>& answers) {
    FillQueries(queries);
    FillMasks(filters);
    FillExcluded(queries);
    if (replayed_) {
      graphs_->Replay(options_, batch_, arrays_, &found_);
    } else if (graphs_ != nullptr) {
      graphs_->RunEagerly(options_, batch_, [&] { Enqueue(); });
    } else {
      Enqueue();
    }
    RETURN_IF_ERROR(stream_.Synchronize());
    if (counts_ != nullptr) {
      counts_->scan.pairs += found_.counts.pairs;
      counts_->scan.gated += found_.counts.gated;
      counts_->scan.not_finite += found_.counts.not_finite;
    }
    RETURN_IF_ERROR(Merge(options_.k, answers));
    for (int64_t b = 0; b < batch_; ++b) answers[b]->exact = IsExact(b, *answers[b]);
    return absl::OkStatus();
  }

 private:
  // The work, in this scan's own memory.
  void Enqueue() {
    const SearchInputs in =
        SearchInputs::Take(table_, batch_, masks_count_, excluded_count_, memory_);
    work_->Take(memory_);
    const auto copy = [&](const TensorView& to, const auto& from) {
      if (!from.empty()) stream_.Copy(to.data, from.data(), from.size() * sizeof(from[0]));
    };
    copy(in.queries, arrays_.queries);
    copy(in.user_rows, arrays_.user_rows);
    copy(in.masks, arrays_.masks);
    copy(in.query_mask, arrays_.query_mask);
    if (in.excluded_begin) {
      copy(in.excluded_begin, arrays_.excluded_begin);
      copy(in.excluded, arrays_.excluded);
    }
    work_->Begin(stream_);
    work_->Enqueue(stream_, memory_, in);
    work_->Fetch(stream_, batch_, &found_);
  }

  // Three words a place: its score and its id.
  size_t MergeBytes() const {
    const int64_t words = kPlaceWords * batch_ * options_.k;
    const bool host = stream_.device().spec().host_memory;
    return ArgumentBytes(host, DType::kI32, {words}) +
           ArgumentBytes(host, DType::kI32, {words * group_.size()});
  }

  void FillQueries(const std::vector<const RetrievalQuery*>& queries) {
    std::vector<int64_t> users;
    for (const RetrievalQuery* query : queries) {
      arrays_.queries.insert(arrays_.queries.end(), query->embedding.begin(),
                             query->embedding.end());
      users.push_back(query->user_id);
    }
    arrays_.user_rows = table_.model().UserRows(users);
  }

  // One mask for every distinct filter.
  void FillMasks(const std::vector<const Filter*>& filters) {
    std::map<const Filter*, int32_t> known;
    std::vector<const Filter*> distinct;
    for (const Filter* filter : filters) {
      const auto [it, is_new] = known.emplace(filter, static_cast<int32_t>(distinct.size()));
      if (is_new) distinct.push_back(filter);
      arrays_.query_mask.push_back(it->second);
    }
    arrays_.masks.resize(masks_count_ * shard_.mask_words());
    for (int64_t f = 0; f < masks_count_; ++f) {
      shard_.FillMask(*distinct[f], rows_, arrays_.masks.data() + f * shard_.mask_words());
    }
  }

  void FillExcluded(const std::vector<const RetrievalQuery*>& queries) {
    std::vector<int32_t>& slots = arrays_.excluded;
    arrays_.excluded_begin = {0};
    for (const RetrievalQuery* query : queries) {
      const auto begin = static_cast<int64_t>(slots.size());
      for (const int64_t id : query->exclude_ids) {
        if (const auto slot = shard_.Find(id)) slots.push_back(*slot);
      }
      std::sort(slots.begin() + begin, slots.end());
      arrays_.excluded_begin.push_back(static_cast<int32_t>(slots.size()));
    }
  }

  // Whether the answer is proven to be the k best: of a two-stage search, where the scores of items
  // that are no candidates cannot exceed the last of it, rounding included.
  bool IsExact(int64_t b, const RetrievalAnswer& answer) const {
    if (options_.mode != RetrievalMode::kTwoStage) return true;
    constexpr float kAll = -std::numeric_limits<float>::infinity();
    float bound = std::numeric_limits<float>::infinity();
    // A list that is not full has all items there are.
    if (!found_.average_last.empty() && found_.average_last[b] == 0) bound = kAll;
    if (!found_.each_last.empty()) {
      const int64_t logits = table_.model().shape().logits();
      float largest = kAll;
      for (int64_t list = b * logits; list < (b + 1) * logits; ++list) {
        const uint64_t last = found_.each_last[list];
        if (last != 0) largest = std::max(largest, MolKeyScore(last));
      }
      bound = std::min(bound, largest);
    }
    return bound == kAll ||
           MolPruneFloor(answer.scores.back(), table_.model().shape().logits()) > bound;
  }

  // What all ranks have, rank after rank.
  template <typename T>
  absl::StatusOr<std::vector<T>> Gather(const std::vector<T>& mine) {
    Communicator& communicator = *group_.communicator;
    const auto n = static_cast<int64_t>(mine.size());
    std::vector<T> all(n * communicator.size());
    const ArenaScope scope(memory_);
    const OpInput<T> in(stream_, memory_, mine.data(), {n});
    const OpOutput<T> out(stream_, memory_, all.data(), kDTypeOf<T>,
                          {static_cast<int64_t>(all.size())});
    communicator.AllGather(stream_, in.view(), out.view());
    out.Fetch(stream_);
    RETURN_IF_ERROR(stream_.Synchronize());
    return all;
  }

  // A place crosses ranks as 12 bytes, score and id, which say all but how equal scores of
  // different ranks are ordered. All ranks see whether there are such; only then places in the
  // order follow, 4 bytes each.
  absl::Status Merge(int64_t k, const std::vector<RetrievalAnswer*>& answers) {
    const auto begin = std::chrono::steady_clock::now();
    const int64_t n = batch_ * k, ranks = group_.size();
    std::vector<int32_t> mine(n * kPlaceWords);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = found_.slots[i] < 0 ? -1 : shard_.IdOfSlot(found_.slots[i]);
      mine[i * kPlaceWords] = static_cast<int32_t>(found_.keys[i] >> 32);
      std::memcpy(&mine[i * kPlaceWords + 1], &id, sizeof(id));
    }
    ASSIGN_OR_RETURN(const std::vector<int32_t> all, Gather(mine));
    std::vector<uint64_t> keys(n * ranks);
    for (int64_t i = 0; i < n * ranks; ++i) {
      keys[i] = uint64_t{static_cast<uint32_t>(all[i * kPlaceWords])} << 32;
    }
    if (!FillAnswers(k, keys, all, answers)) {
      std::vector<int32_t> orders(n);
      for (int64_t i = 0; i < n; ++i) orders[i] = static_cast<int32_t>(found_.keys[i]);
      ASSIGN_OR_RETURN(const std::vector<int32_t> all_orders, Gather(orders));
      for (int64_t i = 0; i < n * ranks; ++i) keys[i] |= static_cast<uint32_t>(all_orders[i]);
      CHECK(FillAnswers(k, keys, all, answers)) << "two items have one place in the order";
    }
    if (counts_ != nullptr) {
      counts_->merge_seconds +=
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
    return absl::OkStatus();
  }

  // From all ranks' keys [ranks, B, k] and places. False where the keys leave the order open.
  bool FillAnswers(int64_t k, const std::vector<uint64_t>& keys, const std::vector<int32_t>& places,
                   const std::vector<RetrievalAnswer*>& answers) const {
    bool ordered = true;
    for (int64_t b = 0; b < batch_; ++b) {
      RetrievalAnswer& answer = *answers[b];
      answer.ids.clear();
      answer.scores.clear();
      ordered &= MergeKeys(keys.data() + b * k, group_.size(), k, batch_ * k, k,
                           [&](int64_t rank, int64_t index) {
                             const int64_t at = (rank * batch_ + b) * k + index;
                             int64_t id = 0;
                             std::memcpy(&id, &places[at * kPlaceWords + 1], sizeof(id));
                             answer.scores.push_back(MolKeyScore(keys[at]));
                             answer.ids.push_back(id);
                           });
      answer.ids.resize(k, -1);
      answer.scores.resize(k, -std::numeric_limits<float>::infinity());
    }
    return ordered;
  }

  const RetrievalTable& table_;
  const ItemShard& shard_;
  const RetrievalGroup& group_;
  Stream& stream_;
  const std::vector<uint32_t>* rows_;
  RetrievalCounts* counts_;
  RetrievalGraphs* graphs_;
  const RetrievalOptions& options_;
  const int64_t batch_;
  int64_t masks_count_ = 0, excluded_count_ = 0;
  bool replayed_ = false;
  std::optional<SearchWork> work_;  // of a search that is not replayed
  Arena memory_;
  SearchArrays arrays_;
  SearchFound found_;
};

}  // namespace trireme
