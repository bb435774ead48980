#include "runtime/pretokenizer.h"

#include <algorithm>
#include <utility>

#include "kernels/status.h"
#include "runtime/utf8.h"

namespace trireme {
namespace {

struct Piece {
  std::string text;
  bool at_text_start;
};

struct Part {
  ByteRange range;
  bool match;
};

std::vector<Part> PartsOf(const std::vector<ByteRange>& matches, size_t size, bool invert) {
  std::vector<Part> parts;
  size_t done = 0;
  for (const ByteRange& match : matches) {
    if (match.begin > done) parts.push_back({{done, match.begin}, invert});
    parts.push_back({match, !invert});
    done = match.end;
  }
  if (done < size) parts.push_back({{done, size}, invert});
  return parts;
}

// A match joins its neighbour only when the part before it, in the direction of the walk, was no
// match itself.
std::vector<ByteRange> MergeMatches(std::vector<Part> parts, bool with_next) {
  if (with_next) std::reverse(parts.begin(), parts.end());
  std::vector<ByteRange> merged;
  bool previous_match = false;
  for (const Part& part : parts) {
    if (part.match && !previous_match && !merged.empty()) {
      merged.back().begin = std::min(merged.back().begin, part.range.begin);
      merged.back().end = std::max(merged.back().end, part.range.end);
    } else {
      merged.push_back(part.range);
    }
    previous_match = part.match;
  }
  if (with_next) std::reverse(merged.begin(), merged.end());
  return merged;
}

std::vector<ByteRange> Arrange(const std::vector<Part>& parts, SplitBehavior behavior) {
  if (behavior == SplitBehavior::kMergedWithPrevious ||
      behavior == SplitBehavior::kMergedWithNext) {
    return MergeMatches(parts, behavior == SplitBehavior::kMergedWithNext);
  }
  std::vector<ByteRange> out;
  bool previous_match = false;
  for (const Part& part : parts) {
    if (behavior == SplitBehavior::kRemoved && part.match) continue;
    if (behavior == SplitBehavior::kContiguous && !out.empty() && part.match == previous_match) {
      out.back().end = part.range.end;
    } else {
      out.push_back(part.range);
    }
    previous_match = part.match;
  }
  return out;
}

absl::Status Apply(const SplitStep& step, std::vector<Piece>& pieces) {
  std::vector<Piece> out;
  std::vector<ByteRange> matches;
  for (Piece& piece : pieces) {
    RETURN_IF_ERROR(step.pattern.FindAll(piece.text, matches));
    for (const ByteRange& range :
         Arrange(PartsOf(matches, piece.text.size(), step.invert), step.behavior)) {
      if (range.begin == range.end) continue;
      out.push_back({piece.text.substr(range.begin, range.end - range.begin),
                     piece.at_text_start && range.begin == 0});
    }
  }
  pieces = std::move(out);
  return absl::OkStatus();
}

absl::Status Apply(const PrefixSpaceStep&, std::vector<Piece>& pieces) {
  for (Piece& piece : pieces) {
    if (piece.text.front() != ' ') piece.text.insert(0, " ");
  }
  return absl::OkStatus();
}

absl::Status Apply(const ByteLevelStep&, std::vector<Piece>& pieces) {
  const auto& alphabet = ByteLevelAlphabet();
  for (Piece& piece : pieces) {
    std::string spelled;
    spelled.reserve(piece.text.size() * 2);
    for (unsigned char byte : piece.text) spelled += alphabet[byte];
    piece.text = std::move(spelled);
  }
  return absl::OkStatus();
}

absl::Status Apply(const MetaspaceStep& step, std::vector<Piece>& pieces) {
  for (Piece& piece : pieces) {
    std::string text;
    text.reserve(piece.text.size() * 2);
    for (char c : piece.text) {
      if (c == ' ') {
        text += step.replacement;
      } else {
        text += c;
      }
    }
    const bool wanted = step.prepend == MetaspaceStep::Prepend::kAlways ||
                        (step.prepend == MetaspaceStep::Prepend::kFirst && piece.at_text_start);
    if (wanted && text.compare(0, step.replacement.size(), step.replacement) != 0) {
      text.insert(0, step.replacement);
    }
    piece.text = std::move(text);
  }
  return absl::OkStatus();
}

std::array<std::string, 256> MakeAlphabet() {
  std::array<std::string, 256> alphabet;
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
    AppendUtf8(printable ? byte : next++, alphabet[byte]);
  }
  return alphabet;
}

constexpr int kAlphabetEnd = 0x144;

std::array<int, kAlphabetEnd> MakeInverse() {
  std::array<int, kAlphabetEnd> inverse;
  inverse.fill(-1);
  const auto& alphabet = ByteLevelAlphabet();
  for (int byte = 0; byte < 256; ++byte) {
    size_t offset = 0;
    inverse[NextUtf8(alphabet[byte], offset)] = byte;
  }
  return inverse;
}

}  // namespace

const char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

const std::array<std::string, 256>& ByteLevelAlphabet() {
  static const auto& kAlphabet = *new std::array<std::string, 256>(MakeAlphabet());
  return kAlphabet;
}

std::string ByteLevelToBytes(const std::string& piece) {
  static const std::array<int, kAlphabetEnd> kInverse = MakeInverse();
  std::string bytes;
  for (size_t offset = 0; offset < piece.size();) {
    const char32_t code_point = NextUtf8(piece, offset);
    if (code_point >= kAlphabetEnd || kInverse[code_point] < 0) return piece;
    bytes += static_cast<char>(kInverse[code_point]);
  }
  return bytes;
}

absl::Status PreTokenize(const std::vector<PreTokenizerStep>& steps, std::string text,
                         bool at_text_start, std::vector<std::string>& words) {
  words.clear();
  if (text.empty()) return absl::OkStatus();
  std::vector<Piece> pieces;
  pieces.push_back({std::move(text), at_text_start});
  for (const PreTokenizerStep& step : steps) {
    RETURN_IF_ERROR(std::visit([&](const auto& s) { return Apply(s, pieces); }, step));
  }
  words.reserve(pieces.size());
  for (Piece& piece : pieces) words.push_back(std::move(piece.text));
  return absl::OkStatus();
}

}  // namespace trireme
