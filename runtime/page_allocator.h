// Hands out the pages of the KV cache. Pure host logic; single-threaded. Lowest page first, so that
// the same calls give the same pages.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

class PageAllocator {
 public:
  explicit PageAllocator(int64_t pages);
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  // REQUIRES: free_pages() > 0.
  int32_t Allocate();
  // REQUIRES: `page` is allocated.
  void Free(int32_t page);

 private:
  std::vector<int32_t> free_;  // a min-heap
  std::vector<bool> allocated_;
};

}  // namespace trireme
