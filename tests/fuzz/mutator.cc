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

}  // namespace

Mutator::Mutator(std::vector<std::string> seeds, std::vector<std::string> dictionary)
    : seeds_(std::move(seeds)), dictionary_(std::move(dictionary)) {}

std::string Mutator::Case(uint64_t number) const {
  Random random(number);
  std::string text = seeds_[SeedOf(number)];
  for (uint64_t left = 1 + random() % 4; left > 0; --left) Mutate(random, text);
  return text;
}

void Mutator::Mutate(Random& random, std::string& text) const {
  if (text.empty()) {
    text = dictionary_[random() % dictionary_.size()];
    return;
  }
  const size_t at = random() % text.size();
  const size_t length = 1 + random() % std::min<size_t>(32, text.size() - at);
  switch (random() % 12) {
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
    default:
      InsertSpaces(random, text);
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

// White space where JSON allows it, so that some cases stay valid.
void Mutator::InsertSpaces(Random& random, std::string& text) const {
  const size_t at = text.find_first_of("{[,:", random() % text.size());
  if (at != std::string::npos) text.insert(at + 1, 1 + random() % 3, random() % 2 ? ' ' : '\n');
}

}  // namespace trireme
