// Canonical decompositions, compositions and combining classes of Unicode 14 (UnicodeData.txt and
// CompositionExclusions.txt), without the Hangul syllables, which follow a rule. Written by a
// program.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trireme::nfc_table {

// `composite` decomposes to `first` and `second`, in one step; `second` is 0 where there is one
// character only.
struct Decomposition {
  uint32_t composite;
  uint32_t first;
  uint32_t second;
};
extern const Decomposition kComposing[];  // these pairs compose again; by composite
extern const Decomposition
    kDecomposingOnly[];  // these do not (singletons and exclusions); by composite
extern const size_t kComposingSize;
extern const size_t kDecomposingOnlySize;

// Characters first to last have this canonical combining class; classes of 0 are left out. By
// first.
struct CombiningRange {
  uint32_t first;
  uint32_t last;
  uint32_t combining_class;
};
extern const CombiningRange kCombining[];
extern const size_t kCombiningSize;

}  // namespace trireme::nfc_table
