// The filter grammar: what it accepts, where it says an error is, and 10,000 random expressions
// against an evaluator that walks the text's own tree.
#include "runtime/retrieval_filter.h"

#include "tests/testing.h"

namespace trireme {
namespace {

const std::vector<std::string> kNames = {"lang:en", "lang:de", "topic/news", "adult", "a.b-c", "x"};

std::string Error(const std::string& text) {
  return std::string(ParseFilter(text, kNames).status().message());
}

bool Passes(const Filter& filter, uint32_t bits) {
  for (const auto& clause : filter.clauses) {
    bool any = false;
    for (const Filter::Literal& literal : clause) {
      any = any || ((bits >> literal.attribute & 1) != 0) != literal.negated;
    }
    if (!any) return false;
  }
  return true;
}

TEST(RetrievalFilterTest, ReadsSymbolsAndWords) {
  for (const char* text :
       {"lang:en & (topic/news | !adult)", "lang:en AND (topic/news OR NOT adult)",
        "  lang:en&(topic/news|!adult) "}) {
    const Filter filter = ParseFilter(text, kNames).value();
    ASSERT_EQ(filter.clauses.size(), 2u) << text;
    EXPECT_TRUE(Passes(filter, 0b000001));
    EXPECT_TRUE(Passes(filter, 0b001101));
    EXPECT_FALSE(Passes(filter, 0b001001));
    EXPECT_FALSE(Passes(filter, 0b000100));
  }
  EXPECT_TRUE(ParseFilter("", kNames).value().clauses.empty());
  EXPECT_TRUE(ParseFilter("   ", kNames).value().clauses.empty());
}

TEST(RetrievalFilterTest, SaysWhereItIsWrong) {
  EXPECT_NE(Error("lang:en &").find("position 10: expected an attribute"), std::string::npos);
  EXPECT_NE(Error("lang:en | adult").find("position 9: an OR needs parentheses"),
            std::string::npos);
  EXPECT_NE(Error("(lang:en & adult)").find("position 10: a clause in parentheses is an OR"),
            std::string::npos);
  EXPECT_NE(Error("(lang:en").find("position 9: expected | or )"), std::string::npos);
  EXPECT_NE(Error("lang:en adult").find("position 9: expected & or the end"), std::string::npos);
  EXPECT_NE(Error("!!adult").find("position 2"), std::string::npos);
  EXPECT_NE(Error("adult & $").find("position 9"), std::string::npos);
  EXPECT_NE(Error("x & lang:fr").find("position 5: the table has no attribute \"lang:fr\""),
            std::string::npos);
}

TEST(RetrievalFilterTest, RandomExpressionsEqualTheNaiveEvaluator) {
  uint64_t draw = 0;
  const auto below = [&draw](int n) {
    return static_cast<int>((RandomValue(71, draw++) + 1) / 2 * n);
  };
  for (int i = 0; i < 10000; ++i) {
    std::string text;
    const uint32_t bits = below(64);
    bool expected = true;
    const int clauses = 1 + below(4);
    for (int c = 0; c < clauses; ++c) {
      if (c > 0) text += below(2) == 0 ? " & " : " AND ";
      const int literals = 1 + below(4);
      const bool parentheses = literals > 1 || below(2) == 0;
      bool any = false;
      if (parentheses) text += "(";
      for (int l = 0; l < literals; ++l) {
        if (l > 0) text += below(2) == 0 ? "|" : " OR ";
        const bool negated = below(2) == 0;
        const int attribute = below(static_cast<int>(kNames.size()));
        if (negated) text += below(2) == 0 ? "!" : "NOT ";
        text += kNames[attribute];
        any = any || ((bits >> attribute & 1) != 0) != negated;
      }
      if (parentheses) text += ")";
      expected = expected && any;
    }
    const auto filter = ParseFilter(text, kNames);
    ASSERT_TRUE(filter.ok()) << filter.status();
    ASSERT_EQ(Passes(*filter, bits), expected) << text;
  }
}

}  // namespace
}  // namespace trireme
