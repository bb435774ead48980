// libFuzzer target; CMakeLists.txt says how to build and run it.
#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/fuzz/parser_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // The first two bytes say how much data follows the header; the rest is the file from its first
  // byte.
  if (size < 2) return 0;
  const std::string image(reinterpret_cast<const char*>(data) + 2, size - 2);
  trireme::CheckSafetensorsImage(image,
                                 static_cast<int64_t>(image.size()) + data[0] + 256 * data[1]);
  return 0;
}
