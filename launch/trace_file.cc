#include "launch/trace_file.h"

#include <algorithm>
#include <fstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/trace.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

// This rank's clock minus rank 0's. All ranks leave a barrier within microseconds of each other;
// the least difference of several is the closest.
int64_t ClockOffset(ControlPlane& control) {
  int64_t best = 0, best_span = INT64_MAX;
  for (int round = 0; round < 8; ++round) {
    control.Barrier();
    const int64_t before = TraceNow();
    ByteWriter out;
    out.Put(TraceNow());
    std::string bytes = out.Take();
    control.Broadcast(&bytes);
    const int64_t now = TraceNow(), theirs = ByteReader(bytes).Get<int64_t>();
    if (now - before < best_span) best_span = now - before, best = now - theirs;
  }
  return control.rank() == 0 ? 0 : best;
}

std::string EventsOf(int rank, const std::string& host, const std::vector<TraceSpan>& spans,
                     int64_t offset_ns) {
  std::string out = absl::StrFormat(
      "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":%d,\"args\":{\"name\":\"rank %d (%s)\"}},\n",
      rank, rank, host);
  for (const TraceSpan& span : spans) {
    absl::StrAppendFormat(
        &out, "{\"name\":\"%s\",\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f",
        span.name, rank, span.thread, 1e-3 * static_cast<double>(span.begin_ns - offset_ns),
        1e-3 * static_cast<double>(span.end_ns - span.begin_ns));
    if (span.argument >= 0) absl::StrAppend(&out, ",\"args\":{\"step\":", span.argument, "}");
    out += "},\n";
  }
  return out;
}

}  // namespace

void BeginTraceFile(const std::string& path) {
  if (!path.empty()) StartTrace();
}

absl::Status EndTraceFile(ControlPlane& control, const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  const std::vector<TraceSpan> spans = TakeTrace();
  const int64_t offset = ClockOffset(control);
  const std::vector<std::string> all =
      control.Gather(EventsOf(control.rank(), control.host(), spans, offset));
  absl::Status status;
  if (control.rank() == 0) {
    std::string events;
    for (const std::string& one : all) events += one;
    events.resize(events.size() - 2);  // the last comma
    std::ofstream file(path);
    file << "{\"traceEvents\":[\n" << events << "\n]}\n";
    if (!file.flush())
      status = absl::UnavailableError(absl::StrCat("--trace ", path, ": cannot be written"));
  }
  return control.Agree(status);
}

}  // namespace trireme
