#include "runtime/page_allocator.h"

#include <algorithm>
#include <functional>

#include "kernels/check.h"

namespace trireme {

PageAllocator::PageAllocator(int64_t pages) : free_(pages), allocated_(pages, false) {
  for (int64_t i = 0; i < pages; ++i)
    free_[i] = static_cast<int32_t>(i);  // ascending: already a min-heap
}

int32_t PageAllocator::Allocate() {
  CHECK(!free_.empty());
  std::pop_heap(free_.begin(), free_.end(), std::greater<>());
  const int32_t page = free_.back();
  free_.pop_back();
  allocated_[page] = true;
  return page;
}

void PageAllocator::Free(int32_t page) {
  CHECK(allocated_[page]) << "page " << page << " freed twice";
  allocated_[page] = false;
  free_.push_back(page);
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

}  // namespace trireme
