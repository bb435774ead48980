#include "launch/journal.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/step.h"
#include "runtime/wire.h"

namespace trireme {
namespace {

std::string PackTokens(std::vector<SampledToken> tokens) {
  std::string bytes;
  Serialize(StepResult{.step = 0, .sampled = std::move(tokens)}, &bytes);
  return bytes;
}
std::vector<SampledToken> UnpackTokens(const std::string& bytes) {
  StepResult result;
  Parse(bytes, &result);
  return std::move(result.sampled);
}

}  // namespace

std::string Serialize(const JournalEntry& entry) {
  ByteWriter out;
  out.Put(entry.kind);
  out.Put(entry.id);
  out.Put(entry.sample);
  out.PutString(PackTokens({entry.sampled}));
  out.Put(entry.finish);
  out.Put(entry.seconds);
  out.PutString(entry.text);
  out.PutString(entry.error);
  out.Put(entry.times);
  out.PutString(entry.out);
  return out.Take();
}

JournalEntry ParseEntry(const std::string& bytes) {
  ByteReader in(bytes);
  JournalEntry entry;
  entry.kind = in.Get<JournalEntry::Kind>();
  entry.id = in.Get<uint64_t>();
  entry.sample = in.Get<int32_t>();
  entry.sampled = UnpackTokens(in.GetString()).at(0);
  entry.finish = in.Get<FinishReason>();
  entry.seconds = in.Get<double>();
  entry.text = in.GetString();
  entry.error = in.GetString();
  entry.times = in.Get<RequestTimes>();
  entry.out = in.GetString();
  return entry;
}

void JobHistory::Add(const JournalEntry& entry) {
  output = output || !entry.out.empty();
  switch (entry.kind) {
    case JournalEntry::Kind::kStarted:
      requests = entry.text;
      total = entry.id;
      return;
    case JournalEntry::Kind::kToken: {
      RequestHistory& request = by_id[entry.id];
      if (request.tokens.empty()) request.first_token_seconds = entry.seconds;
      if (entry.sampled.token >= 0) request.tokens.push_back(entry.sampled);  // else only an end
      request.text += entry.text;
      request.finished = entry.finish != FinishReason::kNone;
      request.error = entry.error;
      return;
    }
    case JournalEntry::Kind::kOutput:
    case JournalEntry::Kind::kVerdict:
      return;
  }
}

uint64_t JobHistory::finished() const {
  return static_cast<uint64_t>(std::count_if(
      by_id.begin(), by_id.end(), [](const auto& entry) { return entry.second.finished; }));
}

std::string Serialize(const JobHistory& history) {
  ByteWriter out;
  out.PutString(history.requests);
  out.Put(history.total);
  out.Put(history.output);
  out.Put(history.seconds);
  out.Put(static_cast<uint64_t>(history.by_id.size()));
  for (const auto& [id, request] : history.by_id) {
    out.Put(id);
    out.PutString(PackTokens(request.tokens));
    out.PutString(request.text);
    out.Put(request.first_token_seconds);
    out.Put(request.finished);
    out.PutString(request.error);
  }
  return out.Take();
}

JobHistory ParseHistory(const std::string& bytes) {
  ByteReader in(bytes);
  JobHistory history;
  history.requests = in.GetString();
  history.total = in.Get<uint64_t>();
  history.output = in.Get<bool>();
  history.seconds = in.Get<double>();
  const uint64_t count = in.Get<uint64_t>();
  for (uint64_t i = 0; i < count; ++i) {
    RequestHistory& request = history.by_id[in.Get<uint64_t>()];
    request.tokens = UnpackTokens(in.GetString());
    request.text = in.GetString();
    request.first_token_seconds = in.Get<double>();
    request.finished = in.Get<bool>();
    request.error = in.GetString();
  }
  return history;
}

absl::StatusOr<std::unique_ptr<JournalWriter>> JournalWriter::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) {
    return absl::UnavailableError(absl::StrCat("--journal ", path, ": ", std::strerror(errno),
                                               "; --ranks sets this flag, people do not"));
  }
  return std::unique_ptr<JournalWriter>(new JournalWriter(fd));
}

JournalWriter::~JournalWriter() { close(fd_); }

absl::Status JournalWriter::Append(const JournalEntry& entry) {
  const std::string bytes = Serialize(entry);
  const uint64_t size = bytes.size();
  std::string frame(reinterpret_cast<const char*>(&size), sizeof(size));
  frame += bytes;
  for (size_t done = 0; done < frame.size();) {
    const ssize_t n = write(fd_, frame.data() + done, frame.size() - done);
    if (n < 0 && errno != EINTR)
      return absl::UnavailableError(absl::StrCat("the supervisor is gone: ", std::strerror(errno)));
    if (n > 0) done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

std::vector<JournalEntry> JournalReader::Take(const char* bytes, size_t count) {
  open_.append(bytes, count);
  std::vector<JournalEntry> entries;
  size_t at = 0;
  uint64_t size = 0;
  while (open_.size() - at >= sizeof(size)) {
    std::memcpy(&size, open_.data() + at, sizeof(size));
    if (open_.size() - at - sizeof(size) < size) break;
    entries.push_back(ParseEntry(open_.substr(at + sizeof(size), size)));
    at += sizeof(size) + size;
  }
  open_.erase(0, at);
  return entries;
}

}  // namespace trireme
