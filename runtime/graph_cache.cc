#include "runtime/graph_cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status.h"

namespace trireme {
namespace {

// The outputs' bytes, one after the other.
absl::StatusOr<std::vector<char>> Download(Stream& stream,
                                           const std::vector<ConstTensorView>& outputs) {
  size_t bytes = 0;
  for (const ConstTensorView& output : outputs) bytes += static_cast<size_t>(output.bytes());
  std::vector<char> host(bytes);
  char* to = host.data();
  for (const ConstTensorView& output : outputs) {
    CHECK(output.contiguous()) << "a trial's output has gaps";
    stream.Copy(to, output.data, static_cast<size_t>(output.bytes()));
    to += output.bytes();
  }
  RETURN_IF_ERROR(stream.Synchronize());
  return host;
}

// Runs the work eagerly, then by replay, on the inputs it was not captured with. In between the
// other inputs go through, so that a replay which leaves out a part does not find that part done.
absl::StatusOr<bool> ReplayIsEager(Stream& stream, Graph& graph, const GraphTrial& trial) {
  trial.fill(1);
  trial.work();
  ASSIGN_OR_RETURN(const std::vector<char> eager, Download(stream, trial.outputs));
  trial.fill(0);
  trial.work();
  trial.fill(1);
  graph.Replay(stream);
  ASSIGN_OR_RETURN(const std::vector<char> replayed, Download(stream, trial.outputs));
  return eager == replayed;
}

absl::Status Because(const char* what, const absl::Status& why) {
  return absl::Status(why.code(), absl::StrCat(what, " (", std::string(why.message()), ")"));
}

}  // namespace

const char* Name(EagerReason reason) {
  switch (reason) {
    case EagerReason::kPrompt:
      return "prompt";
    case EagerReason::kOff:
      return "off";
    case EagerReason::kDevice:
      return "device";
    case EagerReason::kCommunicator:
      return "communicator";
    case EagerReason::kCaptureFailed:
      return "capture_failed";
    case EagerReason::kNotEqual:
      return "not_equal";
    case EagerReason::kNotCaptured:
      return "not_captured";
  }
  return "?";
}

std::string Describe(const GraphKey& key) {
  return absl::StrCat(std::string(key.work), " of ", key.size);
}

std::optional<EagerReason> GraphCache::WhyNever(Stream& stream) {
  if (absl::IsUnimplemented(stream.Capture([] {}).status())) return EagerReason::kDevice;
  return std::nullopt;
}

bool GraphCache::Capture(Stream& stream, const GraphKey& key, const GraphTrial& trial) {
  CHECK(!entries_.contains(key)) << Describe(key) << " is captured already";
  if (options_.never) return false;
  // Eagerly first: what libraries make at their first call is not part of a graph.
  trial.fill(0);
  trial.work();
  absl::Status status = stream.Synchronize();
  std::unique_ptr<Graph> graph;
  if (status.ok()) {
    absl::StatusOr<std::unique_ptr<Graph>> captured = stream.Capture(trial.work);
    status = captured.status();
    if (status.ok()) graph = *std::move(captured);
  }
  if (!status.ok()) status = Because("it could not be captured", status);
  if (!OnAllRanks(status.ok())) return Refuse(key, EagerReason::kCaptureFailed, status);
  const absl::StatusOr<bool> equal = ReplayIsEager(stream, *graph, trial);
  if (!equal.ok()) status = Because("it could not be replayed", equal.status());
  if (equal.ok() && !*equal)
    status = absl::InternalError("a replay gave other bits than the work itself");
  if (!OnAllRanks(status.ok())) return Refuse(key, EagerReason::kNotEqual, status);
  ++stats_.graphs;
  stats_.bytes += graph->bytes();
  entries_[key].graph = std::move(graph);
  return true;
}

bool GraphCache::Refuse(const GraphKey& key, EagerReason reason, const absl::Status& why) {
  entries_[key].reason = reason;
  ++stats_.refused[static_cast<size_t>(reason)];
  const bool first_without_memory =
      absl::IsResourceExhausted(why) && !absl::IsResourceExhausted(refusal_);
  if (!why.ok() && (refusal_.ok() || first_without_memory)) {
    refusal_ =
        absl::Status(why.code(), absl::StrCat(Describe(key),
                                              " runs without a graph: ", std::string(why.message()),
                                              "; more are counted, not told"));
  }
  return false;
}

bool GraphCache::Holds(const GraphKey& key) const {
  const auto entry = entries_.find(key);
  return entry != entries_.end() && entry->second.graph != nullptr;
}

void GraphCache::Run(Stream& stream, const GraphKey& key, absl::FunctionRef<void()> work) {
  const auto entry = entries_.find(key);
  if (entry == entries_.end()) {
    return RunEagerly(options_.never.value_or(EagerReason::kNotCaptured), work);
  }
  if (entry->second.graph == nullptr) return RunEagerly(entry->second.reason, work);
  ++stats_.replays;
  entry->second.graph->Replay(stream);
}

void GraphCache::RunEagerly(EagerReason reason, absl::FunctionRef<void()> work) {
  ++stats_.eager_runs(reason);
  work();
}

void TellRefusal(ControlPlane* control, const absl::Status& refusal,
                 const std::function<void(const std::string& line)>& warn) {
  std::vector<std::string> lines = {std::string(refusal.message())};
  if (control != nullptr) lines = control->AllGather(lines[0]);
  const auto told = std::find_if(lines.begin(), lines.end(),
                                 [](const std::string& line) { return !line.empty(); });
  if (told != lines.end() && warn) warn(*told);
}

}  // namespace trireme
