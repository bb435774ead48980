// TCP connections between the ranks of a job, beside MPI: small messages that arrive while MPI is
// stuck, and an end of file the moment a process dies. Every rank is connected with the first
// kWatchers ranks, so that a job has thousands of connections, not millions. Used by the failure
// detector's thread alone once connected.
#pragma once

#include <poll.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace trireme {

class ControlPlane;

class RankLinks {
 public:
  static constexpr int kWatchers = 16;

  struct Options {
    int64_t silence_ms = 5000;  // bytes that nobody acknowledges for so long close a connection
    std::string card;           // what this rank wants all others to know of it
  };
  // Collective: all ranks learn each other's addresses through `control` and connect. On ports that
  // the system chooses and that are closed again before this returns, and only with ranks that know
  // the job's secret. Unavailable, the same on all ranks, when two ranks cannot connect.
  static absl::StatusOr<std::unique_ptr<RankLinks>> Connect(ControlPlane& control,
                                                            const Options& options);
  ~RankLinks();

  const std::vector<std::string>& cards() const { return cards_; }  // by rank
  // Whether the rank is on the same host and sees the same processes.
  bool same_host(int rank) const { return same_host_[rank]; }
  bool linked(int rank) const { return links_[rank].fd >= 0; }

  // Never waits: what does not fit into the system's buffer is kept and sent by Wait; when a peer
  // takes nothing for long, nothing more is kept for it.
  void Send(int rank, uint8_t type, std::string_view bytes);

  struct Event {
    int rank = 0;
    uint8_t type = 0;  // kClosed, or what the sender gave
    int error = 0;     // of a closed connection: errno, 0 for an end of file
    std::string bytes;
  };
  static constexpr uint8_t kClosed = 0;
  // Until something comes, one of `others` is ready, or the time is over. Events in order of
  // arrival per rank.
  std::vector<Event> Wait(int timeout_ms, std::span<pollfd> others);

 private:
  struct Link {
    int fd = -1;
    std::string in, out;
  };
  explicit RankLinks(int ranks);
  void Read(int rank, std::vector<Event>& events);
  void Flush(int rank);
  int Close(int rank);

  std::vector<std::string> cards_;
  std::vector<bool> same_host_;
  std::vector<Link> links_;  // by rank
};

}  // namespace trireme
