#include "models/kv_cache.h"

#include "kernels/status.h"

namespace trireme {

absl::StatusOr<KvCache> KvCache::Create(Device& device, const Options& options) {
  KvCache cache;
  cache.options_ = options;
  ASSIGN_OR_RETURN(cache.storage_,
                   Tensor::Create(device, options.dtype,
                                  {options.layers * 2, options.pages * options.page_size,
                                   options.kv_heads, options.head_dim}));
  return cache;
}

PagedKv KvCache::Layer(int64_t layer, ConstTensorView page_tables) const {
  const Shape pages{options_.pages, options_.page_size, options_.kv_heads, options_.head_dim};
  const TensorView all = storage_.view();
  return PagedKv{.k = TensorView(all.Rows(2 * layer, 1).data, options_.dtype, pages),
                 .v = TensorView(all.Rows(2 * layer + 1, 1).data, options_.dtype, pages),
                 .page_tables = page_tables};
}

}  // namespace trireme
