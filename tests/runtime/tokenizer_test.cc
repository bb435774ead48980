#include "runtime/tokenizer.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/runtime/tokenizer_files.h"
#include "tests/testing.h"

namespace trireme {
namespace {

using nlohmann::json;
using Ids = std::vector<TokenId>;

TEST(TokenizerTest, BothStoriesFilesGiveTheGoldenIds) {
  const json golden = ReadSourceJson("examples/models/stories260K/golden/tokenizer_cases.json");
  ASSERT_EQ(golden["cases"].size(), 200u);
  for (const char* path : {kStoriesJson, kStoriesModel}) {
    const auto tokenizer = OpenTokenizer(path);
    ASSERT_NE(tokenizer, nullptr);
    for (const json& c : golden["cases"]) {
      const auto ids = tokenizer->Encode(c["text"]);
      ASSERT_TRUE(ids.ok()) << ids.status();
      EXPECT_EQ(*ids, c["ids"].get<Ids>()) << path << ": " << c["text"];
      EXPECT_EQ(tokenizer->Decode(*ids), c["text"].get<std::string>()) << path;
    }
  }
}

TEST(TokenizerTest, SpecialTokensInTheTextAreTheirIdsInTokenizerJsonOnly) {
  const json golden = ReadSourceJson("examples/models/stories260K/golden/tokenizer_cases.json");
  const auto from_json = OpenTokenizer(kStoriesJson);
  const auto from_model = OpenTokenizer(kStoriesModel);
  ASSERT_FALSE(golden["special_text"].empty());
  for (const json& c : golden["special_text"]) {
    EXPECT_EQ(from_json->Encode(c["text"]).value(), c["tokenizer_json_ids"].get<Ids>())
        << c["text"];
    EXPECT_EQ(from_model->Encode(c["text"]).value(), c["sentencepiece_ids"].get<Ids>())
        << c["text"];
  }
}

// Where the bytes are valid UTF-8, Decode is what the golden file says; where they are not, the two
// libraries disagree with each other, and one U+FFFD per maximal subpart is the rule here.
TEST(TokenizerTest, DecodesAsTheGoldenFileSays) {
  const json golden = ReadSourceJson("examples/models/stories260K/golden/tokenizer_cases.json");
  const auto from_json = OpenTokenizer(kStoriesJson);
  const auto from_model = OpenTokenizer(kStoriesModel);
  int compared = 0;
  for (const json& c : golden["decode"]) {
    const std::string expected = c["tokenizer_json_text"];
    const Ids ids = c["ids"];
    EXPECT_EQ(from_json->Decode(ids), from_model->Decode(ids)) << c;
    if (expected.find("\uFFFD") != std::string::npos) continue;
    EXPECT_EQ(from_json->Decode(ids), expected) << c;
    ++compared;
  }
  EXPECT_GE(compared, 12);
  EXPECT_EQ(from_json->Decode({198}), "\uFFFD");
  EXPECT_EQ(from_json->Decode({411, 229, 133}), "e\uFFFD");
  EXPECT_EQ(from_json->Decode({229, 133, 411}), "\uFFFDe");
  EXPECT_EQ(from_json->Decode({13, 179, 68, 411}), "\n\uFFFDAe");
  EXPECT_EQ(from_json->Decode({198, 172, 198, 411}), "\u00E9\uFFFDe");
}

TEST(TokenizerTest, DecodesThePublishedStory) {
  const json story =
      ReadSourceJson("examples/models/stories260K/golden/greedy.json")["upstream_story"];
  for (const char* path : {kStoriesJson, kStoriesModel}) {
    Ids ids = story["prompt_ids"];
    const Ids new_ids = story["new_ids"];
    ids.insert(ids.end(), new_ids.begin(), new_ids.end());
    EXPECT_EQ(OpenTokenizer(path)->Decode(ids), story["text"].get<std::string>()) << path;
  }
}

TEST(TokenizerTest, DescribesTheStoriesVocabulary) {
  for (const char* path : {kStoriesJson, kStoriesModel}) {
    const auto tokenizer = OpenTokenizer(path);
    EXPECT_EQ(tokenizer->vocab_size(), 512) << path;
    EXPECT_EQ(tokenizer->bos_id(), 1) << path;
    EXPECT_TRUE(tokenizer->strips_leading_space()) << path;
    EXPECT_EQ(tokenizer->TokenBytes(410), " ") << path;
    EXPECT_EQ(tokenizer->TokenBytes(403), " Once") << path;
    for (int byte = 0; byte < 256; ++byte) {
      EXPECT_EQ(tokenizer->TokenBytes(3 + byte), std::string(1, static_cast<char>(byte))) << path;
    }
    for (TokenId id : {-1, 512, 1 << 30}) {
      EXPECT_EQ(tokenizer->TokenBytes(id), "") << path;
      EXPECT_FALSE(tokenizer->IsSpecial(id)) << path;
    }
    for (TokenId id = 0; id < 512; ++id) EXPECT_EQ(tokenizer->IsSpecial(id), id < 3) << path << id;
    EXPECT_EQ(tokenizer->Encode("a", /*add_special_tokens=*/false).value(), Ids({261})) << path;
  }
}

// What the Hugging Face library makes of the same file: see make_cases.py there.
class FixtureTest : public testing::TestWithParam<const char*> {};

TEST_P(FixtureTest, AgreesWithTheHuggingFaceLibrary) {
  const auto tokenizer = OpenTokenizer(FixturePath(GetParam()));
  ASSERT_NE(tokenizer, nullptr);
  const json golden =
      ReadSourceJson(std::string("tests/golden/tokenizers/") + GetParam() + ".cases.json");
  ASSERT_GE(golden["cases"].size(), 200u);
  for (const json& c : golden["cases"]) {
    const auto ids = tokenizer->Encode(c["text"]);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, c["ids"].get<Ids>()) << c["text"];
    EXPECT_EQ(tokenizer->Decode(*ids), c["decoded"].get<std::string>()) << c["text"];
    EXPECT_EQ(tokenizer->Decode(*ids, /*skip_special_tokens=*/false),
              c["decoded_all"].get<std::string>())
        << c["text"];
  }
  for (const json& c : golden["decodes"])
    EXPECT_EQ(tokenizer->Decode(c["ids"]), c["decoded"].get<std::string>()) << c;
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, FixtureTest,
                         testing::Values("gpt2", "starcoder2", "llama3", "qwen", "mistral",
                                         "metaspace", "splits"),
                         [](const auto& info) { return std::string(info.param); });

TEST(TokenizerTest, ByteLevelPiecesAreTheirBytes) {
  const auto tokenizer = OpenTokenizer(FixturePath("gpt2"));
  std::vector<int> seen(256);
  for (TokenId id = 1; id <= 256; ++id) {
    ASSERT_EQ(tokenizer->TokenBytes(id).size(), 1u);
    ++seen[static_cast<unsigned char>(tokenizer->TokenBytes(id)[0])];
  }
  EXPECT_EQ(seen, std::vector<int>(256, 1));
  EXPECT_EQ(tokenizer->bos_id(), -1);
  EXPECT_FALSE(tokenizer->strips_leading_space());
}

TEST(TokenizerTest, InvalidUtf8IsRefusedWithItsOffset) {
  for (const char* path : {kStoriesJson, kStoriesModel}) {
    const auto ids = OpenTokenizer(path)->Encode("caf\xC3\xA9 \xE2\x82 x");
    ASSERT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(ids.status().message().find("byte offset 6"), std::string::npos) << ids.status();
  }
}

TEST(TokenizerTest, ManyThreadsMayEncode) {
  for (const std::string& path :
       {FixturePath("llama3"), FixturePath("qwen"), std::string(kStoriesModel)}) {
    const auto tokenizer = OpenTokenizer(path);
    const std::string text =
        "Once upon a time, in 2024, the cafe\u0301 wasn't open.\n\n<|eot_id|> 你好";
    const Ids expected = tokenizer->Encode(text).value();
    std::vector<std::thread> threads;
    std::vector<int> wrong(4);
    for (int& count : wrong) {
      threads.emplace_back([&] {
        for (int i = 0; i < 200; ++i) count += tokenizer->Encode(text).value() != expected;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, std::vector<int>(4)) << path;
  }
}

class TokenizerDirTest : public testing::Test {
 protected:
  const std::string& dir() const { return scratch_.path(); }
  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(dir() + "/" + name) << bytes;
  }

 private:
  ScratchDir scratch_;
};

TEST_F(TokenizerDirTest, PrefersTokenizerJson) {
  EXPECT_EQ(Tokenizer::Load(dir()).status().code(), absl::StatusCode::kNotFound);
  Write("tokenizer.model", ReadSourceFile(kStoriesModel));
  const Ids spelled = Tokenizer::Load(dir()).value()->Encode("<s>").value();
  EXPECT_GT(spelled.size(), 2u);
  Write("tokenizer.json", ReadSourceFile(kStoriesJson));
  EXPECT_EQ(Tokenizer::Load(dir()).value()->Encode("<s>").value(), Ids({1, 1}));
}

TEST_F(TokenizerDirTest, TokenizerConfigDecidesWhatSurroundsASentencePieceText) {
  Write("tokenizer.model", ReadSourceFile(kStoriesModel));
  EXPECT_EQ(Tokenizer::Load(dir()).value()->Encode("a").value(), Ids({1, 261}));
  Write("tokenizer_config.json", R"({"add_bos_token": false, "add_eos_token": true})");
  EXPECT_EQ(Tokenizer::Load(dir()).value()->Encode("a").value(), Ids({261, 2}));
  EXPECT_EQ(Tokenizer::Load(dir()).value()->bos_id(), -1);
  Write("tokenizer_config.json", R"({"add_bos_token": "yes"})");
  const absl::Status status = Tokenizer::Load(dir()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("tokenizer_config.json: add_bos_token"), std::string::npos)
      << status;
}

}  // namespace
}  // namespace trireme
