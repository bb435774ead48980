// Cuts a normalised text into words, between which BPE never merges: the pre_tokenizer of a
// tokenizer.json. Internal to the tokenizer. Immutable and thread-safe after construction.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "runtime/pattern.h"

namespace trireme {

// What becomes of the matches of a split pattern.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct SplitStep {
  Pattern pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // what does not match takes the place of what does
};
// Puts a space in front of words without one (ByteLevel's add_prefix_space).
struct PrefixSpaceStep {};
// Spells each byte as one printable character (GPT-2's table).
struct ByteLevelStep {};
// Spaces become `replacement`; one more in front of a text that does not begin with it.
struct MetaspaceStep {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string replacement;
  Prepend prepend = Prepend::kAlways;
};
using PreTokenizerStep = std::variant<SplitStep, PrefixSpaceStep, ByteLevelStep, MetaspaceStep>;

// The words of `text`, none empty. `at_text_start`: `text` is the beginning of the whole text, not
// what follows an added token. REQUIRES: `text` is valid UTF-8. Errors as Pattern::FindAll.
absl::Status PreTokenize(const std::vector<PreTokenizerStep>& steps, std::string text,
                         bool at_text_start, std::vector<std::string>& words);

// GPT-2's byte <-> character table: the printable Latin-1 characters stand for themselves, the
// other 68 bytes for U+0100 and up in order.
const std::array<std::string, 256>& ByteLevelAlphabet();
// The bytes that `piece` spells in that alphabet; `piece` itself when a character is outside it.
std::string ByteLevelToBytes(const std::string& piece);

// The pattern of the ByteLevel pre-tokeniser itself.
extern const char kGpt2Pattern[];

}  // namespace trireme
