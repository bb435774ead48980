#include "kernels/check.h"
#include "runtime/tokenizer.h"
#include "tests/fuzz/parser_checks.h"

namespace trireme {

bool CheckTokenizerJson(const std::string& json) {
  const auto tokenizer = Tokenizer::FromJson(json, "tokenizer.json");
  if (!tokenizer.ok()) {
    const std::string message(tokenizer.status().message());
    CHECK(message.starts_with("tokenizer.json")) << message;
    CHECK(message.find('\n') == std::string::npos) << message;
    return false;
  }
  for (const char* text : {"", "Once upon a time", " h\xc3\xa9llo\n\n\t1234 <s></s>",
                           "\xf0\x9f\x98\x80\xe4\xbd\xa0"}) {
    const auto ids = (*tokenizer)->Encode(text);
    // A vocabulary may lack the pieces of a text; that is an error, not a crash.
    if (!ids.ok()) continue;
    for (const TokenId id : *ids) CHECK_GE(id, 0);
    const std::string whole = (*tokenizer)->Decode(*ids);
    Detokenizer detokenizer(**tokenizer);
    std::string streamed;
    for (const TokenId id : *ids) streamed += detokenizer.Append(id);
    streamed += detokenizer.Finish();
    CHECK(streamed == whole) << "streamed \"" << streamed << "\", whole \"" << whole << "\"";
  }
  return true;
}

}  // namespace trireme
