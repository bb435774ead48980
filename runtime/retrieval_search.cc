#include "runtime/retrieval_search.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "runtime/retrieval_scan.h"

namespace trireme {
namespace {

// Keys of one scan: bounds the memory for 12 bytes a key.
constexpr int64_t kScanKeys = int64_t{1} << 24;
size_t QueriesPerScan(const RetrievalOptions& options, int64_t logits) {
  int64_t keys = std::max<int64_t>(1, options.k);
  if (options.mode == RetrievalMode::kTwoStage)
    keys = std::max({keys, options.average_k, options.each_k * logits});
  return static_cast<size_t>(std::clamp<int64_t>(kScanKeys / keys, 1, kMaxScanQueries));
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

// Why a query with finite elements may have no answer at all: they are too large for its projection
// in f32. Looked at afterwards, because that is rare and a search enqueues everything at once.
absl::Status CheckProjection(const RetrievalTable& table, Stream& stream,
                             const RetrievalQuery& query) {
  const MolModel& model = table.model();
  const int64_t width = model.shape().query_components * model.shape().component_dim;
  std::vector<float> components(width), gates(model.shape().gate_width());
  const std::vector<int32_t> users = model.UserRows({query.user_id});
  const int64_t floats = width + model.shape().gate_width() + model.config().query_dim;
  const size_t bytes = model.ArenaBytes(1) + (floats + users.size()) * sizeof(float) + 4 * 256;
  ASSIGN_OR_RETURN(Arena arena, table.search_memory().Take(stream.device(), bytes));
  {
    const OpInput<float> in(stream, arena, query.embedding.data(), {1, model.config().query_dim});
    const OpInput<int32_t> rows(stream, arena, users.data(), {model.user_tables(), 1});
    const OpOutput<float> out(stream, arena, components.data(), DType::kF32, {1, width});
    const OpOutput<float> gate(stream, arena, gates.data(), DType::kF32,
                               {1, model.shape().gate_width()});
    model.ProjectQueries(stream, in.view(), rows.view(), arena, out.view(), gate.view());
    out.Fetch(stream);
    gate.Fetch(stream);
  }
  RETURN_IF_ERROR(stream.Synchronize());
  table.search_memory().Give(std::move(arena));
  const auto finite = [](float value) { return std::isfinite(value); };
  if (std::all_of(components.begin(), components.end(), finite) &&
      std::all_of(gates.begin(), gates.end(), finite)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("the query is too large: its projection is not finite in f32");
}

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
      Scan scan(table_, group_, context_, how, static_cast<int64_t>(count));
      const absl::Status reserved = group_.Agree(scan.Reserve(batch, filters));
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
      RETURN_IF_ERROR(scan.Run(batch, filters, answers));
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
  for (const size_t i : good) {
    if (!answers[i].status.ok() || answers[i].ids[0] >= 0) continue;
    const absl::Status fits = CheckProjection(table, *group.stream, queries[i]);
    if (absl::IsInvalidArgument(fits)) answers[i] = {.status = fits, .ids = {}, .scores = {}};
  }
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
