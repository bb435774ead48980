// Deterministic mutations of a seed input: the same case number gives the same bytes on every
// machine.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace trireme {

class Mutator {
 public:
  // `dictionary` holds tokens of the format. REQUIRES: neither is empty.
  Mutator(std::vector<std::string> seeds, std::vector<std::string> dictionary);
  size_t SeedOf(uint64_t number) const { return number % seeds_.size(); }
  // Case `number`: a seed with one to four mutations, half of them of whole JSON values, so that
  // the syntax survives.
  std::string Case(uint64_t number) const;

 private:
  using Random = std::mt19937_64;
  void Mutate(Random& random, std::string& text) const;
  void ReplaceNumber(Random& random, std::string& text) const;
  void ReplaceValue(Random& random, std::string& text) const;
  void InsertSpaces(Random& random, std::string& text) const;

  std::vector<std::string> seeds_;
  std::vector<std::string> dictionary_;
};

}  // namespace trireme
