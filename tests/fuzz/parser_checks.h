// What must hold for any input of a parser of untrusted files: it returns, and what it accepts is
// consistent. Shared by the mutation tests (always run) and the libFuzzer targets. A violation ends
// the process through CHECK.
#pragma once

#include <cstdint>
#include <string>

namespace trireme {

// Each returns whether the input was accepted.
// `image` is the beginning of a safetensors file (length, header, maybe data), extended by zeros to
// file_bytes.
bool CheckSafetensorsImage(const std::string& image, int64_t file_bytes);
bool CheckConfigJson(const std::string& json);
bool CheckTokenizerJson(const std::string& json);

}  // namespace trireme
