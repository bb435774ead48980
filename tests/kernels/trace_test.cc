// Spans are kept per thread, the last ones when there are too many, and none while tracing is off.

#include "kernels/trace.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <thread>

namespace trireme {
namespace {

TEST(TraceTest, KeepsTheSpansOfEveryThread) {
  { const TraceScope off("off"); }
  StartTrace();
  {
    const TraceScope outer("outer", 7);
    std::thread([] { const TraceScope other("other"); }).join();
  }
  const std::vector<TraceSpan> spans = TakeTrace();
  ASSERT_EQ(spans.size(), 2u);
  std::set<std::string> names;
  for (const TraceSpan& span : spans) {
    names.insert(span.name);
    EXPECT_LE(span.begin_ns, span.end_ns);
    EXPECT_EQ(span.argument, span.name == std::string("outer") ? 7 : -1);
  }
  EXPECT_EQ(names, (std::set<std::string>{"outer", "other"}));
  EXPECT_NE(spans[0].thread, spans[1].thread);
  { const TraceScope off("off"); }
  EXPECT_TRUE(TakeTrace().empty());
}

TEST(TraceTest, KeepsTheLastOnes) {
  StartTrace(4);
  for (int i = 0; i < 10; ++i) {
    const TraceScope span("span", i);
  }
  const std::vector<TraceSpan> spans = TakeTrace();
  ASSERT_EQ(spans.size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(spans[i].argument, 6 + i);
}

}  // namespace
}  // namespace trireme
