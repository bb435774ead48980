#include "runtime/tokenizer_json_reader.h"

#include <exception>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace trireme {
namespace {

using nlohmann::json;

// Builds the tree of everything but model.vocab and model.merges. Each handler returns false, with
// `error` set, to stop.
class Reader : public nlohmann::json_sax<json> {
 public:
  Reader(TokenizerJson& out, int64_t id_limit) : out_(out), id_limit_(id_limit) {}
  const std::string& error() const { return error_; }

  bool null() override { return Put(nullptr); }
  bool boolean(bool value) override { return Put(value); }
  bool number_integer(number_integer_t value) override { return Put(value); }
  bool number_float(number_float_t value, const string_t&) override { return Put(value); }
  bool binary(binary_t&) override { return Fail("holds binary data"); }
  bool number_unsigned(number_unsigned_t value) override {
    if (mode_ != Mode::kVocab) return Put(value);
    if (value >= static_cast<uint64_t>(id_limit_)) return FailVocab();
    out_.vocab.emplace_back(std::move(key_), static_cast<TokenId>(value));
    return true;
  }
  bool string(string_t& value) override {
    if (mode_ == Mode::kMerges) return AddMerge(value);
    if (mode_ == Mode::kMergePair) return AddMergePart(value);
    return Put(std::move(value));
  }
  bool key(string_t& value) override {
    key_ = std::move(value);
    return true;
  }
  bool start_object(std::size_t) override {
    if (mode_ == Mode::kTree && InModel() && key_ == "vocab") {
      mode_ = Mode::kVocab;
      if (out_.has_vocab) return Fail("model.vocab is given twice");
      out_.has_vocab = true;
      return true;
    }
    return Open(json::object());
  }
  bool end_object() override { return Close(); }
  bool start_array(std::size_t) override {
    if (mode_ == Mode::kMerges) {
      mode_ = Mode::kMergePair;
      parts_ = 0;
      out_.merges.emplace_back();
      return true;
    }
    if (mode_ == Mode::kTree && InModel() && key_ == "merges") {
      mode_ = Mode::kMerges;
      if (out_.has_merges) return Fail("model.merges is given twice");
      out_.has_merges = true;
      return true;
    }
    return Open(json::array());
  }
  bool end_array() override {
    if (mode_ != Mode::kMergePair) return Close();
    mode_ = Mode::kMerges;
    return parts_ == 2 || FailMerge(out_.merges.size() - 1);
  }
  bool parse_error(std::size_t position, const std::string&, const json::exception&) override {
    return Fail(absl::StrCat("is no valid JSON at byte ", position));
  }

 private:
  enum class Mode { kTree, kVocab, kMerges, kMergePair };
  static constexpr size_t kDeepest = 64;

  bool Fail(const std::string& what) {
    error_ = what;
    return false;
  }
  bool FailVocab() {
    return Fail(absl::StrCat("model.vocab entry \"", absl::CHexEscape(key_.substr(0, 60)),
                             "\" must be a whole number from 0 to ", id_limit_ - 1));
  }
  bool FailMerge(size_t index) {
    return Fail(absl::StrCat("model.merges entry ", index,
                             " must be \"LEFT RIGHT\" or [\"LEFT\", \"RIGHT\"]"));
  }

  bool InModel() const {
    return stack_.size() == 2 && model_ != nullptr && stack_.back() == model_;
  }

  // Where the next value of the tree goes; null, with `error` set, inside the two streamed members.
  json* Slot() {
    if (mode_ == Mode::kVocab) return FailVocab(), nullptr;
    if (mode_ == Mode::kMergePair) return FailMerge(out_.merges.size() - 1), nullptr;
    if (mode_ == Mode::kMerges) return FailMerge(out_.merges.size()), nullptr;
    if (stack_.empty()) return &out_.rest;
    json& parent = *stack_.back();
    if (parent.is_object()) return &parent[key_];
    return &parent.emplace_back(nullptr);
  }
  bool Put(json value) {
    json* slot = Slot();
    if (slot != nullptr) *slot = std::move(value);
    return slot != nullptr;
  }
  bool Open(json value) {
    json* slot = Slot();
    if (slot == nullptr) return false;
    if (stack_.size() == kDeepest)
      return Fail(absl::StrCat("is nested more than ", kDeepest, " levels deep"));
    *slot = std::move(value);
    if (stack_.size() == 1 && key_ == "model") model_ = slot;
    stack_.push_back(slot);
    return true;
  }
  bool Close() {
    if (mode_ == Mode::kTree) {
      stack_.pop_back();
    } else {
      mode_ = Mode::kTree;
    }
    return true;
  }

