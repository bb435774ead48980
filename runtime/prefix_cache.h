// Pages by content: a prompt that begins like an earlier one finds its first pages computed. Pure
// host logic; single-threaded; the same calls give the same answers.
//
// Only full pages are shared. A page is found by the hash of its tokens and of the entry before it,
// so that a hit stands for all tokens from the start of the sequence (the hash chain of vLLM's
// automatic prefix caching). A hash alone proves nothing: the tokens are compared, and the entry
// before by its identity, which is never used twice. Two contents with one hash: the first stays,
// the second is not cached.
//
// Pages that nobody references stay until their room is needed and leave in the order in which they
// were let go of. Of pages that a sequence lets go of together the last one goes first, so that
// chains lose their ends before their beginnings; but pages that a sliding window has left behind
// go before those it still sees.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "runtime/page_allocator.h"
#include "runtime/request.h"

namespace trireme {

class PrefixCache {
 public:
  // The identity of a page's content together with all before it; kStart before the first page.
  using Entry = uint64_t;
  static constexpr Entry kStart = 0;
  static constexpr Entry kNotCached = ~Entry{0};

  // `hash_mask` keeps those bits of a hash, so that tests can have collisions.
  PrefixCache(int64_t pages, int64_t page_size, uint64_t hash_mask = ~uint64_t{0});

  const PageAllocator& pages() const { return pages_; }
  int64_t free_pages() const { return pages_.free_pages(); }
  int32_t Allocate();  // as PageAllocator; forgets what a kept page held
  void Retain(int32_t page) { pages_.Retain(page); }
  void Release(int32_t page) { pages_.Release(page); }

  // Appends the longest chain of cached pages that holds whole pages of `tokens` to `pages`, each
  // with a reference of its own, and returns the entry of the last one.
  Entry Match(std::span<const TokenId> tokens, std::vector<int32_t>* pages);
  // Makes `page` the one that holds `tokens` [page_size] after `before`, unless there is one
  // already. Returns the entry of this content, or kNotCached: then what follows it cannot be
  // cached either. REQUIRES: `page` is referenced.
  Entry Insert(Entry before, std::span<const TokenId> tokens, int32_t page);
  // Nobody finds this page any more, nor what follows it. REQUIRES: `page` is referenced.
  void Forget(int32_t page);

 private:
  struct Cached {
    Entry entry = kStart;  // kStart: the page's content is not cached
    Entry before = kStart;
    uint64_t hash = 0;
  };
  uint64_t Hash(Entry before, std::span<const TokenId> tokens) const;
  // Whether this cached page is the one with that content.
  bool Holds(int32_t page, Entry before, std::span<const TokenId> tokens) const;

  PageAllocator pages_;
  int64_t page_size_;
  uint64_t hash_mask_;
  Entry next_entry_ = kStart + 1;
  std::vector<Cached> cached_;                      // by page
  std::vector<TokenId> tokens_;                     // [pages, page_size]
  absl::flat_hash_map<uint64_t, int32_t> by_hash_;  // to the page
};

}  // namespace trireme
