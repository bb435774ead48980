// Reads the text of a tokenizer.json and gives typed access to it, with error lines that name the
// file and the field. Internal to the tokenizer.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "runtime/tokenizer.h"

namespace trireme {

// The vocabulary and the merges are nearly all of the file and have one shape, so they are read
// straight into vectors; a tree of 400,000 JSON values would take most of the loading time.
struct TokenizerJson {
  nlohmann::json rest;  // the object without model.vocab and model.merges
  std::vector<std::pair<std::string, TokenId>> vocab;
  std::vector<std::pair<std::string, std::string>> merges;
  bool has_vocab = false;   // model.vocab was there and an object
  bool has_merges = false;  // model.merges was there and an array
};

// Ids are checked to be below a bound that grows with the size of the file: real files have few
// gaps, and tables are indexed by id.
absl::StatusOr<TokenizerJson> ReadTokenizerJson(const std::string& text, const std::string& name);

// The bound of ids for a file of `file_bytes`.
int64_t TokenIdLimit(size_t file_bytes);

// A JSON value and where it stands. Does not own the value: the tree must outlive it.
class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, std::string file, std::string path);

  // "FILE: PATH WHAT": an error line about this value.
  absl::Status Invalid(const std::string& what) const;
  absl::Status Unsupported(const std::string& what) const;

  bool IsNull() const { return value_->is_null(); }
  bool IsObject() const { return value_->is_object(); }
  // The member `key`; a null value when it is missing. REQUIRES: this is an object.
  JsonNode Child(const std::string& key) const;
  // Members of this object with type checks. `fallback` stands for missing and null.
  absl::StatusOr<bool> Bool(const std::string& key, bool fallback) const;
  absl::StatusOr<std::string> String(const std::string& key) const;  // must be there
  absl::StatusOr<std::string> String(const std::string& key, const std::string& fallback) const;
  // A whole number from 0 to limit - 1; must be there.
  absl::StatusOr<int64_t> Index(const std::string& key, int64_t limit) const;
  // Elements of the array `key`; none when it is missing or null. Every element must be an object.
  absl::StatusOr<std::vector<JsonNode>> Objects(const std::string& key) const;

  const nlohmann::json& value() const { return *value_; }

 private:
  const nlohmann::json* value_;
  std::string file_;
  std::string path_;
};

}  // namespace trireme
