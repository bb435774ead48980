// Runs a parser check over many mutated inputs.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "kernels/check.h"
#include "tests/fuzz/mutator.h"

namespace trireme {

#ifndef TRIREME_FUZZ_CASES
#define TRIREME_FUZZ_CASES 100000
#endif
// Parsers start no threads: fewer cases under TSan, which only has to see that. ASan gets them all.
#if defined(__SANITIZE_THREAD__)
inline constexpr uint64_t kFuzzCases = TRIREME_FUZZ_CASES / 10;
#else
inline constexpr uint64_t kFuzzCases = TRIREME_FUZZ_CASES;
#endif

// `check` takes a mutated input and the seed's index and returns whether the parser accepted it.
// Both outcomes must occur, or the mutations are too tame or too wild to test anything.
template <typename Check>
void RunFuzzCases(const Mutator& mutator, uint64_t cases, Check check) {
  uint64_t accepted = 0;
  for (uint64_t number = 0; number < cases; ++number) {
    // So that a failed CHECK says which case it was.
    SetFatalPrefix("case " + std::to_string(number));
    accepted += check(mutator.Case(number), mutator.SeedOf(number));
  }
  SetFatalPrefix("");
  std::printf("%llu of %llu inputs were accepted\n", static_cast<unsigned long long>(accepted),
              static_cast<unsigned long long>(cases));
  EXPECT_GT(accepted, cases / 100);
  EXPECT_LT(accepted, cases - cases / 100);
}

inline std::string SourceFile(const std::string& path) {
  std::ifstream in(std::string(TRIREME_SOURCE_DIR) + "/" + path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

}  // namespace trireme
