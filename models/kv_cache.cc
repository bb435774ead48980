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

void KvCache::CopyPage(Stream& stream, int64_t source, int64_t target) const {
  const int64_t size = options_.page_size;
  for (int64_t row = 0; row < 2 * options_.layers; ++row) {
    const TensorView all = storage_.view().Rows(row, 1);
    const TensorView tokens(all.data, options_.dtype,
                            {options_.pages * size, options_.kv_heads, options_.head_dim});
    const TensorView from = tokens.Rows(source * size, size);
    stream.Copy(tokens.Rows(target * size, size).data, from.data, from.bytes());
  }
}

}  // namespace trireme
