#include "models/json_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <optional>
#include <set>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace trireme {
namespace {

constexpr int kMaxDepth = 64;

// Watches a parse through nlohmann's callback and remembers the first thing it should not have
// accepted.
class StrictnessWatch {
 public:
  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= kMaxDepth && !problem_) {
        problem_ = absl::StrCat("is nested deeper than ", kMaxDepth, " levels");
      }
    }
    if (event == Event::object_start) keys_.emplace_back();
    if (event == Event::object_end) keys_.pop_back();
    if (event == Event::key) {
      const std::string& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second && !problem_) {
        problem_ = absl::StrCat("has the key ", Quoted(key), " twice in one object");
      }
    }
    return true;
  }
  const std::optional<std::string>& problem() const { return problem_; }

 private:
  std::vector<std::set<std::string>> keys_;
  std::optional<std::string> problem_;
};

}  // namespace

std::string TypeOf(const nlohmann::json& value) {
  if (value.is_null()) return "null";
  const bool vowel = value.is_object() || value.is_array();
  return std::string(vowel ? "an " : "a ") + value.type_name();
}

std::string Quoted(const std::string& text) {
  constexpr size_t kMost = 100;
  size_t shown = std::min(text.size(), kMost);
  const auto continues = [&](size_t i) { return (static_cast<unsigned char>(text[i]) >> 6) == 2; };
  for (int i = 0; i < 3 && shown < text.size() && continues(shown); ++i) --shown;
  std::string out = "\"";
  for (size_t i = 0; i < shown; ++i) {
    const unsigned char c = text[i];
    if (c < 0x20 || c == 0x7f) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\x%02x", c);
      out += escaped;
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += static_cast<char>(c);
    }
  }
  return out + (text.size() > shown ? "...\"" : "\"");
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes) {
  // Non-blocking, so that a FIFO of this name is refused below instead of waited for.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::ErrnoToStatus(errno, path);
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": is not a regular file"));
  }
  if (info.st_size > max_bytes) {
    close(fd);
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": has ", info.st_size, " bytes; at most ", max_bytes, " are expected"));
  }
  std::string text(info.st_size, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = read(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const absl::Status status = absl::ErrnoToStatus(errno, path);
      close(fd);
      return status;
    }
    if (n == 0) break;
    done += n;
  }
  close(fd);
  text.resize(done);
  return text;
}

absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& name) {
  StrictnessWatch watch;
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(text, std::ref(watch));
  } catch (const nlohmann::json::parse_error& error) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": is not valid JSON (at byte ", error.byte, " of ", text.size(), ")"));
  } catch (const nlohmann::json::exception&) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": is not valid JSON (a number is out of range)"));
  }
  if (watch.problem())
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", *watch.problem()));
  if (!value.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": is ", TypeOf(value), "; must be an object"));
  }
  return value;
}

}  // namespace trireme
