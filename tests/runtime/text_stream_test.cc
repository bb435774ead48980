// Streaming text: the pieces joined are the whole, stop strings are cut wherever they fall, nothing
// is shown too early.

#include "runtime/text_stream.h"

#include <gtest/gtest.h>

#include "tests/testing.h"

namespace trireme {
namespace {

class TextStreamTest : public ::testing::Test {
 protected:
  void SetUp() override { tokenizer_ = Tokenizer::Load(GoldenModel("stories260K")).value(); }
  // The text given out, piece by piece; feeding ends where the stream says it has stopped.
  std::string Feed(const std::string& text, std::vector<std::string> stop, bool* stopped) {
    const std::vector<TokenId> ids = tokenizer_->Encode(text).value();
    TextStream stream(tokenizer_.get(), {1}, std::move(stop));
    std::string out;
    for (size_t i = 1; i < ids.size() && !stream.stopped(); ++i) {
      out += stream.Append(ids[i]);
      for (const char* secret : {"park", "the dog"}) {
        if (stop_checked_) {
          EXPECT_EQ(out.find(secret), std::string::npos);
        }
      }
    }
    *stopped = stream.stopped();
    return out + stream.Finish();
  }
  std::unique_ptr<Tokenizer> tokenizer_;
  bool stop_checked_ = false;
};

TEST_F(TextStreamTest, JoinedPiecesAreTheText) {
  bool stopped = true;
  const std::string text = "Tom saw the dog in the park. Ünïcode 🙂 too.";
  EXPECT_EQ(Feed(text, {}, &stopped), text);
  EXPECT_FALSE(stopped);
  EXPECT_EQ(Feed(text, {"zebra", "parking"}, &stopped), text);
  EXPECT_FALSE(stopped);
}

TEST_F(TextStreamTest, StopStringsAreCutAndNeverShown) {
  bool stopped = false;
  stop_checked_ = true;
  EXPECT_EQ(Feed("Tom went to the park today", {"park"}, &stopped), "Tom went to the ");
  EXPECT_TRUE(stopped);
  EXPECT_EQ(Feed("Tom saw the dog run", {"park", "the dog"}, &stopped), "Tom saw ");
  EXPECT_TRUE(stopped);
}

TEST_F(TextStreamTest, WithoutATokenizerThereIsNoText) {
  TextStream stream(nullptr, {1}, {"x"});
  EXPECT_EQ(stream.Append(5), "");
  EXPECT_EQ(stream.Finish(), "");
}

}  // namespace
}  // namespace trireme
