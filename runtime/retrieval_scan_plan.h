// The memory of a scan of one rank's shard, known before anything is enqueued. Pure functions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "runtime/retrieval_search.h"

namespace trireme {

// What one scan takes of its arena on a device; each of its stages frees what it took.
struct ScanBytes {
  size_t queries = 0;  // as they come, projected, and what projects them
  size_t masks = 0;    // and the lists of excluded slots
  size_t answers = 0;  // of the stage that takes most: lists, candidates, what all ranks found
  size_t kernels = 0;  // of the op that takes most: what it works in
  size_t total() const { return queries + masks + answers + kernels; }
};

class ScanPlan {
 public:
  ScanPlan(const RetrievalTable& table, const RetrievalGroup& group, int64_t batch)
      : stream_(*group.stream),
        model_(table.model()),
        storage_(table.shard().options().storage),
        slots_(table.shard().mask_words() * kMolBlockRows),
        host_memory_(group.stream->device().spec().host_memory),
        ranks_(group.size()),
        batch_(batch) {}

  ScanBytes Bytes(const RetrievalOptions& options, int64_t masks, int64_t excluded) const {
    const MolShape& shape = model_.shape();
    ScanBytes bytes;
    bytes.queries =
        Arena::Footprint(DType::kF32, {batch_, shape.query_components * shape.component_dim}) +
        Arena::Footprint(DType::kF32, {batch_, shape.gate_width()}) +
        Arena::Footprint(DType::kF32, {batch_, model_.config().query_dim}) +
        model_.ArenaBytes(batch_);
    bytes.masks = Argument(DType::kI32, {masks, slots_ / kMolBlockRows}) +
                  Argument(DType::kI32, {batch_}) + Argument(DType::kI32, {batch_ + 1}) +
                  Argument(DType::kI32, {excluded});
    bytes.answers = Lists(batch_, options.k) + Merge(batch_ * options.k);
    if (options.mode != RetrievalMode::kTwoStage) {
      bytes.kernels = Kernels(MolScanOp::kSearch, slots_, options.k);
      return bytes;
    }
    int64_t candidates = 0;
    if (options.first_stage != FirstStage::kPerEmbedding) {
      candidates += options.average_k;
      bytes.answers = std::max(bytes.answers, FirstStageBytes(batch_, options.average_k));
      bytes.kernels = Kernels(MolScanOp::kAverage, slots_, options.average_k);
    }
    if (options.first_stage != FirstStage::kAverage) {
      candidates += shape.logits() * options.each_k;
      bytes.answers =
          std::max(bytes.answers, FirstStageBytes(batch_ * shape.logits(), options.each_k));
      bytes.kernels = std::max(bytes.kernels, Kernels(MolScanOp::kLogits, slots_, options.each_k));
    }
    candidates = batch_ * std::min(slots_, candidates);
    const size_t rescore = Lists(batch_, options.k) + Merge(batch_ * options.k) +
                           Argument(DType::kI32, {batch_ + 1}) +
                           Argument(DType::kI32, {candidates});
    bytes.answers = std::max(bytes.answers, rescore);
    bytes.kernels = std::max(bytes.kernels, Kernels(MolScanOp::kRescore, candidates, options.k));
    return bytes;
  }

 private:
  size_t Argument(DType dtype, const Shape& shape) const {
    return ArgumentBytes(host_memory_, dtype, shape);
  }
  size_t Lists(int64_t lists, int64_t k) const {
    return Argument(DType::kI64, {lists, k}) + Argument(DType::kI32, {lists, k});
  }
  size_t Gather(DType dtype, int64_t elements) const {
    return Argument(dtype, {elements}) + Argument(dtype, {elements * ranks_});
  }
  // Three words a place: its score and its id.
  size_t Merge(int64_t places) const { return Gather(DType::kI32, 3 * places); }
  size_t FirstStageBytes(int64_t lists, int64_t k) const {
    return Lists(lists, k) + Gather(DType::kI64, lists * k);
  }
  size_t Kernels(MolScanOp op, int64_t items, int64_t k) const {
    return Arena::Footprint(
        DType::kU8, {MolWorkspaceBytes(stream_, model_.shape(), {op, storage_, batch_, items, k})});
  }

  const Stream& stream_;
  const MolModel& model_;
  const MolStorage storage_;
  const int64_t slots_;
  const bool host_memory_;
  const int64_t ranks_, batch_;
};

}  // namespace trireme
