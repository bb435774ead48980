// One scan of a rank's shard for a batch of queries, from their memory to the merged answers. Part
// of retrieval_search.cc.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "runtime/retrieval_graphs.h"
#include "runtime/retrieval_memory.h"
#include "runtime/retrieval_scan_plan.h"
#include "runtime/retrieval_search.h"

namespace trireme {

// Words of a place of an answer on its way to the other ranks.
inline constexpr int64_t kPlaceWords = 3;

// k keys and slots a list, as an op writes them and the host reads them.
class KeyLists {
 public:
  KeyLists(Stream& stream, Arena& memory, int64_t lists, int64_t k)
      : keys(lists * k),
        slots(lists * k, -1),
        stream_(stream),
        key_output_(stream, memory, keys.data(), DType::kI64, {lists, k}),
        slot_output_(stream, memory, slots.data(), DType::kI32, {lists, k}) {}
  MolTopK view() const { return {key_output_.view(), slot_output_.view()}; }
  // After the op: waits, and fills the arrays.
  absl::Status Fetch() {
    key_output_.Fetch(stream_);
    slot_output_.Fetch(stream_);
    return stream_.Synchronize();
  }

  std::vector<uint64_t> keys;
  std::vector<int32_t> slots;

 private:
  Stream& stream_;
  OpOutput<uint64_t> key_output_;
  OpOutput<int32_t> slot_output_;
};

// Some queries on their way through one scan of this rank's shard, and through the merge.
class Scan {
 public:
  Scan(const RetrievalTable& table, const RetrievalGroup& group, const RetrievalContext& context)
      : table_(table),
        shard_(table.shard()),
        shape_(table.model().shape()),
        group_(group),
        stream_(*group.stream),
        rows_(context.rows),
        counts_(context.counts),
        graphs_(context.graphs) {}

  ~Scan() { table_.search_memory().Give(std::move(memory_)); }

  // Takes all the memory of the device that the scan needs; first of all, so that nothing is on its
  // way when one rank lacks it.
  absl::Status Reserve(const std::vector<const RetrievalQuery*>& queries,
                       const std::vector<const Filter*>& filters, const RetrievalOptions& options) {
    batch_ = static_cast<int64_t>(queries.size());
    const std::set<const Filter*> distinct(filters.begin(), filters.end());
    int64_t excluded = 0;
    for (const RetrievalQuery* query : queries)
      excluded += static_cast<int64_t>(query->exclude_ids.size());
    ScanBytes bytes = ScanPlan(table_, group_, batch_)
                          .Bytes(options, static_cast<int64_t>(distinct.size()), excluded);
    // An op that counts its work waits for it, which no graph does.
    replayed_ = graphs_ != nullptr && counts_ == nullptr &&
                graphs_->Replays(options.mode, options.k, batch_, excluded);
    if (replayed_) bytes.masks = bytes.kernels = 0;  // the graphs have them
    auto memory = table_.search_memory().Take(stream_.device(), bytes.total());
    if (!memory.ok()) {
      const auto mega = [](size_t n) { return static_cast<double>(n) * 1e-6; };
      return absl::ResourceExhaustedError(absl::StrFormat(
          "retrieval search: a batch of %d with k %d needs %.1f MB on this rank (queries "
          "%.1f, masks %.1f, answers %.1f, kernels %.1f); use fewer candidates or a smaller table: "
          "%s",
          batch_, options.k, mega(bytes.total()), mega(bytes.queries), mega(bytes.masks),
          mega(bytes.answers), mega(bytes.kernels), memory.status().message()));
    }
    memory_ = *std::move(memory);
    return absl::OkStatus();
  }