  bool AddMerge(const std::string& both) {
    const size_t space = both.find(' ');
    if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos) {
      return FailMerge(out_.merges.size());
    }
    out_.merges.emplace_back(both.substr(0, space), both.substr(space + 1));
    return true;
  }
  bool AddMergePart(std::string& part) {
    if (parts_ == 2) return FailMerge(out_.merges.size() - 1);
    (parts_ == 0 ? out_.merges.back().first : out_.merges.back().second) = std::move(part);
    ++parts_;
    return true;
  }

  TokenizerJson& out_;
  const int64_t id_limit_;
  Mode mode_ = Mode::kTree;
  std::vector<json*>
      stack_;  // open containers; only the innermost grows, so the others stay where they are
  json* model_ = nullptr;
  std::string key_;
  int parts_ = 0;
  std::string error_;
};

}  // namespace

int64_t TokenIdLimit(size_t file_bytes) { return 65536 + static_cast<int64_t>(file_bytes / 4); }

absl::StatusOr<TokenizerJson> ReadTokenizerJson(const std::string& text,
                                                const std::string& name) try {
  TokenizerJson out;
  Reader reader(out, TokenIdLimit(text.size()));
  if (!json::sax_parse(text, &reader)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", reader.error()));
  }
  if (!out.rest.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": must be a JSON object"));
  }
  return out;
} catch (const std::exception& e) {
  return absl::InvalidArgumentError(absl::StrCat(name, ": cannot be read as JSON: ", e.what()));
}

JsonNode::JsonNode(const json& value, std::string file, std::string path)
    : value_(&value), file_(std::move(file)), path_(std::move(path)) {}

absl::Status JsonNode::Invalid(const std::string& what) const {
  return absl::InvalidArgumentError(
      absl::StrCat(file_, ": ", path_, path_.empty() ? "" : " ", what));
}

absl::Status JsonNode::Unsupported(const std::string& what) const {
  return absl::UnimplementedError(absl::StrCat(file_, ": ", path_, path_.empty() ? "" : " ", what));
}

JsonNode JsonNode::Child(const std::string& key) const {
  static const json& kNull = *new json(nullptr);
  const auto found = value_->find(key);
  return JsonNode(found == value_->end() ? kNull : *found, file_,
                  path_.empty() ? key : absl::StrCat(path_, ".", key));
}

absl::StatusOr<bool> JsonNode::Bool(const std::string& key, bool fallback) const {
  const JsonNode child = Child(key);
  if (child.IsNull()) return fallback;
  if (!child.value().is_boolean()) return child.Invalid("must be true or false");
  return child.value().get<bool>();
}

absl::StatusOr<std::string> JsonNode::String(const std::string& key) const {
  const JsonNode child = Child(key);
  if (!child.value().is_string()) return child.Invalid("must be a string");
  return child.value().get<std::string>();
}

absl::StatusOr<std::string> JsonNode::String(const std::string& key,
                                             const std::string& fallback) const {
  if (Child(key).IsNull()) return fallback;
  return String(key);
}

absl::StatusOr<int64_t> JsonNode::Index(const std::string& key, int64_t limit) const {
  const JsonNode child = Child(key);
  if (!child.value().is_number_unsigned() ||
      child.value().get<uint64_t>() >= static_cast<uint64_t>(limit)) {
    return child.Invalid(absl::StrCat("must be a whole number from 0 to ", limit - 1));
  }
  return child.value().get<int64_t>();
}

absl::StatusOr<std::vector<JsonNode>> JsonNode::Objects(const std::string& key) const {
  const JsonNode child = Child(key);
  std::vector<JsonNode> out;
  if (child.IsNull()) return out;
  if (!child.value().is_array()) return child.Invalid("must be an array");
  for (const json& element : child.value()) {
    out.emplace_back(element, file_, absl::StrCat(child.path_, "[", out.size(), "]"));
    if (!element.is_object()) return out.back().Invalid("must be an object");
  }
  return out;
}

}  // namespace trireme
