// What lies between the two stages of a MoL search: where the lists of all ranks end, and which of
// this shard's slots are on them.
#include <algorithm>
#include <functional>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/mol_ops.h"

namespace trireme::cpu {

void MolLastKeys(Stream& stream, ConstTensorView keys, TensorView last) {
  const int64_t lists = last.dim(0), k = keys.dim(1), ranks = keys.dim(0) / lists;
  PoolOf(stream).ParallelFor(lists, 1, [&](int64_t first, int64_t end) {
    std::vector<uint64_t> all;
    for (int64_t list = first; list < end; ++list) {
      all.clear();
      for (int64_t r = 0; r < ranks; ++r) {
        const uint64_t* from = keys.row<uint64_t>(r * lists + list);
        all.insert(all.end(), from, from + k);
      }
      // One rank's list is sorted already.
      if (ranks > 1)
        std::nth_element(all.begin(), all.begin() + (k - 1), all.end(), std::greater<>());
      last.as<uint64_t>()[list] = all[k - 1];
    }
  });
}

void MolCandidates(Stream& stream, std::span<const MolStage> stages, int64_t /*slots*/,
                   TensorView begin, TensorView candidates, TensorView /*workspace*/) {
  const int64_t batch = begin.dim(0) - 1;
  std::vector<std::vector<int32_t>> found(batch);
  PoolOf(stream).ParallelFor(batch, 1, [&](int64_t first, int64_t end) {
    for (int64_t b = first; b < end; ++b) {
      std::vector<int32_t>& mine = found[b];
      for (const MolStage& stage : stages) {
        const int64_t lists = stage.last.dim(0) / batch, k = stage.found.keys.dim(1);
        for (int64_t list = b * lists; list < (b + 1) * lists; ++list) {
          const uint64_t* keys = stage.found.keys.row<uint64_t>(list);
          const uint64_t last = stage.last.as<uint64_t>()[list];
          for (int64_t j = 0; j < k && keys[j] != 0 && keys[j] >= last; ++j) {
            mine.push_back(stage.found.slots.row<int32_t>(list)[j]);
          }
        }
      }
      std::sort(mine.begin(), mine.end());
      mine.erase(std::unique(mine.begin(), mine.end()), mine.end());
    }
  });
  int32_t* begins = begin.as<int32_t>();
  begins[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    std::copy(found[b].begin(), found[b].end(), candidates.as<int32_t>() + begins[b]);
    begins[b + 1] = begins[b] + static_cast<int32_t>(found[b].size());
  }
}

}  // namespace trireme::cpu
