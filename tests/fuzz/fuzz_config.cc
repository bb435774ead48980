// libFuzzer target; CMakeLists.txt says how to build and run it.
#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/fuzz/parser_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  trireme::CheckConfigJson(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
