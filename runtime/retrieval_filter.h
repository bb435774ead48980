// Filters over item attributes: an AND of clauses, each an attribute, its negation or an OR of
// such. Parsed once, evaluated 32 items at a time on bit planes before anything is scored.
//
//   lang:en & (topic:news | topic:sport) & !adult        AND, OR and NOT may be written as words
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace trireme {

struct Filter {
  struct Literal {
    int32_t attribute = 0;  // index into the table's attributes
    bool negated = false;
  };
  std::vector<std::vector<Literal>> clauses;  // none: everything passes
};

// Names are letters, digits and _ : . / -. A malformed filter is an error with the position (from
// 1), an attribute that `attributes` lacks one with its name.
absl::StatusOr<Filter> ParseFilter(const std::string& text,
                                   const std::vector<std::string>& attributes);

}  // namespace trireme
