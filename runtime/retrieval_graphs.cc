#include "runtime/retrieval_graphs.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/status.h"
#include "runtime/decode_graphs.h"

namespace trireme {
namespace {

GraphKey KeyOf(RetrievalMode mode, int64_t batch) {
  return {.work = mode == RetrievalMode::kPruned ? "pruned search" : "exact search", .size = batch};
}

size_t Bytes(const TensorView& view) { return static_cast<size_t>(view.bytes()); }

}  // namespace

RetrievalGraphs::RetrievalGraphs(const RetrievalTable& table, Stream& stream,
                                 RetrievalGraphOptions options)
    : table_(table), stream_(stream), options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<RetrievalGraphs>> RetrievalGraphs::Create(
    const RetrievalTable& table, const RetrievalGroup& group,
    const RetrievalGraphOptions& options) {
  RetrievalGraphOptions wanted = options;
  if (!wanted.never) wanted.never = GraphCache::WhyNever(*group.stream);
  std::unique_ptr<RetrievalGraphs> graphs(
      new RetrievalGraphs(table, *group.stream, std::move(wanted)));
  const bool captures = !graphs->options_.never;
  RETURN_IF_ERROR(group.Agree(captures ? graphs->TakeMemory() : absl::OkStatus()));
  if (captures) graphs->CaptureAll();
  return graphs;
}

int64_t RetrievalGraphs::WorkspaceBytes() const {
  const MolTableView view = table_.shard().view();
  int64_t bytes = 0;
  for (const int64_t batch : options_.batches) {
    const MolScanSize size{MolScanOp::kSearch, view.storage, batch, view.slots, options_.k};
    bytes = std::max(bytes, MolWorkspaceBytes(stream_, table_.model().shape(), size));
  }
  return bytes;
}

absl::Status RetrievalGraphs::TakeMemory() {
  const MolShape& shape = table_.model().shape();
  CHECK(!options_.batches.empty() &&
        std::is_sorted(options_.batches.begin(), options_.batches.end()));
  const int64_t batch = options_.batches.back(), words = table_.shard().mask_words();
  const std::pair<TensorView*, std::pair<DType, Shape>> all[] = {
      {&places_.components, {DType::kF32, {batch, shape.query_components * shape.component_dim}}},
      {&places_.gates, {DType::kF32, {batch, shape.gate_width()}}},
      {&places_.masks, {DType::kI32, {1 + batch, words}}},
      {&places_.query_mask, {DType::kI32, {batch}}},
      {&places_.excluded_begin, {DType::kI32, {batch + 1}}},
      {&places_.excluded, {DType::kI32, {std::max<int64_t>(1, options_.max_excluded)}}},
      {&places_.keys, {DType::kI64, {batch, options_.k}}},
      {&places_.slots, {DType::kI32, {batch, options_.k}}},
      {&places_.workspace, {DType::kU8, {WorkspaceBytes()}}}};
  size_t bytes = 0;
  for (const auto& [view, what] : all) bytes += Arena::Footprint(what.first, what.second);
  auto memory = Arena::Create(stream_.device(), bytes);
  if (!memory.ok()) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "retrieval graphs: searches of up to %d queries with k %d need %.1f MB on this rank; use "
        "fewer, or --no-graphs: %s",
        batch, options_.k, static_cast<double>(bytes) * 1e-6, memory.status().message()));
  }
  memory_ = *std::move(memory);
  for (const auto& [view, what] : all) *view = memory_.Allocate(what.first, what.second);
  return absl::OkStatus();
}

void RetrievalGraphs::CaptureAll() {
  cache_ = GraphCache({.never = options_.never, .warn = options_.warn});
  // Replays and eager runs must see the same items.
  const auto lock = table_.shard().ReadLock();
  for (const RetrievalMode mode : options_.modes) {
    CHECK(mode != RetrievalMode::kTwoStage) << "its stages are the host's";
    for (const int64_t batch : options_.batches) {
      cache_.Capture(stream_, KeyOf(mode, batch),
                     {.fill = [&](int round) { FillTrial(batch, round); },
                      .work = [&] { Search(mode, batch); },
                      .outputs = {places_.keys.Rows(0, batch), places_.slots.Rows(0, batch)}});
    }
  }
}

