#include "parallel/stall.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace trireme {
namespace {

using Presence = WatchedRank::Presence;

// What the slowest network a model is run over moves in a second: a call may take that long for its
// bytes before it counts as standing still.
constexpr double kSlowestBytesPerSecond = 10e6;

// Ranks of a table at most: a wall of a thousand lines hides the one that matters.
constexpr size_t kTableRanks = 32;

// How often the rank's group has entered a collective, by that rank's own count; 0 when it does not
// know the group yet.
uint64_t Entered(const RankState& state, const CommGroup& group) {
  for (int i = 0; i < state.num_groups; ++i) {
    if (state.groups[i] == group) return state.entered[i];
  }
  return 0;
}

bool InSameCollective(const RankState& a, const RankState& b) {
  return b.in_call && b.last.group_sequence == a.last.group_sequence &&
         b.last.group < b.num_groups && b.groups[b.last.group] == a.groups[a.last.group];
}

// The ranks that `rank` waits for in its call.
std::vector<int> Awaited(std::span<const WatchedRank> ranks, int rank) {
  const RankState& state = ranks[rank].state;
  if (!state.in_call) return {};
  const int count = static_cast<int>(ranks.size());
  if (state.last.peer >= 0 && state.last.peer < count) return {state.last.peer};
  if (state.last.group >= state.num_groups) return {};
  const CommGroup& group = state.groups[state.last.group];
  std::vector<int> absent, inside;
  for (int i = 0; i < group.size; ++i) {
    const int other = group.RankOf(i);
    if (other == rank || other >= count) continue;
    // Whom a wait for sends is about is not recorded: anybody of the group.
    if (!IsCollective(state.last.op) ||
        Entered(ranks[other].state, group) < state.last.group_sequence)
      absent.push_back(other);
    else if (InSameCollective(state, ranks[other].state))
      inside.push_back(other);
  }
  return absent.empty() ? inside : absent;
}

double AllowedSeconds(std::span<const WatchedRank> ranks, int rank, double timeout_s) {
  const RankState& state = ranks[rank].state;
  int64_t bytes = state.last.bytes;
  for (const WatchedRank& other : ranks) {
    if (state.last.group_sequence > 0 && InSameCollective(state, other.state))
      bytes = std::max(bytes, other.state.last.bytes);
  }
  return timeout_s + static_cast<double>(std::max<int64_t>(bytes, 0)) / kSlowestBytesPerSecond;
}

class WaitGraph {
 public:
  WaitGraph(std::span<const WatchedRank> ranks, double timeout_s)
      : awaited_(ranks.size()), live_(ranks.size()), waits_(ranks.size()) {
    for (size_t r = 0; r < ranks.size(); ++r) {
      const WatchedRank& rank = ranks[r];
      const bool here = rank.presence == Presence::kHere;
      waits_[r] = here && rank.state.in_call && !rank.state.outside &&
                  rank.still_s >= AllowedSeconds(ranks, static_cast<int>(r), timeout_s);
      live_[r] = here && !waits_[r] &&
                 (rank.state.outside || rank.state.in_call || rank.still_s < timeout_s);
      if (waits_[r]) awaited_[r] = Awaited(ranks, static_cast<int>(r));
    }
  }
  bool Waits(int rank) const { return waits_[rank]; }
  const std::vector<int>& AwaitedBy(int rank) const { return awaited_[rank]; }

  // Ranks that wait and are not excused, and those they wait for that are not live.
  std::vector<bool> Stuck() const {
    const int count = static_cast<int>(live_.size());
    std::vector<bool> excused = live_;
    for (bool changed = true; changed;) {
      changed = false;
      for (int r = 0; r < count; ++r) {
        if (excused[r] || !waits_[r]) continue;
        const bool hope = std::any_of(awaited_[r].begin(), awaited_[r].end(),
                                      [&](int other) { return excused[other]; });
        // Beside a live rank it may wait for one that never comes.
        const bool lost = std::any_of(awaited_[r].begin(), awaited_[r].end(),
                                      [&](int other) { return !live_[other] && !waits_[other]; });
        if (hope && !lost) excused[r] = changed = true;
      }
    }
    std::vector<bool> stuck(count);
    for (int r = 0; r < count; ++r) {
      if (excused[r] || !waits_[r]) continue;
      stuck[r] = true;
      for (const int other : awaited_[r]) {
        if (!excused[other]) stuck[other] = true;
      }
    }
    return stuck;
  }

