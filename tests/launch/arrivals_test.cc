// A file of recorded arrivals: what it says, and one line for everything that may be wrong with it.

#include "launch/arrivals.h"

#include <gtest/gtest.h>

#include <fstream>

#include "absl/strings/string_view.h"
#include "tests/models/temp_dir.h"

namespace trireme {
namespace {

class ArrivalsTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::vector<RecordedArrival>> Read(const std::string& text) {
    std::ofstream(path_) << text;
    return ReadArrivals(path_, 512);
  }
  // Of `text`; empty when there is none.
  std::string Error(const std::string& text) {
    const std::string message(Read(text).status().message());
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  }
  TempDir dir_;
  const std::string path_ = dir_.path() + "/a.jsonl";
};

constexpr char kGood[] = "{\"at\": 0.25, \"prompt_tokens\": 12, \"max_tokens\": 500}\n";

TEST_F(ArrivalsTest, LinesAreRequestsInOrder) {
  const auto arrivals = Read(
      std::string("{\"max_tokens\": 3, \"prompt_tokens\": 2, \"at\": 0}\r\n\n") + kGood + kGood);
  ASSERT_TRUE(arrivals.ok()) << arrivals.status().message();
  ASSERT_EQ(arrivals->size(), 3u);
  EXPECT_EQ((*arrivals)[0].at, 0.0);
  EXPECT_EQ((*arrivals)[0].prompt_tokens, 2);
  EXPECT_EQ((*arrivals)[0].max_tokens, 3);
  EXPECT_EQ((*arrivals)[2].at, 0.25);
}

TEST_F(ArrivalsTest, WhatIsWrongNamesTheFileAndTheLine) {
  const std::pair<const char*, const char*> cases[] = {
      {"x", "is not valid JSON"},
      {"[1]", "is an array; must be an object"},
      {"{\"at\": 1, \"at\": 2, \"prompt_tokens\": 1, \"max_tokens\": 1}",
       "has the key \"at\" twice"},
      {"{\"prompt_tokens\": 1, \"max_tokens\": 1}", "needs \"at\""},
      {"{\"at\": 1, \"max_tokens\": 1}", "needs \"prompt_tokens\""},
      {"{\"at\": 1, \"prompt_tokens\": 1}", "needs \"max_tokens\""},
      {"{\"at\": 1, \"prompt_tokens\": 1, \"max_token\": 1}", "unknown key \"max_token\""},
      {"{\"at\": -1, \"prompt_tokens\": 1, \"max_tokens\": 1}", "\"at\" is -1; it must be"},
      {"{\"at\": 1e300, \"prompt_tokens\": 1, \"max_tokens\": 1}", "\"at\" is 1e+300; it must be"},
      {"{\"at\": \"1\", \"prompt_tokens\": 1, \"max_tokens\": 1}", "\"at\" is \"1\"; it must be"},
      {"{\"at\": 0.125, \"prompt_tokens\": 1, \"max_tokens\": 1}",
       "\"at\" is 0.125, before the 0.25 of the request above"},
      {"{\"at\": 1, \"prompt_tokens\": 0, \"max_tokens\": 1}",
       "\"prompt_tokens\" is 0; it must be"},
      {"{\"at\": 1, \"prompt_tokens\": 1.5, \"max_tokens\": 1}",
       "\"prompt_tokens\" is 1.5; it must"},
      {"{\"at\": 1, \"prompt_tokens\": 1, \"max_tokens\": -2}", "\"max_tokens\" is -2; it must be"},
      {"{\"at\": 1, \"prompt_tokens\": 1, \"max_tokens\": 18446744073709551615}",
       "\"max_tokens\" is 18446744073709551615; it must be"},
      {"{\"at\": 1, \"prompt_tokens\": 513, \"max_tokens\": 1}",
       "\"prompt_tokens\" is 513; the model takes 512 tokens"},
      {"{\"at\": 1, \"prompt_tokens\": 500, \"max_tokens\": 13}",
       "\"prompt_tokens\" 500 and \"max_tokens\" 13: the model takes 512 tokens"}};
  for (const auto& [line, what] : cases) {
    const std::string error = Error(std::string(kGood) + "\n" + line + "\n");
    EXPECT_EQ(error.rfind(path_ + ":3: " + what, 0), 0u) << line << " gives " << error;
  }
  EXPECT_EQ(Error("\n"), path_ + ": holds no arrivals");
  EXPECT_NE(ReadArrivals(path_ + "x", 512).status().message().find("cannot be read"),
            absl::string_view::npos);
}

}  // namespace
}  // namespace trireme
