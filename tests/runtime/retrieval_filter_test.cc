// The filter grammar: what it accepts, where it says an error is, and 10,000 random expressions
// over all combinations of attributes against an evaluator that walks the text's own tree.
#include "runtime/retrieval_filter.h"

#include "runtime/retrieval_shard.h"
#include "tests/retrieval_files.h"
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

// What a shard with an item of every combination of attributes makes of them.
TEST(RetrievalFilterTest, RandomExpressionsEqualTheNaiveEvaluator) {
  const TestDevice device(1);
  const ScratchDir scratch;
  WriteRandomHead(SmallHead(), scratch.path() + "/head", 1);
  const auto model = MolModel::Load(scratch.path() + "/head", device.stream()).value();
  constexpr int64_t kCombinations = 64, kDim = 10;
  ItemShardOptions options;
  options.capacity = kCombinations;
  options.attributes = kNames;
  const auto shard = ItemShard::Create(*model, device.stream(), options).value();
  std::vector<int64_t> ids(kCombinations);
  std::vector<uint32_t> order(kCombinations);
  std::vector<uint64_t> words(kCombinations);
  for (int64_t i = 0; i < kCombinations; ++i) ids[i] = order[i] = words[i] = i;
  const std::vector<float> embeddings(kCombinations * kDim, 0.5f);
  ASSERT_TRUE(shard
                  ->Put(device.stream(), {.embeddings = embeddings.data(),
                                          .ids = ids.data(),
                                          .order = order.data(),
                                          .attributes = words.data(),
                                          .count = kCombinations})
                  .ok());
  uint64_t draw = 0;
  const auto below = [&draw](int n) {
    return static_cast<int>((RandomValue(71, draw++) + 1) / 2 * n);
  };
  for (int i = 0; i < 10000; ++i) {
    std::string text;
    // Bit i: of the item whose attributes are the bits of i.
    uint64_t expected = ~uint64_t{0};
    const int clauses = 1 + below(4);
    for (int c = 0; c < clauses; ++c) {
      if (c > 0) text += below(2) == 0 ? " & " : " AND ";
      const int literals = 1 + below(4);
      const bool parentheses = literals > 1 || below(2) == 0;
      uint64_t any = 0;
      if (parentheses) text += "(";
      for (int l = 0; l < literals; ++l) {
        if (l > 0) text += below(2) == 0 ? "|" : " OR ";
        const bool negated = below(2) == 0;
        const int attribute = below(static_cast<int>(kNames.size()));
        if (negated) text += below(2) == 0 ? "!" : "NOT ";
        text += kNames[attribute];
        for (int bits = 0; bits < kCombinations; ++bits) {
          if (((bits >> attribute & 1) != 0) != negated) any |= uint64_t{1} << bits;
        }
      }
      if (parentheses) text += ")";
      expected &= any;
    }
    const auto filter = ParseFilter(text, kNames);
    ASSERT_TRUE(filter.ok()) << filter.status();
    uint64_t mask = 0;
    shard->FillMask(*filter, nullptr, reinterpret_cast<int32_t*>(&mask));
    ASSERT_EQ(mask, expected) << text;
  }
}

}  // namespace
}  // namespace trireme
