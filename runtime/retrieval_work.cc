#include "runtime/retrieval_work.h"

#include <algorithm>

namespace trireme {
namespace {

// Calls place(owner, view, dtype, shape) for all of SearchInputs.
template <typename Place>
void ForEachInput(const RetrievalTable& table, int64_t batch, int64_t masks, int64_t excluded,
                  SearchInputs& in, Place&& place) {
  const MolModel& model = table.model();
  place(&ScanBytes::queries, in.queries, DType::kF32, {batch, model.config().query_dim});
  place(&ScanBytes::queries, in.user_rows, DType::kI32, {model.user_tables(), batch});
  place(&ScanBytes::masks, in.masks, DType::kI32, {masks, table.shard().mask_words()});
  place(&ScanBytes::masks, in.query_mask, DType::kI32, {batch});
  if (excluded == 0) return;
  place(&ScanBytes::masks, in.excluded_begin, DType::kI32, {batch + 1});
  place(&ScanBytes::masks, in.excluded, DType::kI32, {excluded});
}

void CopyToHost(Stream& stream, const TensorView& from, int64_t count, auto* to) {
  to->resize(count);
  stream.Copy(to->data(), from.data, count * sizeof((*to)[0]));
}

}  // namespace

void SearchInputs::Plan(const RetrievalTable& table, int64_t batch, int64_t masks, int64_t excluded,
                        ScanBytes* bytes) {
  SearchInputs in;
  ForEachInput(table, batch, masks, excluded, in,
               [&](size_t ScanBytes::*owner, TensorView&, DType dtype, const Shape& shape) {
                 bytes->*owner += Arena::Footprint(dtype, shape);
               });
}

SearchInputs SearchInputs::Take(const RetrievalTable& table, int64_t batch, int64_t masks,
                                int64_t excluded, Arena& arena) {
  SearchInputs in;
  ForEachInput(table, batch, masks, excluded, in,
               [&](size_t ScanBytes::*, TensorView& view, DType dtype, const Shape& shape) {
                 view = arena.Allocate(dtype, shape);
               });
  return in;
}

SearchWork::SearchWork(const RetrievalTable& table, const RetrievalGroup& group,
                       const RetrievalOptions& options, int64_t batch)
    : table_(table), group_(group), options_(options), batch_(batch) {
  if (two_stage()) {
    if (options.first_stage != FirstStage::kPerEmbedding) {
      average_.lists = 1;
      average_.k = options.average_k;
    }
    if (options.first_stage != FirstStage::kAverage) {
      each_.lists = table.model().shape().logits();
      each_.k = options.each_k;
    }
    const int64_t slots = table.shard().mask_words() * kMolBlockRows;
    candidates_room_ = batch * std::min(slots, average_.k + each_.lists * each_.k);
  }
  PlanKernels();
  ForEachPlace([&](size_t ScanBytes::*owner, TensorView&, DType dtype, const Shape& shape) {
    bytes_.*owner += Arena::Footprint(dtype, shape);
  });
  bytes_.queries += table.model().ArenaBytes(batch);
}

void SearchWork::PlanKernels() {
  const int64_t slots = table_.shard().mask_words() * kMolBlockRows;
  const auto plan = [&](MolScanOp op, int64_t items, int64_t k) {
    const MolScanSize size{op, table_.shard().options().storage, batch_, items, k};
    workspace_bytes_ =
        std::max(workspace_bytes_, MolWorkspaceBytes(*group_.stream, table_.model().shape(), size));
  };
  if (!two_stage()) return plan(MolScanOp::kSearch, slots, options_.k);
  if (average_.k > 0) plan(MolScanOp::kAverage, slots, average_.k);
  if (each_.k > 0) plan(MolScanOp::kLogits, slots, each_.k);
  plan(MolScanOp::kCandidates, slots, 1);
  plan(MolScanOp::kRescore, candidates_room_, options_.k);
}

// In the order of their memory.
template <typename Place>
void SearchWork::ForEachPlace(Place&& place) {
  const MolShape& shape = table_.model().shape();
  place(&ScanBytes::queries, components_, DType::kF32,
        {batch_, shape.query_components * shape.component_dim});
  place(&ScanBytes::queries, gates_, DType::kF32, {batch_, shape.gate_width()});
  int64_t gathered = 0;
  for (Stage* stage : {&average_, &each_}) {
    if (stage->k == 0) continue;
    const int64_t lists = batch_ * stage->lists;
    place(&ScanBytes::answers, stage->keys, DType::kI64, {lists, stage->k});
    place(&ScanBytes::answers, stage->slots, DType::kI32, {lists, stage->k});
    place(&ScanBytes::answers, stage->last, DType::kI64, {lists});
    gathered = std::max(gathered, group_.size() * lists * stage->k);
  }
  if (two_stage()) {
    if (group_.size() > 1) place(&ScanBytes::answers, gathered_, DType::kI64, {gathered});
    place(&ScanBytes::answers, candidates_begin_, DType::kI32, {batch_ + 1});
    place(&ScanBytes::answers, candidates_, DType::kI32, {candidates_room_});
  }
  place(&ScanBytes::answers, keys_, DType::kI64, {batch_, options_.k});
  place(&ScanBytes::answers, slots_, DType::kI32, {batch_, options_.k});
  place(&ScanBytes::answers, counts_, DType::kI64, {3});
  place(&ScanBytes::kernels, workspace_, DType::kU8, {workspace_bytes_});
}

void SearchWork::Take(Arena& arena) {
  ForEachPlace([&](size_t ScanBytes::*, TensorView& view, DType dtype, const Shape& shape) {
    view = arena.Allocate(dtype, shape);
  });
}

void SearchWork::Begin(Stream& stream) {
  static constexpr std::array<int64_t, 3> kNone{};
  stream.Copy(counts_.data, kNone.data(), sizeof(kNone));
}

// The last of a stage's keys over all ranks.
void SearchWork::End(Stream& stream, const Stage& stage) {
  if (group_.size() == 1) return MolLastKeys(stream, stage.keys, stage.last);
  const TensorView all(gathered_.data, DType::kI64, {group_.size() * stage.keys.dim(0), stage.k});
  group_.communicator->AllGather(stream, stage.keys, all);
  MolLastKeys(stream, all, stage.last);
}

void SearchWork::Enqueue(Stream& stream, Arena& arena, const SearchInputs& in) {
  const MolModel& model = table_.model();
  const MolTableView view = table_.shard().view();
  model.ProjectQueries(stream, in.queries, in.user_rows, arena, components_, gates_);
  const MolQueries queries{components_, gates_};
  MolAllowed allowed;
  allowed.masks = in.masks;
  allowed.query_mask = in.query_mask;
  allowed.excluded_begin = in.excluded_begin;
  allowed.excluded = in.excluded;
  if (!two_stage()) {
    return MolSearch(stream, model.gate(), queries, view, allowed,
                     options_.mode == RetrievalMode::kPruned, {keys_, slots_}, workspace_, counts_);
  }
  std::vector<MolStage> stages;
  if (average_.k > 0) {
    MolAverageTopK(stream, model.shape(), queries, view, allowed, {average_.keys, average_.slots},
                   workspace_, counts_);
    End(stream, average_);
    stages.push_back({{average_.keys, average_.slots}, average_.last});
  }
  if (each_.k > 0) {
    MolLogitTopK(stream, model.shape(), queries, view, allowed, {each_.keys, each_.slots},
                 workspace_, counts_);
    End(stream, each_);
    stages.push_back({{each_.keys, each_.slots}, each_.last});
  }
  MolCandidates(stream, stages, view.slots, candidates_begin_, candidates_, workspace_);
  MolRescore(stream, model.gate(), queries, view, candidates_begin_, candidates_, {keys_, slots_},
             workspace_, counts_);
}

void SearchWork::Fetch(Stream& stream, int64_t queries, SearchFound* found) const {
  CopyToHost(stream, keys_, queries * options_.k, &found->keys);
  CopyToHost(stream, slots_, queries * options_.k, &found->slots);
  if (average_.k > 0) CopyToHost(stream, average_.last, queries, &found->average_last);
  if (each_.k > 0) CopyToHost(stream, each_.last, queries * each_.lists, &found->each_last);
  stream.Copy(&found->counts, counts_.data, sizeof(found->counts));
}

std::vector<ConstTensorView> SearchWork::outputs() const {
  std::vector<ConstTensorView> all = {keys_, slots_, counts_};
  for (const Stage* stage : {&average_, &each_}) {
    if (stage->k > 0) all.push_back(stage->last);
  }
  return all;
}

}  // namespace trireme
