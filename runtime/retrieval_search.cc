#include "runtime/retrieval_search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "runtime/retrieval_memory.h"
#include "runtime/retrieval_scan_plan.h"

namespace trireme {
namespace {

// Queries of one scan: bounds the memory for masks and projections, and for 12 bytes a key.
constexpr int64_t kScanQueries = 64, kScanKeys = int64_t{1} << 24;
// Words of a place of an answer on its way to the other ranks.
constexpr int64_t kPlaceWords = 3;

size_t QueriesPerScan(const RetrievalOptions& options, int64_t logits) {
  int64_t keys = std::max<int64_t>(1, options.k);
  if (options.mode == RetrievalMode::kTwoStage)
    keys = std::max({keys, options.average_k, options.each_k * logits});
  return static_cast<size_t>(std::clamp<int64_t>(kScanKeys / keys, 1, kScanQueries));
}

absl::Status CheckQuery(const RetrievalQuery& query, const MolConfig& config) {
  if (static_cast<int64_t>(query.embedding.size()) != config.query_dim) {
    return absl::InvalidArgumentError(absl::StrCat("the query has ", query.embedding.size(),
                                                   " elements; the model's query_dim is ",
                                                   config.query_dim));
  }
  for (const float value : query.embedding) {
    if (!std::isfinite(value))
      return absl::InvalidArgumentError("the query holds NaN or infinite values");
  }
  if (query.user_id < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("user_id ", query.user_id, ": must be 0 or larger"));
  }
  return absl::OkStatus();
}

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
        counts_(context.counts) {}

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
    const ScanBytes bytes = ScanPlan(table_, group_, batch_)
                                .Bytes(options, static_cast<int64_t>(distinct.size()), excluded);
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
    components_ = Floats(shape_.query_components * shape_.component_dim);
    gates_ = Floats(shape_.gate_width());
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
  }

  // Fills ids and scores of the answers.
  absl::Status Exact(bool prune, int64_t k, const std::vector<RetrievalAnswer*>& answers) {
    KeyLists found(stream_, memory_, batch_, k);
    MolSearch(stream_, table_.model().gate(), queries(), shard_.view(), allowed(), prune,
              found.view(), Workspace(MolScanOp::kSearch, shard_.view().slots, k), scan_counts());
    RETURN_IF_ERROR(found.Fetch());
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
    for (int64_t b = 0; b < batch_; ++b) {
      // What the scores of items that are no candidates cannot exceed, rounding included.
      const float last = answers[b]->scores.back();
      answers[b]->exact =
          bound[b] == -std::numeric_limits<float>::infinity() || MolPruneFloor(last) > bound[b];
    }
    return absl::OkStatus();
  }

 private:
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
    mask_input_ = OpInput<int32_t>(stream_, memory_, masks_.data(), {masks, shard_.mask_words()});
    query_mask_input_ = Input(query_mask_);
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
  int64_t batch_ = 0;
  Arena memory_;
  TensorView components_, gates_;  // [B, Pq * d], [B, G]
  std::vector<int32_t> masks_, query_mask_, excluded_begin_, excluded_;
  OpInput<int32_t> mask_input_, query_mask_input_, excluded_begin_input_, excluded_input_;
};

using Filters = std::map<std::string, absl::StatusOr<Filter>>;

// Queries of one call, scan by scan.
class Searches {
 public:
  Searches(const RetrievalTable& table, const RetrievalGroup& group,
           const RetrievalContext& context, const std::vector<RetrievalQuery>& queries,
           const Filters& filters, std::vector<RetrievalAnswer>* answers)
      : table_(table),
        group_(group),
        context_(context),
        queries_(queries),
        filters_(filters),
        answers_(*answers) {}

