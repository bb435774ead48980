// What one flight record costs the rank that writes it: entered and completed, two looks at the
// clock included. Target: below 200 ns.
#include <benchmark/benchmark.h>

#include "kernels/check.h"
#include "parallel/flight_recorder.h"

namespace trireme {
namespace {

void BM_Record(benchmark::State& state) {
  auto recorder = FlightRecorder::Create(0);
  CHECK(recorder.ok()) << recorder.status().ToString();
  (*recorder)->AddGroup({{"world"}, 0, 1, 4});
  for (auto unused : state) {
    const FlightRecorder::Scope scope(recorder->get(), CommOp::kAllReduce, 0, 256);
  }
}
BENCHMARK(BM_Record);

void BM_NoRecorder(benchmark::State& state) {
  FlightRecorder* none = nullptr;
  benchmark::DoNotOptimize(none);
  for (auto unused : state) {
    const FlightRecorder::Scope scope(none, CommOp::kAllReduce, 0, 256);
  }
}
BENCHMARK(BM_NoRecorder);

void BM_State(benchmark::State& state) {
  auto recorder = FlightRecorder::Create(0);
  CHECK(recorder.ok()) << recorder.status().ToString();
  for (auto unused : state) benchmark::DoNotOptimize((*recorder)->State());
}
BENCHMARK(BM_State);

}  // namespace
}  // namespace trireme

BENCHMARK_MAIN();
