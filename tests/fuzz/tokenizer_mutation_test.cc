// Mutated tokenizer.json files: nothing may crash or hang, and what loads must stream as it
// decodes.
#include "tests/fuzz/fuzz_cases.h"
#include "tests/fuzz/parser_checks.h"

namespace trireme {
namespace {

// Small vocabularies of the two kinds, so that a case costs tens of microseconds.
constexpr const char* kByteLevel =
    R"({"version":"1.0","added_tokens":[{"id":0,"content":"<s>","special":true,"single_word":false,"lstrip":false,)"
    R"("rstrip":false,"normalized":false}],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,)"
    R"("trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE",)"
    R"("dropout":null,"unk_token":null,"vocab":{"<s>":0,"O":1,"n":2,"c":3,"e":4,"Ġ":5,"on":6,"ce":7,"t":8,"i":9,"m":10},)"
    R"("merges":["o n",["c","e"]]}})";
constexpr const char* kByteFallback =
    R"({"version":"1.0","added_tokens":[{"id":0,"content":"<unk>","special":true},{"id":1,"content":"<s>","special":true}],)"
    R"("normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":)"
    R"({"String":" "},"content":"▁"}]},"pre_tokenizer":null,"decoder":{"type":"Sequence","decoders":[{"type":"Replace",)"
    R"("pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,)"
    R"("stop":0}]},"model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,"vocab":{"<unk>":0,"<s>":1,)"
    R"("<0x0A>":2,"<0xC3>":3,"<0xA9>":4,"▁":5,"O":6,"n":7,"▁O":8,"a":9,"t":10},"merges":["▁ O"]}})";

const std::vector<std::string> kTokens = {"\"type\":\"BPE\"",
                                          "\"type\":\"Sequence\"",
                                          "\"type\":\"ByteLevel\"",
                                          "\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a+)+$\"}",
                                          "\"added_tokens\":",
                                          "\"merges\":[]",
                                          "\"vocab\":{}",
                                          "\"byte_fallback\":true",
                                          "\"special\":true",
                                          "\"id\":-1,",
                                          "{\"String\":\"\"}",
                                          "\"\\ud800\"",
                                          "\xff",
                                          "null",
                                          "true",
                                          "{}",
                                          "[]",
                                          "{",
                                          "}",
                                          "[",
                                          "]",
                                          ",",
                                          ":",
                                          "\"",
                                          std::string(100, '[')};

TEST(TokenizerMutationTest, SmallVocabularies) {
  RunFuzzCases(Mutator({kByteLevel, kByteFallback}, kTokens), kFuzzCases,
               [](const std::string& input, size_t) { return CheckTokenizerJson(input); });
}

TEST(TokenizerMutationTest, RealFile) {
  RunFuzzCases(Mutator({SourceFile("examples/models/stories260K/tokenizer.json")}, kTokens),
               kFuzzCases / 5,
               [](const std::string& input, size_t) { return CheckTokenizerJson(input); });
}

}  // namespace
}  // namespace trireme
