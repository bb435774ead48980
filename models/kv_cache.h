// Page storage of this rank's layers and KV heads. Who owns which page is the runtime's business
// (page_allocator).
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace trireme {

class KvCache {
 public:
  struct Options {
    int64_t layers = 0;  // of this stage
    int64_t pages = 0;
    int64_t page_size = 16;  // tokens
    int64_t kv_heads = 0;    // of this rank
    int64_t head_dim = 0;
    DType dtype = DType::kF32;
  };
  static absl::StatusOr<KvCache> Create(Device& device, const Options& options);
  PagedKv Layer(int64_t layer, ConstTensorView page_tables) const;
  // Keys and values of page `source`, in all layers, to page `target`.
  void CopyPage(Stream& stream, int64_t source, int64_t target) const;
  const Options& options() const { return options_; }
  int64_t bytes() const { return storage_.bytes(); }

 private:
  Options options_;
  Tensor storage_;  // [layers * 2, pages * page_size, kv_heads, head_dim]
};

}  // namespace trireme
