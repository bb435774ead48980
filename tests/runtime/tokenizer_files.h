// Opens the tokenizers that tests/golden/tokenizers and examples/models hold.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "nlohmann/json.hpp"
#include "runtime/tokenizer.h"

namespace trireme {

inline std::string ReadSourceFile(const std::string& path) {
  const std::string full = std::string(TRIREME_SOURCE_DIR "/") + path;
  std::ifstream file(full, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << full;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// `path` ends in .json or .model.
inline std::unique_ptr<Tokenizer> OpenTokenizer(const std::string& path) {
  const std::string bytes = ReadSourceFile(path);
  auto tokenizer = path.ends_with(".json") ? Tokenizer::FromJson(bytes, path)
                                           : Tokenizer::FromSentencePiece(bytes, path);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

inline nlohmann::json ReadSourceJson(const std::string& path) {
  return nlohmann::json::parse(ReadSourceFile(path));
}

inline const char kStoriesJson[] = "examples/models/stories260K/tokenizer.json";
inline const char kStoriesModel[] = "examples/models/stories260K/tokenizer.model";

inline std::string FixturePath(const std::string& name) {
  return "tests/golden/tokenizers/" + name + ".json";
}

}  // namespace trireme
