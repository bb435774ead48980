// What a wrong, unsupported or hostile tokenizer file leads to: one line that names the file and
// the entry.
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "runtime/tokenizer.h"
#include "tests/runtime/tokenizer_files.h"

namespace trireme {
namespace {

using nlohmann::json;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

json Small() {
  return json::parse(R"({"added_tokens": [{"id": 5, "content": "<x>", "special": true}],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": ["a b", ["ab", "c"]]}})");
}

TEST(TokenizerErrorsTest, TheSmallFileItselfIsFine) {
  const auto tokenizer = Tokenizer::FromJson(Small().dump(), "t.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode("abcab<x>b").value(), std::vector<TokenId>({4, 2, 5, 1}));
}

struct Edit {
  const char* pointer;
  const char* value;
  absl::StatusCode code;
  const char* message;
};

TEST(TokenizerErrorsTest, NamesTheFileAndTheEntry) {
  const Edit edits[] = {
      {"/model/type", "\"WordPiece\"", kUnimplemented, "model has type \"WordPiece\""},
      {"/model/type", "7", kInvalid, "model.type must be a string"},
      {"/model", "[]", kInvalid, "model must be an object"},
      {"/model/vocab", "[]", kInvalid, "model.vocab must be an object"},
      {"/model/vocab/b", "0", kInvalid, "model.vocab gives id 0 to both \"a\" and \"b\""},
      {"/model/vocab/b", "-1", kInvalid, "model.vocab entry \"b\" must be a whole number"},
      {"/model/vocab/b", "1.0", kInvalid, "model.vocab entry \"b\" must be a whole number"},
      {"/model/vocab/b", "4294967297", kInvalid, "model.vocab entry \"b\" must be a whole number"},
      {"/model/vocab/b", "99999999999999999999999", kInvalid, "model.vocab entry \"b\""},
      {"/model/vocab/b", "{}", kInvalid, "model.vocab entry \"b\""},
      {"/model/vocab/b", "[1]", kInvalid, "model.vocab entry \"b\""},
      {"/model/merges", "null", kInvalid, "model.merges must be an array"},
      {"/model/merges/1", "\"a z\"", kInvalid,
       "model.merges entry 1 (\"a\", \"z\") needs the piece \"z\""},
      {"/model/merges/1", "\"b a\"", kInvalid, "needs the piece \"ba\""},
      {"/model/merges/1", "\"ab\"", kInvalid, "model.merges entry 1 must be"},
      {"/model/merges/1", "\"a b c\"", kInvalid, "model.merges entry 1 must be"},
      {"/model/merges/1", "[\"a\"]", kInvalid, "model.merges entry 1 must be"},
      {"/model/merges/1", "[\"a\", \"b\", \"c\"]", kInvalid, "model.merges entry 1 must be"},
      {"/model/merges/1", "[\"a\", [\"b\"]]", kInvalid, "model.merges entry 1 must be"},
      {"/model/merges/1", "3", kInvalid, "model.merges entry 1 must be"},
      {"/model/unk_token", "\"<unk>\"", kInvalid, "model.unk_token is \"<unk>\""},
      {"/model/byte_fallback", "1", kInvalid, "model.byte_fallback must be true or false"},
      {"/model/dropout", "0.1", kUnimplemented, "model.dropout"},
      {"/model/end_of_word_suffix", "\"</w>\"", kUnimplemented, "model.end_of_word_suffix"},
      {"/added_tokens", "{}", kInvalid, "added_tokens must be an array"},
      {"/added_tokens/0", "5", kInvalid, "added_tokens[0] must be an object"},
      {"/added_tokens/0/id", "-5", kInvalid, "added_tokens[0].id must be a whole number"},
      {"/added_tokens/0/id", "1000000000", kInvalid, "added_tokens[0].id must be a whole number"},
      {"/added_tokens/0/id", "1", kInvalid, "added_tokens[0] has id 1"},
      {"/added_tokens/0/content", "\"a\"", kInvalid, "added_tokens[0] has id 5"},
      {"/added_tokens/0/content", "null", kInvalid, "added_tokens[0].content must be a string"},
      {"/added_tokens/1", R"({"id": 5, "content": "<y>"})", kInvalid, "added_tokens[1] repeats"},
      {"/added_tokens/1", R"({"id": 6, "content": "<x>"})", kInvalid, "added_tokens[1] repeats"},
      {"/normalizer", R"({"type": "Lowercase"})", kUnimplemented,
       "normalizer has type \"Lowercase\""},
      {"/normalizer", R"({"type": "Sequence", "normalizers": [{"type": "NFKC"}]})", kUnimplemented,
       "normalizer.normalizers[0] has type \"NFKC\""},
      {"/normalizer", R"({"type": "Replace", "pattern": {"Regex": "(a"}, "content": ""})", kInvalid,
       "normalizer.pattern.Regex is no regular expression"},
      {"/pre_tokenizer", R"({"type": "BertPreTokenizer"})", kUnimplemented,
       "pre_tokenizer has type"},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"String": " "}, "behavior": "Sideways"})",
       kUnimplemented, "pre_tokenizer.behavior is \"Sideways\""},
      {"/pre_tokenizer",
       R"({"type": "Split", "pattern": {"Regex": "\\C"}, "behavior": "Isolated"})", kInvalid,
       "pre_tokenizer.pattern.Regex is no regular expression"},
      {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "last"})",
       kInvalid, "pre_tokenizer.prepend_scheme must be"},
      {"/decoder", R"({"type": "CTC"})", kUnimplemented, "decoder has type \"CTC\""},
      {"/decoder", R"({"type": "Strip", "content": " ", "start": 1, "stop": 0})", kUnimplemented,
       "after Fuse"},
      {"/post_processor", R"({"type": "BertProcessing"})", kUnimplemented,
       "post_processor has type"},
      {"/post_processor", R"({"type": "TemplateProcessing", "single": []})", kInvalid,
       "must hold one Sequence"},
      {"/post_processor",
       R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q"}}], "special_tokens": {}})",
       kInvalid, "post_processor.special_tokens.q must be an object"},
      {"/post_processor",
       R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q"}}],
        "special_tokens": {"q": {"ids": [6]}}})",
       kInvalid, "must hold ids from 0 to 5"},
  };
  for (const Edit& edit : edits) {
    json file = Small();
    file[json::json_pointer(edit.pointer)] = json::parse(edit.value);
    const absl::Status status = Tokenizer::FromJson(file.dump(), "dir/t.json").status();
    EXPECT_EQ(status.code(), edit.code) << edit.pointer << " = " << edit.value << ": " << status;
    EXPECT_EQ(status.message().find("dir/t.json: "), 0u) << status;
    EXPECT_NE(status.message().find(edit.message), std::string::npos)
        << edit.message << " against " << status;
  }
}