 private:
  std::vector<std::vector<int>> awaited_;
  std::vector<bool> live_, waits_;
};

std::string Seconds(double seconds) { return absl::StrFormat("%.1f s", seconds); }

std::string Bytes(int64_t bytes) { return bytes < 0 ? "" : absl::StrCat(", ", bytes, " B"); }

// "all_reduce #53 of tp 2-3, 256 B, micro-batch 118".
std::string DescribeCall(const RankState& state) {
  const FlightRecord& call = state.last;
  std::string out = Name(call.op);
  if (call.group_sequence > 0) absl::StrAppend(&out, " #", call.group_sequence);
  if (call.peer >= 0) {
    const bool sends = call.op == CommOp::kSend || call.op == CommOp::kPost;
    absl::StrAppend(&out, sends ? " to rank " : " from rank ", call.peer);
  } else if (call.group < state.num_groups) {
    absl::StrAppend(&out, " of ", Describe(state.groups[call.group]));
  }
  absl::StrAppend(&out, Bytes(call.bytes));
  if (call.micro_batch >= 0)
    absl::StrAppend(&out, ", micro-batch ", call.micro_batch, ", stage ", call.stage);
  return out;
}

// "in decode, step 118, in all_reduce #53 of tp 2-3".
std::string Where(const RankState& state) {
  std::string out = absl::StrCat("in ", Name(state.phase));
  if (state.phase == Phase::kPrefill || state.phase == Phase::kDecode ||
      state.phase == Phase::kSearch)
    absl::StrAppend(&out, ", step ", state.step);
  if (state.in_call) absl::StrAppend(&out, ", in ", DescribeCall(state));
  return out;
}

std::string Who(std::span<const WatchedRank> ranks, int rank) {
  return absl::StrCat("rank ", rank, " (", ranks[rank].host, ", pid ", ranks[rank].pid, ")");
}

std::string List(const std::vector<int>& ranks) {
  std::string out;
  for (size_t i = 0; i < ranks.size(); ++i)
    absl::StrAppend(&out, i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]);
  return out;
}

std::string Doing(const WatchedRank& rank, const std::string& presence) {
  std::string out;
  if (!presence.empty())
    return absl::StrCat(presence, rank.state.in_call ? ", in " : "",
                        rank.state.in_call ? DescribeCall(rank.state) : "");
  if (rank.state.outside) return "waits for who reads its output or asks it";
  if (rank.state.in_call) {
    return absl::StrCat("for ", Seconds(static_cast<double>(rank.state.last_age_ns) * 1e-9), " in ",
                        DescribeCall(rank.state));
  }
  if (rank.still_s >= 1.0) return absl::StrCat("no progress for ", Seconds(rank.still_s));
  return "runs";
}

std::string PresenceOf(const WatchedRank& rank) {
  switch (rank.presence) {
    case Presence::kHere:
      return "";
    case Presence::kLeft:
      return "has left";
    case Presence::kDead:
      return rank.unreachable ? "host unreachable" : "dead";
    case Presence::kSilent:
      return rank.stopped ? "stopped" : "silent";
  }
  return "";
}

// "all_reduce #53 of tp 2-3: entered by 3, never by 2", for every such group.
std::string Missing(std::span<const WatchedRank> ranks, bool standstill) {
  std::string out;
  std::vector<CommGroup> seen;
  for (const WatchedRank& rank : ranks) {
    for (int i = 0; i < rank.state.num_groups; ++i) {
      const CommGroup& group = rank.state.groups[i];
      if (std::count(seen.begin(), seen.end(), group) > 0) continue;
      seen.push_back(group);
      uint64_t newest = 0;
      std::string op = "call";
      for (const WatchedRank& other : ranks) {
        const uint64_t entered = Entered(other.state, group);
        newest = std::max(newest, entered);
      }
      std::vector<int> in, absent;
      for (int m = 0; m < group.size; ++m) {
        const int member = group.RankOf(m);
        if (member >= static_cast<int>(ranks.size())) continue;
        const RankState& state = ranks[member].state;
        if (Entered(state, group) < newest) {
          absent.push_back(member);
          continue;
        }
        in.push_back(member);
        if (state.last.group_sequence == newest && state.last.group < state.num_groups &&
            state.groups[state.last.group] == group)
          op = Name(state.last.op);
      }
      if (!absent.empty()) {
        absl::StrAppend(&out, "  ", op, " #", newest, " of ", Describe(group), ": entered by ",
                        List(in), standstill ? ", never by " : ", not yet by ", List(absent), "\n");
      }
    }
  }
  return out;
}

}  // namespace