// All items against no two queries alike, in the other round half of them; each query excludes two
// slots, or none.
void RetrievalGraphs::FillTrial(int64_t batch, int round) {
  const auto fill = [&](const TensorView& to, int64_t salt) {
    std::vector<float> values(to.Rows(0, batch).elements());
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>((static_cast<int64_t>(i) * 37 + salt) % 101) / 500.0f - 0.1f;
    }
    stream_.Copy(to.data, values.data(), values.size() * sizeof(float));
    CHECK(stream_.Synchronize().ok());  // the values go
  };
  fill(places_.components, 11 * round);
  fill(places_.gates, 5 + 17 * round);
  std::vector<int32_t> masks(table_.shard().mask_words()), which(batch), begin(batch + 1), slots;
  table_.shard().FillMask({}, nullptr, masks.data());
  if (round == 1) {
    for (int32_t& word : masks) word &= 0x5a5a5a5a;
    for (int64_t b = 0; b < batch && 2 * (b + 1) <= options_.max_excluded; ++b) {
      slots.insert(slots.end(), {1, 3});
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    begin[b + 1] = std::min<int32_t>(static_cast<int32_t>(slots.size()), begin[b] + 2);
  }
  CopyInputs({.batch = batch,
              .masks = &masks,
              .query_mask = &which,
              .excluded_begin = &begin,
              .excluded = &slots},
             batch);
  CHECK(stream_.Synchronize().ok());
}

void RetrievalGraphs::CopyInputs(const RetrievalReplay& search, int64_t padded) {
  const auto copy = [&](void* to, const std::vector<int32_t>& from) {
    stream_.Copy(to, from.data(), from.size() * sizeof(int32_t));
  };
  // Row 0 stays as it was made: nothing is allowed.
  copy(places_.masks.row<int32_t>(1), *search.masks);
  query_mask_.assign(padded, 0);
  for (int64_t b = 0; b < search.batch; ++b) query_mask_[b] = 1 + (*search.query_mask)[b];
  copy(places_.query_mask.data, query_mask_);
  excluded_begin_ = *search.excluded_begin;
  excluded_begin_.resize(padded + 1, excluded_begin_.back());
  copy(places_.excluded_begin.data, excluded_begin_);
  copy(places_.excluded.data, *search.excluded);
}

void RetrievalGraphs::Search(RetrievalMode mode, int64_t batch) {
  MolAllowed allowed;
  allowed.masks = places_.masks;
  allowed.query_mask = places_.query_mask.Rows(0, batch);
  allowed.excluded_begin = places_.excluded_begin.Rows(0, batch + 1);
  allowed.excluded = places_.excluded;
  MolSearch(stream_, table_.model().gate(), {components(batch), gates(batch)},
            table_.shard().view(), allowed, mode == RetrievalMode::kPruned,
            {places_.keys.Rows(0, batch), places_.slots.Rows(0, batch)}, places_.workspace,
            /*counts=*/nullptr);
}

bool RetrievalGraphs::Replays(RetrievalMode mode, int64_t k, int64_t batch,
                              int64_t excluded) const {
  const int64_t padded = BucketOf(options_.batches, batch);
  return k == options_.k && padded > 0 && excluded <= options_.max_excluded &&
         cache_.Holds(KeyOf(mode, padded));
}

void RetrievalGraphs::Replay(RetrievalMode mode, const RetrievalReplay& search) {
  const int64_t padded = BucketOf(options_.batches, search.batch);
  CopyInputs(search, padded);
  cache_.Run(stream_, KeyOf(mode, padded), [&] { Search(mode, padded); });
  stream_.Copy(search.keys->data(), places_.keys.data, Bytes(places_.keys.Rows(0, search.batch)));
  stream_.Copy(search.slots->data(), places_.slots.data,
               Bytes(places_.slots.Rows(0, search.batch)));
}

void RetrievalGraphs::RunEagerly(absl::FunctionRef<void()> work) {
  cache_.RunEagerly(options_.never.value_or(EagerReason::kNotCaptured), work);
}

}  // namespace trireme