  // Projects the queries and lays out what they may be answered with.
  void Prepare(const std::vector<const RetrievalQuery*>& queries,
               const std::vector<const Filter*>& filters) {
    components_ = replayed_ ? graphs_->components(batch_)
                            : Floats(shape_.query_components * shape_.component_dim);
    gates_ = replayed_ ? graphs_->gates(batch_) : Floats(shape_.gate_width());
    const MolConfig& config = table_.model().config();
    const TensorView raw = Floats(config.query_dim);
    std::vector<int64_t> users;
    for (int64_t b = 0; b < batch_; ++b) {
      stream_.Copy(raw.row<float>(b), queries[b]->embedding.data(),
                   config.query_dim * sizeof(float));
      users.push_back(queries[b]->user_id);
    }
    table_.model().ProjectQueries(stream_, raw, users, memory_, components_, gates_);
    FillMasks(filters);
    FillExcluded(queries);
    if (!replayed_) Upload();
  }

  // Fills ids and scores of the answers.
  absl::Status Exact(RetrievalMode mode, int64_t k, const std::vector<RetrievalAnswer*>& answers) {
    KeyLists found(stream_, memory_, batch_, k);
    RETURN_IF_ERROR(replayed_ ? Replay(mode, found) : Search(mode, k, found));
    RETURN_IF_ERROR(Merge(k, found, answers));
    for (RetrievalAnswer* answer : answers) answer->exact = true;
    return absl::OkStatus();
  }