TEST(TokenizerErrorsTest, PiecesAndMembersGivenTwice) {
  const auto status = [](const std::string& model) {
    return Tokenizer::FromJson("{\"model\": {" + model + "}}", "t.json").status().ToString();
  };
  EXPECT_NE(status(R"("vocab": {"a": 0, "a": 1}, "merges": [])").find("holds \"a\" twice"),
            std::string::npos);
  EXPECT_NE(status(R"("vocab": {}, "vocab": {}, "merges": [])").find("model.vocab is given twice"),
            std::string::npos);
  EXPECT_NE(
      status(R"("vocab": {}, "merges": [], "merges": [])").find("model.merges is given twice"),
      std::string::npos);
}

TEST(TokenizerErrorsTest, NoJson) {
  for (const std::string text :
       {"", "[]", "null", "{", "{\"model\": \"\xFF\"}", "{} x", "\"\\ud800\""}) {
    EXPECT_EQ(Tokenizer::FromJson(text, "t.json").status().code(), kInvalid) << text;
  }
  for (const char* open :
       {"[", "{\"a\":", "{\"model\":{\"vocab\":{\"a\":[", "{\"model\":{\"merges\":[[["}) {
    std::string text;
    for (int i = 0; i < 100000; ++i) text += open;
    EXPECT_EQ(Tokenizer::FromJson(text, "t.json").status().code(), kInvalid) << open;
  }
}

// A split pattern that backtracks without end is an error of Encode, not a hang.
TEST(TokenizerErrorsTest, EndlessBacktrackingIsCutOff) {
  json file = Small();
  file["pre_tokenizer"] = {
      {"type", "Split"}, {"behavior", "Isolated"}, {"pattern", {{"Regex", "(?:(a+)+)+$"}}}};
  const auto tokenizer = Tokenizer::FromJson(file.dump(), "t.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode(std::string(200, 'a') + "b").status().code(),
            absl::StatusCode::kResourceExhausted);
}

// Returns whether the file was taken; a file that is taken must also work.
bool Survives(const absl::StatusOr<std::unique_ptr<Tokenizer>>& tokenizer) {
  if (!tokenizer.ok()) {
    EXPECT_TRUE(tokenizer.status().code() == kInvalid ||
                tokenizer.status().code() == kUnimplemented)
        << tokenizer.status();
    return false;
  }
  const auto ids =
      (*tokenizer)->Encode("Once upon a time, <s> 2024\n\u4F60\u597D \U0001F600 e\u0301");
  if (ids.ok()) (*tokenizer)->Decode(*ids);
  return true;
}

TEST(TokenizerErrorsTest, CutAndMutatedFilesNeverCrash) {
  std::mt19937 random(11);
  for (const std::string& path :
       {FixturePath("llama3"), FixturePath("mistral"), std::string(kStoriesModel)}) {
    const bool is_json = path.ends_with(".json");
    const std::string bytes = ReadSourceFile(path);
    const auto parse = [&](const std::string& changed) {
      return is_json ? Tokenizer::FromJson(changed, path)
                     : Tokenizer::FromSentencePiece(changed, path);
    };
    for (size_t length = 0; length < bytes.size(); length += 97) {
      EXPECT_FALSE(is_json && Survives(parse(bytes.substr(0, length))))
          << path << " cut at " << length;
    }
    int taken = 0;
    for (int i = 0; i < 300; ++i) {
      std::string changed = bytes;
      for (int edits = 1 + static_cast<int>(random() % 3); edits > 0; --edits) {
        const size_t at = random() % changed.size();
        if (random() % 2 == 0) {
          changed[at] = static_cast<char>(random());
        } else {
          changed.erase(at, random() % 8);
        }
      }
      taken += Survives(parse(changed));
    }
    EXPECT_LT(taken, 300) << path;
  }
}

TEST(TokenizerErrorsTest, NoSentencePieceModel) {
  for (const std::string& bytes :
       {std::string(), std::string("\xFF\xFF\xFF"), std::string(100, 'x')}) {
    const absl::Status status = Tokenizer::FromSentencePiece(bytes, "dir/tokenizer.model").status();
    EXPECT_EQ(status.code(), kInvalid);
    EXPECT_EQ(status.message().find("dir/tokenizer.model: "), 0u) << status;
  }
}

}  // namespace
}  // namespace trireme
