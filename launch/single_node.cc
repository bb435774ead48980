#include "launch/single_node.h"

#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"

namespace trireme {
namespace {

struct Setting {
  const char *name, *value, *when;
};
constexpr Setting kSettings[] = {
#include "launch/single_node.inc"
};

constexpr uint64_t kSmallShmBytes = 48 << 20;

std::string Variable(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}

bool OnPath(const char* program) {
  for (const auto folder : absl::StrSplit(Variable("PATH", "/usr/local/bin:/usr/bin:/bin"), ':')) {
    if (access(absl::StrCat(folder, "/", program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

bool HasSeccompFilter() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (absl::StartsWith(line, "Seccomp:") && line.back() == '2') return true;
  }
  return false;
}

bool SharedMemoryIsSmall() {
  struct statvfs shm;
  return access("/dev/shm", W_OK) != 0 || statvfs("/dev/shm", &shm) != 0 ||
         uint64_t{shm.f_bavail} * shm.f_frsize < kSmallShmBytes;
}

bool Applies(const std::string& when) {
  if (when.empty()) return true;
  if (when == "no-remote-shell") return !OnPath("ssh") && !OnPath("rsh");
  if (when == "seccomp") return HasSeccompFilter();
  CHECK(when == "small-shm") << "launch/single_node.env: " << when;
  return SharedMemoryIsSmall();
}

}  // namespace

void SetSingleNodeEnvironment() {
  for (const Setting& setting : kSettings) {
    if (!Variable(setting.name, "").empty() || !Applies(setting.when)) continue;
    const std::string value = setting.value;
    setenv(setting.name, (value == "$TMPDIR" ? Variable("TMPDIR", "/tmp") : value).c_str(), 1);
  }
}

}  // namespace trireme
