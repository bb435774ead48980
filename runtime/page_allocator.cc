#include "runtime/page_allocator.h"

#include "kernels/check.h"

namespace trireme {

PageAllocator::PageAllocator(int64_t pages) : states_(pages), unused_(pages) {
  for (int64_t i = 0; i < pages; ++i)
    unused_[i] = static_cast<int32_t>(pages - 1 - i);  // the first ones first
}

int32_t PageAllocator::Allocate() {
  int32_t page = oldest_;
  if (!unused_.empty()) {
    page = unused_.back();
    unused_.pop_back();
  } else {
    CHECK_GE(page, 0) << "no page is free";
    Unlink(page);
  }
  states_[page].keep = false;
  states_[page].references = 1;
  return page;
}

void PageAllocator::Retain(int32_t page) {
  State& state = states_[page];
  if (state.references == 0) {
    CHECK(state.keep) << "page " << page << " is unused";
    Unlink(page);
  }
  ++state.references;
}

void PageAllocator::Release(int32_t page) {
  State& state = states_[page];
  CHECK_GT(state.references, 0) << "page " << page << " given back twice";
  if (--state.references > 0) return;
  if (!state.keep) {
    unused_.push_back(page);
    return;
  }
  state.older = newest_;
  state.newer = -1;
  (newest_ >= 0 ? states_[newest_].newer : oldest_) = page;
  newest_ = page;
  ++kept_;
}

void PageAllocator::Keep(int32_t page) {
  CHECK_GT(states_[page].references, 0);
  states_[page].keep = true;
}

void PageAllocator::Forget(int32_t page) {
  CHECK_GT(states_[page].references, 0);
  states_[page].keep = false;
}

void PageAllocator::Unlink(int32_t page) {
  State& state = states_[page];
  (state.older >= 0 ? states_[state.older].newer : oldest_) = state.newer;
  (state.newer >= 0 ? states_[state.newer].older : newest_) = state.older;
  state.older = state.newer = -1;
  --kept_;
}

}  // namespace trireme
