#include "runtime/nfc.h"

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "runtime/nfc_table.h"
#include "runtime/utf8.h"

namespace trireme {
namespace {

// Hangul syllables are laid out by leading consonant, vowel and trailing consonant (Unicode 3.12).
constexpr char32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTrails = 0x11A7;
constexpr char32_t kLeadCount = 19, kVowelCount = 21, kTrailCount = 28;
constexpr char32_t kSyllableCount = kLeadCount * kVowelCount * kTrailCount;

// Below this every character is its own NFC and combines with nothing in front of it.
constexpr char32_t kFirstOfInterest = 0x300;

struct Pair {
  char32_t first;
  char32_t second;
};

struct Tables {
  absl::flat_hash_map<char32_t, Pair> decompositions;
  absl::flat_hash_map<uint64_t, char32_t> compositions;
};

uint64_t PairKey(char32_t first, char32_t second) { return uint64_t{first} << 32 | second; }

const Tables& GetTables() {
  static const Tables& kTables = *[] {
    auto* tables = new Tables;
    for (size_t i = 0; i < nfc_table::kComposingSize; ++i) {
      const nfc_table::Decomposition& row = nfc_table::kComposing[i];
      tables->decompositions[row.composite] = {row.first, row.second};
      tables->compositions[PairKey(row.first, row.second)] = row.composite;
    }
    for (size_t i = 0; i < nfc_table::kDecomposingOnlySize; ++i) {
      const nfc_table::Decomposition& row = nfc_table::kDecomposingOnly[i];
      tables->decompositions[row.composite] = {row.first, row.second};
    }
    return tables;
  }();
  return kTables;
}

uint32_t CombiningClass(char32_t c) {
  if (c < kFirstOfInterest) return 0;
  const auto* end = nfc_table::kCombining + nfc_table::kCombiningSize;
  const auto* range =
      std::lower_bound(nfc_table::kCombining, end, c,
                       [](const auto& row, char32_t value) { return row.last < value; });
  return range != end && range->first <= c ? range->combining_class : 0;
}

void AppendDecomposed(char32_t c, std::vector<char32_t>& out) {
  if (c >= kSyllables && c < kSyllables + kSyllableCount) {
    const char32_t index = c - kSyllables;
    out.push_back(kLeads + index / (kVowelCount * kTrailCount));
    out.push_back(kVowels + index / kTrailCount % kVowelCount);
    if (index % kTrailCount != 0) out.push_back(kTrails + index % kTrailCount);
    return;
  }
  const auto& decompositions = GetTables().decompositions;
  const auto found = decompositions.find(c);
  if (found == decompositions.end()) {
    out.push_back(c);
    return;
  }
  const Pair pair = found->second;
  AppendDecomposed(pair.first, out);
  if (pair.second != 0) AppendDecomposed(pair.second, out);
}

// 0: the two do not compose.
char32_t Compose(char32_t first, char32_t second) {
  if (first >= kLeads && first < kLeads + kLeadCount && second >= kVowels &&
      second < kVowels + kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + (second - kVowels)) * kTrailCount;
  }
  if (first >= kSyllables && first < kSyllables + kSyllableCount &&
      (first - kSyllables) % kTrailCount == 0 && second > kTrails &&
      second < kTrails + kTrailCount) {
    return first + (second - kTrails);
  }
  const auto& compositions = GetTables().compositions;
  const auto found = compositions.find(PairKey(first, second));
  return found == compositions.end() ? 0 : found->second;
}

struct Character {
  char32_t code_point;
  uint32_t combining_class;
};

// Runs of combining marks are put in the order of their classes, marks of one class staying in
// order.
std::vector<Character> InCanonicalOrder(const std::vector<char32_t>& code_points) {
  std::vector<Character> out;
  out.reserve(code_points.size());
  size_t run = 0;
  const auto sort_run = [&] {
    std::stable_sort(out.begin() + run, out.end(), [](const Character& a, const Character& b) {
      return a.combining_class < b.combining_class;
    });
  };
  for (char32_t c : code_points) {
    const uint32_t combining_class = CombiningClass(c);
    if (combining_class == 0) sort_run();
    out.push_back({c, combining_class});
    if (combining_class == 0) run = out.size();
  }
  sort_run();
  return out;
}

// A mark joins the last starter unless a mark of the same or a higher class stands between.
void ComposeAll(std::vector<Character>& characters) {
  constexpr size_t kNone = ~size_t{0};
  size_t starter = kNone;
  size_t kept = 0;
  uint32_t blocking = 0;
  for (const Character current : std::vector<Character>(characters)) {
    const bool adjacent = starter != kNone && starter + 1 == kept;
    if (starter != kNone && (adjacent || blocking < current.combining_class)) {
      if (const char32_t composite = Compose(characters[starter].code_point, current.code_point)) {
        characters[starter].code_point = composite;
        continue;
      }
    }
    if (current.combining_class == 0) starter = kept;
    blocking = current.combining_class;
    characters[kept++] = current;
  }
  characters.resize(kept);
}

}  // namespace

std::string ToNfc(std::string text) {
  bool of_interest = false;
  std::vector<char32_t> decomposed;
  for (size_t offset = 0; offset < text.size() && !of_interest;) {
    of_interest = NextUtf8(text, offset) >= kFirstOfInterest;
  }
  if (!of_interest) return text;
  decomposed.reserve(text.size());
  for (size_t offset = 0; offset < text.size();)
    AppendDecomposed(NextUtf8(text, offset), decomposed);
  std::vector<Character> characters = InCanonicalOrder(decomposed);
  ComposeAll(characters);
  std::string out;
  out.reserve(text.size());
  for (const Character& character : characters) AppendUtf8(character.code_point, out);
  return out;
}

}  // namespace trireme
