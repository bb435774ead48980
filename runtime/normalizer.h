// What is done to a text before it is cut into words: the normalizer of a tokenizer.json. Internal
// to the tokenizer. Immutable and thread-safe after construction.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "runtime/pattern.h"

namespace trireme {

struct PrependStep {
  std::string prefix;  // not put in front of an empty text
};
struct ReplaceStep {
  Pattern pattern;
  std::string content;
};
struct NfcStep {};  // Unicode normalisation form C
using NormalizerStep = std::variant<PrependStep, ReplaceStep, NfcStep>;

// REQUIRES: `text` is valid UTF-8; so is the result. ResourceExhausted as Pattern::FindAll.
absl::Status Normalize(const std::vector<NormalizerStep>& steps, std::string& text);

absl::Status ApplyReplace(const ReplaceStep& step, std::string& text);

}  // namespace trireme
