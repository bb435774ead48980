// What a supervised job tells its supervisor while it runs, so that the job can be started again
// where it was: every token as it is produced, and every byte of output. Rank 0 writes entries into
// a pipe; the supervisor reads them, prints the output, and gives the history of a failed attempt
// to the next one. An entry is whole or it is not there: what the user has seen and what the
// history says are the same.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/metrics.h"
#include "runtime/request.h"

namespace trireme {

struct JournalEntry {
  enum class Kind : uint8_t {
    kStarted,  // `text`: the requests, serialized; `id`: how many
    kToken,    // of request `id`, whatever replica computed it
    kOutput,   // nothing but `out`
    kVerdict   // rank 0 ends the job in order; `id` is the exit status
  };
  Kind kind = Kind::kOutput;
  uint64_t id = 0;
  int32_t sample = 0;  // of the request; 0 in a journal
  SampledToken sampled{};
  FinishReason finish = FinishReason::kNone;
  double seconds = 0.0;  // since the requests were submitted, in the first attempt
  std::string text{};    // that became final with the token
  std::string error{};   // why, where `finish` is kError
  RequestTimes times{};  // with the last token
  std::string out{};     // for standard output
};
// As it also travels from a replica's leader to rank 0.
std::string Serialize(const JournalEntry& entry);
JournalEntry ParseEntry(const std::string& bytes);

// What is known of one request after some attempts.
struct RequestHistory {
  std::vector<SampledToken> tokens;
  std::string text;
  double first_token_seconds = 0.0;
  bool finished = false;
  std::string error;  // why it failed, when it did
};

struct JobHistory {
  std::string requests;  // as of kStarted; empty: nothing has been submitted yet
  uint64_t total = 0;
  bool output = false;   // something was printed
  double seconds = 0.0;  // since the requests were submitted first
  std::map<uint64_t, RequestHistory> by_id;

  void Add(const JournalEntry& entry);
  uint64_t finished() const;
};
std::string Serialize(const JobHistory& history);
JobHistory ParseHistory(const std::string& bytes);

// Rank 0's end. One thread.
class JournalWriter {
 public:
  // `path` is the pipe, as /proc/PID/fd/N of the supervisor.
  static absl::StatusOr<std::unique_ptr<JournalWriter>> Open(const std::string& path);
  ~JournalWriter();
  // Waits while the supervisor's reader does not read. Unavailable when the supervisor is gone.
  absl::Status Append(const JournalEntry& entry);

 private:
  explicit JournalWriter(int fd) : fd_(fd) {}
  int fd_;
};

// The supervisor's end: bytes in, entries out. What an attempt has left half written is dropped
// with the reader.
class JournalReader {
 public:
  std::vector<JournalEntry> Take(const char* bytes, size_t count);

 private:
  std::string open_;
};

}  // namespace trireme