std::optional<Failure> FindStall(std::span<const WatchedRank> ranks, double timeout_s) {
  const WaitGraph graph(ranks, timeout_s);
  const std::vector<bool> stuck = graph.Stuck();
  std::vector<int> frozen, idle, all;
  for (int r = 0; r < static_cast<int>(ranks.size()); ++r) {
    if (!stuck[r]) continue;
    all.push_back(r);
    if (!graph.Waits(r)) frozen.push_back(r);
    // A rank that waits polls; one that does not even poll is frozen inside of its call.
    if (graph.Waits(r) && ranks[r].no_cpu_s >= timeout_s) idle.push_back(r);
  }
  if (all.empty()) return std::nullopt;
  if (!frozen.empty()) return Failure{Failure::Kind::kStuck, frozen, ""};
  if (!idle.empty() && idle.size() < all.size()) return Failure{Failure::Kind::kStuck, idle, ""};
  return Failure{all.size() == 1 ? Failure::Kind::kStuck : Failure::Kind::kDeadlock, all, ""};
}

std::string FailureLine(const Failure& failure, std::span<const WatchedRank> ranks) {
  if (failure.ranks.empty()) return failure.detail;
  const int first = failure.ranks[0];
  const WatchedRank& rank = ranks[first];
  const std::string who = Who(ranks, first), where = Where(rank.state);
  std::string more;
  if (failure.ranks.size() > 1 && failure.kind != Failure::Kind::kDeadlock)
    more = absl::StrCat("; so did rank ", List({failure.ranks.begin() + 1, failure.ranks.end()}));
  switch (failure.kind) {
    case Failure::Kind::kDied:
      return absl::StrCat(who, rank.unreachable ? " cannot be reached any more, " : " died ", where,
                          more);
    case Failure::Kind::kSilent:
      return absl::StrCat(
          who,
          rank.stopped ? " is stopped (SIGSTOP, or a debugger) "
                       : absl::StrCat(" gave no sign of life for ", Seconds(rank.silent_s), " "),
          where, more);
    case Failure::Kind::kStuck:
      return absl::StrCat(who, " is stuck ", where, ": no progress for ", Seconds(rank.still_s),
                          " while others wait for it", more);
    case Failure::Kind::kDeadlock:
      return absl::StrCat("ranks ", List(failure.ranks), " wait for each other for ",
                          Seconds(rank.still_s), ": ", who, " ", where);
    case Failure::Kind::kError:
      return absl::StrCat(who, " failed ", where, ": ", failure.detail);
    case Failure::Kind::kLauncherGone:
      return failure.detail;
  }
  return "";
}

std::string FailureTable(const Failure& failure, std::span<const WatchedRank> ranks) {
  size_t host_width = 4;
  for (const WatchedRank& rank : ranks) host_width = std::max(host_width, rank.host.size());
  const int width = static_cast<int>(host_width);
  std::string out =
      absl::StrFormat("  rank  %-*s  %-8s  %6s  doing\n", width, "host", "phase", "step");
  size_t lines = 0;
  for (size_t r = 0; r < ranks.size(); ++r) {
    const bool culprit =
        std::count(failure.ranks.begin(), failure.ranks.end(), static_cast<int>(r)) > 0;
    if (!culprit && lines >= kTableRanks) continue;
    ++lines;
    const WatchedRank& rank = ranks[r];
    const std::string step = rank.state.step < 0 ? std::string("-") : absl::StrCat(rank.state.step);
    absl::StrAppendFormat(&out, "  %4d  %-*s  %-8s  %6s  %s\n", r, width, rank.host,
                          Name(rank.state.phase), step, Doing(rank, PresenceOf(rank)));
  }
  if (lines < ranks.size()) absl::StrAppend(&out, "  ... and ", ranks.size() - lines, " more\n");
  const bool standstill =
      failure.kind == Failure::Kind::kStuck || failure.kind == Failure::Kind::kDeadlock;
  return out + Missing(ranks, standstill);
}

}  // namespace trireme
