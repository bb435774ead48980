// What a normaliser or pre-tokeniser searches for: a literal text or a regular expression (PCRE2,
// Unicode properties). Internal to the tokenizer. Immutable and thread-safe; movable.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

struct ByteRange {
  size_t begin;
  size_t end;
};

class Pattern {
 public:
  static Pattern Literal(std::string text);
  // InvalidArgument with PCRE2's reason when `source` is no regular expression.
  static absl::StatusOr<Pattern> Regex(const std::string& source);

  // Non-overlapping matches from left to right. REQUIRES: `text` is valid UTF-8. ResourceExhausted
  // when a regular expression backtracks beyond a fixed limit.
  absl::Status FindAll(const std::string& text, std::vector<ByteRange>& matches) const;

 private:
  struct Compiled;
  Pattern() = default;
  std::string literal_;
  std::shared_ptr<const Compiled> regex_;  // null: literal
};

}  // namespace trireme
