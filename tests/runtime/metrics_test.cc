// The text that a scrape gets.

#include "runtime/metrics.h"

#include <gtest/gtest.h>

namespace trireme {
namespace {

bool Holds(const std::string& text, const std::string& line) {
  return text.find("\n" + line + "\n") != std::string::npos;
}

// Six digits made them stand still for a second at a time after 28 hours, and rate() with them.
TEST(MetricsTest, CountersOfSecondsMoveAfterMonths) {
  EngineStats stats;
  stats.decode_seconds = 1234567.25;  // two weeks
  stats.communication_seconds = 100800.125;
  stats.queue_seconds.Observe(1234567.25);
  stats.steps = 123456789012;
  const std::string text = PrometheusText(stats);
  EXPECT_TRUE(Holds(text, "trireme_decode_seconds_total 1234567.25")) << text;
  EXPECT_TRUE(Holds(text, "trireme_communication_seconds_total 100800.125")) << text;
  EXPECT_TRUE(Holds(text, "trireme_queue_seconds_sum 1234567.25")) << text;
  EXPECT_TRUE(Holds(text, "trireme_steps_total 123456789012")) << text;
}

}  // namespace
}  // namespace trireme
