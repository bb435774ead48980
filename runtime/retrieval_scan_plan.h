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
  size_t answers = 0;  // of the stage that takes most: lists, candidates, all ranks' keys
  size_t total() const { return queries + masks + answers; }
};

class ScanPlan {
 public:
  ScanPlan(const RetrievalTable& table, const RetrievalGroup& group, int64_t batch)
      : model_(table.model()),
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
    bytes.answers = Lists(batch_, options.k) + Gather(2 * batch_ * options.k);
    if (options.mode != RetrievalMode::kTwoStage) return bytes;
    int64_t candidates = 0;
    if (options.first_stage != FirstStage::kPerEmbedding) {
      candidates += options.average_k;
      bytes.answers = std::max(bytes.answers, FirstStageBytes(batch_, options.average_k));
    }
    if (options.first_stage != FirstStage::kAverage) {
      candidates += shape.logits() * options.each_k;
      bytes.answers =
          std::max(bytes.answers, FirstStageBytes(batch_ * shape.logits(), options.each_k));
    }
    const size_t rescore = Lists(batch_, options.k) + Gather(2 * batch_ * options.k) +
                           Argument(DType::kI32, {batch_ + 1}) +
                           Argument(DType::kI32, {batch_ * std::min(slots_, candidates)});
    bytes.answers = std::max(bytes.answers, rescore);
    return bytes;
  }

 private:
  size_t Argument(DType dtype, const Shape& shape) const {
    return ArgumentBytes(host_memory_, dtype, shape);
  }
  size_t Lists(int64_t lists, int64_t k) const {
    return Argument(DType::kI64, {lists, k}) + Argument(DType::kI32, {lists, k});
  }
  size_t Gather(int64_t keys) const {
    return Argument(DType::kI64, {keys}) + Argument(DType::kI64, {keys * ranks_});
  }
  size_t FirstStageBytes(int64_t lists, int64_t k) const {
    return Lists(lists, k) + Gather(lists * k);
  }

  const MolModel& model_;
  const int64_t slots_;
  const bool host_memory_;
  const int64_t ranks_, batch_;
};

}  // namespace trireme
