// Reading small JSON files that nobody vouches for: size and nesting are bounded, and a key that
// appears twice in one object is an error (nlohmann::json alone would silently keep the last one).
// Any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"

namespace trireme {

// The bytes of a regular file. NotFound when it is not there, InvalidArgument when it is longer
// than max_bytes.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes);

// The object that `text` spells. `name` is what error lines call the file. InvalidArgument for bad
// syntax (with the byte offset), a duplicate key (with the key), nesting deeper than 64, and
// anything but an object at the top.
absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& name);

// "a string", "an object", "null", ...: the JSON type of `value`, for error lines.
std::string TypeOf(const nlohmann::json& value);

// `text` in double quotes, escaped so that it stays on one line, cut after at most 100 bytes and
// between two characters: for error lines. As valid UTF-8 as `text` is.
std::string Quoted(const std::string& text);

}  // namespace trireme
