#include "launch/single_node.h"

#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
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

std::string ValueOf(const Setting& setting) {
  const std::string value = setting.value;
  return value == "$TMPDIR" ? Variable("TMPDIR", "/tmp") : value;
}

}  // namespace

void SetSingleNodeEnvironment() {
  for (const Setting& setting : kSettings) {
    if (Variable(setting.name, "").empty() && Applies(setting.when))
      setenv(setting.name, ValueOf(setting).c_str(), 1);
  }
}

bool IsSingleNodeSetting(const std::string& name, const std::string& value) {
  return std::any_of(std::begin(kSettings), std::end(kSettings), [&](const Setting& setting) {
    return setting.name == name && ValueOf(setting) == value;
  });
}

}  // namespace trireme