  absl::Status TwoStage(const RetrievalOptions& options,
                        const std::vector<RetrievalAnswer*>& answers) {
    std::vector<std::vector<int32_t>> candidates(batch_);
    std::vector<float> bound(batch_, std::numeric_limits<float>::infinity());
    if (options.first_stage != FirstStage::kPerEmbedding)
      RETURN_IF_ERROR(Average(options.average_k, &candidates, &bound));
    if (options.first_stage != FirstStage::kAverage)
      RETURN_IF_ERROR(PerEmbedding(options.each_k, &candidates, &bound));
    std::vector<int32_t> begin = {0}, all;
    for (std::vector<int32_t>& list : candidates) {
      std::sort(list.begin(), list.end());
      list.erase(std::unique(list.begin(), list.end()), list.end());
      all.insert(all.end(), list.begin(), list.end());
      begin.push_back(static_cast<int32_t>(all.size()));
    }
    KeyLists found(stream_, memory_, batch_, options.k);
    const OpInput<int32_t> begins = Input(begin), slots = Input(all);
    MolRescore(stream_, table_.model().gate(), queries(), shard_.view(), begins.view(),
               slots.view(), found.view(),
               Workspace(MolScanOp::kRescore, static_cast<int64_t>(all.size()), options.k),
               scan_counts());
    RETURN_IF_ERROR(found.Fetch());
    RETURN_IF_ERROR(Merge(options.k, found, answers));
    const int64_t logits = table_.model().shape().logits();
    for (int64_t b = 0; b < batch_; ++b) {
      // What the scores of items that are no candidates cannot exceed, rounding included.
      const float last = answers[b]->scores.back();
      answers[b]->exact = bound[b] == -std::numeric_limits<float>::infinity() ||
                          MolPruneFloor(last, logits) > bound[b];
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Search(RetrievalMode mode, int64_t k, KeyLists& found) {
    const auto search = [&] {
      MolSearch(stream_, table_.model().gate(), queries(), shard_.view(), allowed(),
                mode == RetrievalMode::kPruned, found.view(),
                Workspace(MolScanOp::kSearch, shard_.view().slots, k), scan_counts());
    };
    graphs_ == nullptr ? search() : graphs_->RunEagerly(search);
    return found.Fetch();
  }
  absl::Status Replay(RetrievalMode mode, KeyLists& found) {
    graphs_->Replay(mode, {.batch = batch_,
                           .masks = &masks_,
                           .query_mask = &query_mask_,
                           .excluded_begin = &excluded_begin_,
                           .excluded = &excluded_,
                           .keys = &found.keys,
                           .slots = &found.slots});
    return stream_.Synchronize();
  }

  TensorView Floats(int64_t columns) { return memory_.Allocate(DType::kF32, {batch_, columns}); }
  OpInput<int32_t> Input(const std::vector<int32_t>& values) {
    return {stream_, memory_, values.data(), {static_cast<int64_t>(values.size())}};
  }
  // What an op of this kind works in.
  TensorView Workspace(MolScanOp op, int64_t items, int64_t k) {
    const MolScanSize size{op, shard_.options().storage, batch_, items, k};
    return memory_.Allocate(DType::kU8, {MolWorkspaceBytes(stream_, shape_, size)});
  }
  MolQueries queries() const { return {components_, gates_}; }
  MolAllowed allowed() const {
    MolAllowed allowed;
    allowed.masks = mask_input_.view();
    allowed.query_mask = query_mask_input_.view();
    if (!excluded_.empty()) {
      allowed.excluded_begin = excluded_begin_input_.view();
      allowed.excluded = excluded_input_.view();
    }
    return allowed;
  }
  MolScanCounts* scan_counts() { return counts_ == nullptr ? nullptr : &counts_->scan; }

  // One mask for every distinct filter.
  void FillMasks(const std::vector<const Filter*>& filters) {
    std::map<const Filter*, int32_t> known;
    std::vector<const Filter*> distinct;
    for (const Filter* filter : filters) {
      const auto [it, is_new] = known.emplace(filter, static_cast<int32_t>(distinct.size()));
      if (is_new) distinct.push_back(filter);
      query_mask_.push_back(it->second);
    }
    const auto masks = static_cast<int64_t>(distinct.size());
    masks_.resize(masks * shard_.mask_words());
    for (int64_t f = 0; f < masks; ++f) {
      shard_.FillMask(*distinct[f], rows_, masks_.data() + f * shard_.mask_words());
    }
  }

  void FillExcluded(const std::vector<const RetrievalQuery*>& queries) {
    excluded_begin_ = {0};
    for (const RetrievalQuery* query : queries) {
      const auto begin = static_cast<int64_t>(excluded_.size());
      for (const int64_t id : query->exclude_ids) {
        if (const auto slot = shard_.Find(id)) excluded_.push_back(*slot);
      }
      std::sort(excluded_.begin() + begin, excluded_.end());
      excluded_begin_.push_back(static_cast<int32_t>(excluded_.size()));
    }
  }

  // Masks and lists as the ops read them.
  void Upload() {
    const int64_t words = shard_.mask_words();
    const int64_t masks = words > 0 ? static_cast<int64_t>(masks_.size()) / words : 1;
    mask_input_ = OpInput<int32_t>(stream_, memory_, masks_.data(), {masks, words});
    query_mask_input_ = Input(query_mask_);
    excluded_begin_input_ = Input(excluded_begin_);
    excluded_input_ = Input(excluded_);
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

  // Of every list the k-th best key over all ranks, or 0 where there are fewer.
  absl::StatusOr<std::vector<uint64_t>> LastKeys(const std::vector<uint64_t>& keys, int64_t lists,
                                                 int64_t k) {
    ASSIGN_OR_RETURN(const std::vector<uint64_t> all, Gather(keys));
    std::vector<uint64_t> last(lists);
    for (int64_t i = 0; i < lists; ++i) {
      int64_t taken = 0;
      MergeKeys(all.data() + i * k, group_.size(), k, lists * k, k,
                [&](int64_t rank, int64_t index) {
                  if (++taken == k) last[i] = all[(rank * lists + i) * k + index];
                });
    }
    return last;
  }

  absl::Status Average(int64_t k, std::vector<std::vector<int32_t>>* candidates,
                       std::vector<float>* bound) {
    const ArenaScope scope(memory_);
    KeyLists found(stream_, memory_, batch_, k);
    MolAverageTopK(stream_, shape_, queries(), shard_.view(), allowed(), found.view(),
                   Workspace(MolScanOp::kAverage, shard_.view().slots, k), scan_counts());
    RETURN_IF_ERROR(found.Fetch());
    ASSIGN_OR_RETURN(const std::vector<uint64_t> last, LastKeys(found.keys, batch_, k));
    for (int64_t b = 0; b < batch_; ++b) {
      Take(found, b, k, last[b], &(*candidates)[b]);
      // Fewer than asked for: these are all there are.
      if (last[b] == 0) (*bound)[b] = -std::numeric_limits<float>::infinity();
    }
    return absl::OkStatus();
  }

  absl::Status PerEmbedding(int64_t k, std::vector<std::vector<int32_t>>* candidates,
                            std::vector<float>* bound) {
    const int64_t logits = shape_.logits();
    const ArenaScope scope(memory_);
    KeyLists found(stream_, memory_, batch_ * logits, k);
    MolLogitTopK(stream_, shape_, queries(), shard_.view(), allowed(), found.view(),
                 Workspace(MolScanOp::kLogits, shard_.view().slots, k), scan_counts());
    RETURN_IF_ERROR(found.Fetch());
    ASSIGN_OR_RETURN(const std::vector<uint64_t> last, LastKeys(found.keys, batch_ * logits, k));
    for (int64_t b = 0; b < batch_; ++b) {
      float largest = -std::numeric_limits<float>::infinity();
      for (int64_t l = 0; l < logits; ++l) {
        const int64_t list = b * logits + l;
        Take(found, list, k, last[list], &(*candidates)[b]);
        if (last[list] != 0) largest = std::max(largest, MolKeyScore(last[list]));
      }
      (*bound)[b] = std::min((*bound)[b], largest);
    }
    return absl::OkStatus();
  }

  // This rank's slots among the best of all ranks.
  static void Take(const KeyLists& found, int64_t list, int64_t k, uint64_t last,
                   std::vector<int32_t>* out) {
    for (int64_t j = list * k; j < (list + 1) * k && found.keys[j] != 0 && found.keys[j] >= last;
         ++j) {
      out->push_back(found.slots[j]);
    }
  }

  // A place crosses ranks as 12 bytes, score and id, which say all but how equal scores of
  // different ranks are ordered. All ranks see whether there are such; only then places in the
  // order follow, 4 bytes each.
  absl::Status Merge(int64_t k, const KeyLists& found,
                     const std::vector<RetrievalAnswer*>& answers) {
    const auto begin = std::chrono::steady_clock::now();
    const int64_t n = batch_ * k, ranks = group_.size();
    std::vector<int32_t> mine(n * kPlaceWords);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = found.slots[i] < 0 ? -1 : shard_.IdOfSlot(found.slots[i]);
      mine[i * kPlaceWords] = static_cast<int32_t>(found.keys[i] >> 32);
      std::memcpy(&mine[i * kPlaceWords + 1], &id, sizeof(id));
    }
    ASSIGN_OR_RETURN(const std::vector<int32_t> all, Gather(mine));
    std::vector<uint64_t> keys(n * ranks);
    for (int64_t i = 0; i < n * ranks; ++i) {
      keys[i] = uint64_t{static_cast<uint32_t>(all[i * kPlaceWords])} << 32;
    }
    if (!FillAnswers(k, keys, all, answers)) {
      std::vector<int32_t> orders(n);
      for (int64_t i = 0; i < n; ++i) orders[i] = static_cast<int32_t>(found.keys[i]);
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
  const MolShape& shape_;
  const RetrievalGroup& group_;
  Stream& stream_;
  const std::vector<uint32_t>* rows_;
  RetrievalCounts* counts_;
  RetrievalGraphs* graphs_;
  int64_t batch_ = 0;
  bool replayed_ = false;
  Arena memory_;
  TensorView components_, gates_;  // [B, Pq * d], [B, G]
  std::vector<int32_t> masks_, query_mask_, excluded_begin_, excluded_;
  OpInput<int32_t> mask_input_, query_mask_input_, excluded_begin_input_, excluded_input_;
};

}  // namespace trireme
