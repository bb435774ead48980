#include "tests/fuzz/mutator.h"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <utility>

namespace trireme {
namespace {

constexpr const char* kNumbers[] = {"0",
                                    "1",
                                    "2",
                                    "8",
                                    "-1",
                                    "-0",
                                    "0.5",
                                    "1e400",
                                    "1e-400",
                                    "127",
                                    "65536",
                                    "2147483647",
                                    "2147483648",
                                    "4294967296",
                                    "4611686018427387904",
                                    "9223372036854775807",
                                    "9223372036854775808",
                                    "18446744073709551615",
                                    "99999999999999999999999"};

constexpr const char* kValues[] = {"null", "true",  "false", "0",  "-1",  "1.5",
                                   "\"\"", "\"x\"", "[]",    "{}", "[0]", "{\"x\":0}"};

// End of the JSON value (or key) that begins at `begin`, as far as brackets and quotes tell.
size_t ValueEnd(const std::string& text, size_t begin) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = begin; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      quoted = c != '"';
      if (!quoted && depth == 0) return i + 1;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if (c == '}' || c == ']') {
      if (--depth < 0) return i;
      if (depth == 0) return i + 1;
    } else if ((c == ',' || c == ':') && depth == 0) {
      return i;
    }
  }
  return text.size();
}

// A value of `text`, chosen by what follows a colon, comma or bracket.
std::pair<size_t, size_t> RandomValue(std::mt19937_64& random, const std::string& text) {
  size_t begin = text.find_first_of(":,[", random() % text.size());
  if (begin == std::string::npos) return {0, 0};
  begin = text.find_first_not_of(" \n", begin + 1);
  if (begin == std::string::npos) return {0, 0};
  return {begin, ValueEnd(text, begin)};
}

}  // namespace

Mutator::Mutator(std::vector<std::string> seeds, std::vector<std::string> dictionary)
    : seeds_(std::move(seeds)), dictionary_(std::move(dictionary)) {}

std::string Mutator::Case(uint64_t number) const {
  Random random(number);
  std::string text = seeds_[SeedOf(number)];
  for (uint64_t left = random() % 2 ? 1 : 1 + random() % 4; left > 0; --left) Mutate(random, text);
  return text;
}

void Mutator::Mutate(Random& random, std::string& text) const {
  if (text.empty()) {
    text = dictionary_[random() % dictionary_.size()];
    return;
  }
  const size_t at = random() % text.size();
  const size_t length = 1 + random() % std::min<size_t>(32, text.size() - at);
  switch (random() % 20) {
    case 0:
      text[at] = static_cast<char>(text[at] ^ (1 << random() % 8));
      break;
    case 1:
      text[at] = static_cast<char>(random());
      break;
    case 2:
      text.erase(at, length);
      break;
    case 3:
      text.resize(at);
      break;
    case 4:
      for (size_t i = 0; i < length; ++i) text.insert(at, 1, static_cast<char>(random()));
      break;
    case 5:
      text.insert(at, text.substr(random() % text.size(), length));
      break;
    case 6:
      text.insert(at, dictionary_[random() % dictionary_.size()]);
      break;
    case 7:
      text.replace(at, length, dictionary_[random() % dictionary_.size()]);
      break;
    case 8: {
      const std::string& other = seeds_[random() % seeds_.size()];
      text = text.substr(0, at) + other.substr(random() % other.size());
      break;
    }
    case 9:
    case 10:
      ReplaceNumber(random, text);
      break;
    case 11:
      InsertSpaces(random, text);
      break;
    default:
      ReplaceValue(random, text);
  }
}

// One run of digits gets another value: an extreme one or a neighbour.
void Mutator::ReplaceNumber(Random& random, std::string& text) const {
  size_t begin = random() % text.size();
  while (begin < text.size() && !std::isdigit(static_cast<unsigned char>(text[begin]))) ++begin;
  if (begin == text.size()) return;
  size_t end = begin;
  while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end]))) ++end;
  if (random() % 2 == 0) {
    text.replace(begin, end - begin, kNumbers[random() % std::size(kNumbers)]);
  } else {
    text[end - 1] = static_cast<char>('0' + random() % 10);
  }
}

// One JSON value gives way to another one, of the same text or of another type, or goes with its
// comma.
void Mutator::ReplaceValue(Random& random, std::string& text) const {
  const auto [begin, end] = RandomValue(random, text);
  if (begin == end) return;
  const auto [other_begin, other_end] = RandomValue(random, text);
  const std::string other = text.substr(other_begin, other_end - other_begin);
  switch (random() % 4) {
    case 0:
      text.erase(begin, end - begin + (end < text.size() && text[end] == ','));
      break;
    case 1:
      text.replace(begin, end - begin, other);
      break;
    case 2:
      text.insert(end, "," + other);
      break;
    default:
      text.replace(begin, end - begin, kValues[random() % std::size(kValues)]);
  }
}

// White space where JSON allows it, so that some cases stay valid.
void Mutator::InsertSpaces(Random& random, std::string& text) const {
  const size_t at = text.find_first_of("{[,:", random() % text.size());
  if (at != std::string::npos) text.insert(at + 1, 1 + random() % 3, random() % 2 ? ' ' : '\n');
}

}  // namespace trireme