  // Those queries. A batch that does not fit into some rank's memory is halved, as all ranks agree;
  // a query that does not fit alone fails alone.
  absl::Status Run(const std::vector<size_t>& some, const RetrievalOptions& how) {
    const size_t per_scan = QueriesPerScan(how, table_.model().shape().logits());
    size_t most = per_scan;
    for (size_t first = 0; first < some.size();) {
      const size_t count = std::min(some.size() - first, most);
      std::vector<const RetrievalQuery*> batch;
      std::vector<const Filter*> filters;
      std::vector<RetrievalAnswer*> answers;
      for (size_t i = first; i < first + count; ++i) {
        batch.push_back(&queries_[some[i]]);
        filters.push_back(&*filters_.at(batch.back()->filter));
        answers.push_back(&answers_[some[i]]);
      }
      Scan scan(table_, group_, context_);
      const absl::Status reserved = group_.Agree(scan.Reserve(batch, filters, how));
      if (absl::IsResourceExhausted(reserved) && count > 1) {
        most = count / 2;
        continue;
      }
      first += count;
      if (absl::IsResourceExhausted(reserved)) {
        *answers[0] = {.status = reserved, .ids = {}, .scores = {}};
        most = per_scan;
        continue;
      }
      RETURN_IF_ERROR(reserved);
      scan.Prepare(batch, filters);
      RETURN_IF_ERROR(how.mode == RetrievalMode::kTwoStage
                          ? scan.TwoStage(how, answers)
                          : scan.Exact(how.mode == RetrievalMode::kPruned, how.k, answers));
    }
    return absl::OkStatus();
  }

 private:
  const RetrievalTable& table_;
  const RetrievalGroup& group_;
  const RetrievalContext& context_;
  const std::vector<RetrievalQuery>& queries_;
  const Filters& filters_;
  std::vector<RetrievalAnswer>& answers_;
};

}  // namespace

absl::Status CheckRetrievalOptions(const RetrievalOptions& options) {
  const auto check = [](const char* what, int64_t value, int64_t smallest, int64_t largest) {
    if (value >= smallest && value <= largest) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(what, " ", value, ": must be from ", smallest, " to ", largest));
  };
  RETURN_IF_ERROR(check("k", options.k, 0, kMaxRetrievalK));
  if (options.mode != RetrievalMode::kTwoStage) return absl::OkStatus();
  RETURN_IF_ERROR(check("average_k", options.average_k, 1, kMaxFirstStageK));
  return check("each_k", options.each_k, 1, kMaxFirstStageK);
}

absl::StatusOr<std::vector<RetrievalAnswer>> SearchTable(const RetrievalTable& table,
                                                         const std::vector<RetrievalQuery>& queries,
                                                         const RetrievalOptions& options,
                                                         const RetrievalContext& context) {
  const RetrievalGroup& group = context.group != nullptr ? *context.group : table.group();
  RETURN_IF_ERROR(CheckRetrievalOptions(options));
  std::vector<RetrievalAnswer> answers(queries.size());
  // Every distinct filter once; the empty one is what queries without a filter have.
  Filters filters;
  std::vector<size_t> good;
  for (size_t i = 0; i < queries.size(); ++i) {
    answers[i].status = CheckQuery(queries[i], table.model().config());
    if (!answers[i].status.ok()) continue;
    const std::string& text = queries[i].filter;
    auto it = filters.find(text);
    if (it == filters.end()) {
      it = filters.emplace(text, ParseFilter(text, table.shard().options().attributes)).first;
    }
    answers[i].status = it->second.status();
    if (!answers[i].status.ok()) continue;
    answers[i].exact = true;
    if (options.k > 0) good.push_back(i);
  }
  const auto lock = table.shard().ReadLock();
  Searches searches(table, group, context, queries, filters, &answers);
  RETURN_IF_ERROR(searches.Run(good, options));
  if (options.mode != RetrievalMode::kTwoStage || !options.exact_or_certified) return answers;
  std::vector<size_t> again;
  for (const size_t i : good) {
    if (answers[i].status.ok() && !answers[i].exact) again.push_back(i);
  }
  RetrievalOptions pruned = options;
  pruned.mode = RetrievalMode::kPruned;
  RETURN_IF_ERROR(searches.Run(again, pruned));
  if (context.counts != nullptr) context.counts->rescanned += static_cast<int64_t>(again.size());
  return answers;
}

}  // namespace trireme
