// Who holds which page of the KV cache: reference counts, and which unreferenced pages still hold
// content worth keeping. Pure host logic; single-threaded; nothing is allocated after construction.
// The same calls give the same pages.
//
// A page is unused, referenced (one count for each sequence that reads it), or kept: referenced by
// nobody, its content remembered by the prefix cache until somebody needs the page. Allocate takes
// the unused page that was given back last and, when there is none, the kept page that was let go
// of first.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

class PageAllocator {
 public:
  explicit PageAllocator(int64_t pages);
  int64_t pages() const { return static_cast<int64_t>(states_.size()); }
  // Pages that Allocate can give: unused and kept ones.
  int64_t free_pages() const { return static_cast<int64_t>(unused_.size()) + kept_; }
  int64_t kept_pages() const { return kept_; }
  int32_t references(int32_t page) const { return states_[page].references; }
  // The page of which Allocate will take the content, or -1 when it has unused ones.
  int32_t NextVictim() const { return unused_.empty() ? oldest_ : -1; }
  // The one after it, or -1. REQUIRES: `victim` is NextVictim().
  int32_t VictimAfter(int32_t victim) const { return states_[victim].newer; }

  // A page with one reference. REQUIRES: free_pages() > 0.
  int32_t Allocate();
  // REQUIRES: `page` is referenced or kept.
  void Retain(int32_t page);
  // Takes one reference back; the last one leaves the page kept or unused. REQUIRES: `page` is
  // referenced.
  void Release(int32_t page);
  // From now on the page's content is worth keeping. REQUIRES: `page` is referenced.
  void Keep(int32_t page);
  // It is not any more. REQUIRES: `page` is referenced.
  void Forget(int32_t page);

 private:
  struct State {
    int32_t references = 0;
    bool keep = false;
    int32_t older = -1, newer = -1;  // neighbours among the kept pages
  };
  void Unlink(int32_t page);

  std::vector<State> states_;
  std::vector<int32_t> unused_;        // a stack
  int32_t oldest_ = -1, newest_ = -1;  // ends of the list of kept pages
  int64_t kept_ = 0;
};

}  // namespace trireme
