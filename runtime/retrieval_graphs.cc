#include "runtime/retrieval_graphs.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "runtime/decode_graphs.h"

namespace trireme {
namespace {

std::string_view WorkOf(RetrievalMode mode) {
  switch (mode) {
    case RetrievalMode::kExact:
      return "exact search";
    case RetrievalMode::kPruned:
      return "pruned search";
    case RetrievalMode::kTwoStage:
      return "two-stage search";
  }
  return "?";
}

// Whether they are the same work on the device.
bool SameWork(RetrievalOptions a, RetrievalOptions b) {
  if (a.mode != b.mode || a.k != b.k) return false;
  if (a.mode != RetrievalMode::kTwoStage) return true;
  a.exact_or_certified = b.exact_or_certified = false;  // the host's, afterwards
  if (a.first_stage == FirstStage::kAverage) a.each_k = b.each_k;
  if (a.first_stage == FirstStage::kPerEmbedding) a.average_k = b.average_k;
  return a == b;
}

}  // namespace

RetrievalGraphs::RetrievalGraphs(const RetrievalTable& table, const RetrievalGroup& group,
                                 RetrievalGraphOptions options)
    : table_(table), group_(group), stream_(*group.stream), options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<RetrievalGraphs>> RetrievalGraphs::Create(
    const RetrievalTable& table, const RetrievalGroup& group,
    const RetrievalGraphOptions& options) {
  RetrievalGraphOptions wanted = options;
  if (!wanted.never) wanted.never = GraphCache::WhyNever(*group.stream);
  std::unique_ptr<RetrievalGraphs> graphs(new RetrievalGraphs(table, group, std::move(wanted)));
  const bool captures = !graphs->options_.never;
  RETURN_IF_ERROR(group.Agree(captures ? graphs->TakeMemory() : absl::OkStatus()));
  if (captures) {
    graphs->CaptureAll();
    RETURN_IF_ERROR(group.Agree(group.stream->Fault()));
    graphs->TellOfCaptures();
  }
  return graphs;
}

bool RetrievalGraphs::Collective(const RetrievalOptions& search) const {
  return search.mode == RetrievalMode::kTwoStage && group_.size() > 1;
}

GraphKey RetrievalGraphs::KeyOf(const Entry& entry) const {
  return {.work = WorkOf(options_.searches[entry.search].mode),
          .size = entry.batch,
          .variant = static_cast<int64_t>(entry.search)};
}

absl::Status RetrievalGraphs::TakeMemory() {
  CHECK(!options_.batches.empty() &&
        std::is_sorted(options_.batches.begin(), options_.batches.end()));
  const int64_t most = options_.batches.back();
  const int64_t excluded = std::max<int64_t>(1, options_.max_excluded);
  ScanBytes inputs;
  SearchInputs::Plan(table_, most, 1 + most, excluded, &inputs);
  size_t largest = 0;
  for (size_t i = 0; i < options_.searches.size(); ++i) {
    RETURN_IF_ERROR(CheckRetrievalOptions(options_.searches[i]));
    CHECK_GT(options_.searches[i].k, 0);
    if (Collective(options_.searches[i]) && !group_.communicator->capturable()) continue;
    for (const int64_t batch : options_.batches) {
      entries_.push_back({i, batch, SearchWork(table_, group_, options_.searches[i], batch)});
      largest = std::max(largest, entries_.back().work.bytes().total());
    }
  }
  if (entries_.empty()) return absl::OkStatus();
  auto memory = Arena::Create(stream_.device(), inputs.total() + largest);
  if (!memory.ok()) {
    const absl::Status lacks = absl::ResourceExhaustedError(absl::StrFormat(
        "retrieval graphs: searches of up to %d queries with k %d need %.1f MB on this rank; use "
        "fewer, or --no-graphs: %s",
        most, options_.searches[0].k, static_cast<double>(inputs.total() + largest) * 1e-6,
        memory.status().message()));
    return WithRetrievalLedger(lacks, group_, table_, nullptr);
  }
  memory_ = *std::move(memory);
  inputs_ = SearchInputs::Take(table_, most, 1 + most, excluded, memory_);
  const size_t begin = memory_.used();
  for (Entry& entry : entries_) {
    memory_.Rewind(begin);
    entry.work.Take(memory_);
    entry.end = memory_.used();
  }
  return absl::OkStatus();
}

SearchInputs RetrievalGraphs::InputsOf(int64_t batch) const {
  SearchInputs in = inputs_;
  in.queries = in.queries.Rows(0, batch);
  in.user_rows = TensorView(in.user_rows.data, DType::kI32, {in.user_rows.dim(0), batch});
  in.query_mask = in.query_mask.Rows(0, batch);
  in.excluded_begin = in.excluded_begin.Rows(0, batch + 1);
  return in;
}

void RetrievalGraphs::CaptureAll() {
  // Each rank for itself, but for what they do together.
  const auto all_ranks = [this](bool here) {
    if (!capturing_collective_) return here;
    return group_.Agree(here ? absl::OkStatus() : absl::AbortedError("not here")).ok();
  };
  cache_ = GraphCache({.never = options_.never, .all_ranks = all_ranks});
  // Replays and eager runs must see the same items.
  const auto lock = table_.shard().ReadLock();
  for (Entry& entry : entries_) {
    capturing_collective_ = Collective(options_.searches[entry.search]);
    cache_.Capture(stream_, KeyOf(entry),
                   {.fill = [&](int round) { FillTrial(entry, round); },
                    .work = [&] { Run(entry); },
                    .outputs = entry.work.outputs()});
  }
}

void RetrievalGraphs::TellOfCaptures() const {
  absl::Status refusal = cache_.refusal();
  if (absl::IsResourceExhausted(refusal)) {
    refusal = WithRetrievalLedger(
        absl::ResourceExhaustedError(absl::StrCat(
            std::string(refusal.message()), "; use more ranks or a smaller table, or --no-graphs")),
        group_, table_, this);
  }
  TellRefusal(group_.control, refusal, options_.warn);
}

// All items against no two queries alike, in the other round half of them; each query excludes two
// slots, or none.
void RetrievalGraphs::FillTrial(Entry& entry, int round) {
  SearchArrays in;
  const int64_t batch = entry.batch;
  in.queries.resize(inputs_.queries.Rows(0, batch).elements());
  for (size_t i = 0; i < in.queries.size(); ++i) {
    in.queries[i] =
        static_cast<float>((static_cast<int64_t>(i) * 37 + 11 * round) % 101) / 500.0f - 0.1f;
  }
  std::vector<int64_t> users(batch);
  for (int64_t b = 0; b < batch; ++b) users[b] = 3 * b + 5 * round;
  in.user_rows = table_.model().UserRows(users);
  in.masks.resize(table_.shard().mask_words());
  in.query_mask.resize(batch);
  in.excluded_begin.resize(batch + 1);
  table_.shard().FillMask({}, nullptr, in.masks.data());
  if (round == 1) {
    for (int32_t& word : in.masks) word &= 0x5a5a5a5a;
    for (int64_t b = 0; b < batch && 2 * (b + 1) <= options_.max_excluded; ++b) {
      in.excluded.insert(in.excluded.end(), {1, 3});
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    in.excluded_begin[b + 1] =
        std::min<int32_t>(static_cast<int32_t>(in.excluded.size()), in.excluded_begin[b] + 2);
  }
  CopyInputs(in, batch, batch);
  entry.work.Begin(stream_);
  stream_.Synchronize().IgnoreError();  // the arrays go; a fault waits for the trial's end
}

void RetrievalGraphs::CopyInputs(const SearchArrays& in, int64_t batch, int64_t padded) {
  const auto copy = [&](void* to, const auto& from) {
    stream_.Copy(to, from.data(), from.size() * sizeof(from[0]));
  };
  copy(inputs_.queries.data, in.queries);
  user_rows_.assign(table_.model().user_tables() * padded, 0);
  for (int64_t t = 0; t < table_.model().user_tables(); ++t) {
    std::copy_n(in.user_rows.begin() + t * batch, batch, user_rows_.begin() + t * padded);
  }
  copy(inputs_.user_rows.data, user_rows_);
  // Row 0 stays as it was made: nothing is allowed.
  copy(inputs_.masks.row<int32_t>(1), in.masks);
  query_mask_.assign(padded, 0);
  for (int64_t b = 0; b < batch; ++b) query_mask_[b] = 1 + in.query_mask[b];
  copy(inputs_.query_mask.data, query_mask_);
  excluded_begin_ = in.excluded_begin;
  excluded_begin_.resize(padded + 1, excluded_begin_.back());
  copy(inputs_.excluded_begin.data, excluded_begin_);
  copy(inputs_.excluded.data, in.excluded);
}

void RetrievalGraphs::Run(Entry& entry) {
  memory_.Rewind(entry.end);  // what projects the queries lies behind it
  entry.work.Enqueue(stream_, memory_, InputsOf(entry.batch));
}

const RetrievalGraphs::Entry* RetrievalGraphs::Find(const RetrievalOptions& search,
                                                    int64_t batch) const {
  const int64_t padded = BucketOf(options_.batches, batch);
  for (const Entry& entry : entries_) {
    if (entry.batch == padded && SameWork(options_.searches[entry.search], search)) return &entry;
  }
  return nullptr;
}

bool RetrievalGraphs::Replays(const RetrievalOptions& search, int64_t batch,
                              int64_t excluded) const {
  const Entry* const entry = Find(search, batch);
  return entry != nullptr && excluded <= options_.max_excluded && cache_.Holds(KeyOf(*entry));
}

void RetrievalGraphs::Replay(const RetrievalOptions& search, int64_t batch, const SearchArrays& in,
                             SearchFound* found) {
  Entry& entry = entries_[Find(search, batch) - entries_.data()];
  CopyInputs(in, batch, entry.batch);
  entry.work.Begin(stream_);
  cache_.Run(stream_, KeyOf(entry), [&] { Run(entry); });
  entry.work.Fetch(stream_, batch, found);
}

void RetrievalGraphs::RunEagerly(const RetrievalOptions& search, int64_t batch,
                                 absl::FunctionRef<void()> work) {
  const Entry* const entry = Find(search, batch);
  if (entry != nullptr && !cache_.Holds(KeyOf(*entry))) {
    return cache_.Run(stream_, KeyOf(*entry), work);
  }
  const bool by_host = Collective(search) && !group_.communicator->capturable();
  cache_.RunEagerly(
      options_.never.value_or(by_host ? EagerReason::kCommunicator : EagerReason::kNotCaptured),
      work);
}

Ledger RetrievalLedger(const RetrievalTable& table, const RetrievalGraphs* graphs) {
  Ledger held;
  held[Owner::kWeights] = table.model().weight_bytes();
  held[Owner::kItems] = table.shard().device_bytes();
  held[Owner::kActivations] = table.search_memory().bytes();
  if (graphs == nullptr) return held;
  held[Owner::kActivations] += graphs->bytes();
  held[Owner::kGraphs] = graphs->stats().bytes;
  return held;
}

absl::Status WithRetrievalLedger(const absl::Status& status, const RetrievalGroup& group,
                                 const RetrievalTable& table, const RetrievalGraphs* graphs) {
  return WithTable(status, group.rank(), group.control != nullptr ? group.control->host() : "alone",
                   "holds", HeldTable(RetrievalLedger(table, graphs)));
}

}  // namespace trireme
