#include "parallel/process_watch.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "parallel/flight_recorder.h"

namespace trireme {
namespace {

// A thread that uses less than this share of the time only wakes up to look at something.
constexpr int64_t kBusyShare = 250;  // 1 / 250

struct ProcStat {
  char state = '?';  // R running, S sleeping, D waiting for the disk, T stopped, Z ended
  uint64_t major_faults = 0;
};

// A line of proc(5)'s stat: "PID (NAME) STATE ...", the name may hold anything.
ProcStat ReadStat(const std::string& path) {
  ProcStat out;
  char text[1024];
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return out;
  const ssize_t bytes = read(fd, text, sizeof(text) - 1);
  close(fd);
  if (bytes <= 0) return out;
  const std::string line(text, static_cast<size_t>(bytes));
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return out;
  std::istringstream fields(line.substr(name_end + 1));
  std::string skipped;
  fields >> out.state;
  for (int field = 4; field < 12; ++field) fields >> skipped;
  fields >> out.major_faults;
  return out;
}

}  // namespace

bool ThreadProbe::Busy(int tid) {
  const bool another = tid != tid_;
  tid_ = tid;
  const int64_t now = MonotonicNs();
  // The processor time of a thread by its number, which the C library gives for a pthread_t only;
  // see clock_getcpuclockid(3) and the kernel's posix-timers.h.
  const auto clock = static_cast<clockid_t>(~static_cast<unsigned>(tid) << 3 | 6);
  timespec used{};
  if (clock_gettime(clock, &used) != 0) return true;
  const int64_t cpu_ns = int64_t{used.tv_sec} * 1'000'000'000 + used.tv_nsec;
  const bool worked = (cpu_ns - cpu_ns_) * kBusyShare >= now - asked_ns_;
  cpu_ns_ = cpu_ns;
  asked_ns_ = now;
  if (another || worked) return true;
  const ProcStat stat = ReadStat(absl::StrCat("/proc/self/task/", tid, "/stat"));
  const bool fetched = stat.major_faults != page_faults_;
  page_faults_ = stat.major_faults;
  return fetched || stat.state == 'R' || stat.state == 'D';
}

ProcessHandle::ProcessHandle(pid_t pid)
    : pid_(pid), fd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {}

ProcessHandle::~ProcessHandle() {
  if (fd_ >= 0) close(fd_);
}

void ProcessHandle::Kill() const {
  if (fd_ >= 0) {
    syscall(SYS_pidfd_send_signal, fd_, SIGKILL, nullptr, 0);
  } else {
    kill(pid_, SIGKILL);
  }
}

bool ProcessHandle::IsStopped() const {
  const char state = ReadStat(absl::StrCat("/proc/", pid_, "/stat")).state;
  return state == 'T' || state == 't';
}

std::string ProcessHandle::Name() const {
  std::ifstream in(absl::StrCat("/proc/", pid_, "/comm"));
  std::string name;
  std::getline(in, name);
  return name;
}

std::vector<pid_t> LivingChildren(pid_t pid) {
  std::vector<pid_t> children;
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  DIR* const open = opendir(tasks.c_str());
  if (open == nullptr) return children;
  while (const dirent* const task = readdir(open)) {
    if (task->d_name[0] == '.') continue;
    std::ifstream in(absl::StrCat(tasks, "/", task->d_name, "/children"));
    for (pid_t child; in >> child;) {
      // A parent that is stopped leaves them as Z.
      const char state = ReadStat(absl::StrCat("/proc/", child, "/stat")).state;
      if (state != 'Z' && state != '?') children.push_back(child);
    }
  }
  closedir(open);
  return children;
}

void KillUnlessItEnds(pid_t pid, int timeout_ms) {
  std::vector<std::unique_ptr<ProcessHandle>> doomed;
  doomed.push_back(std::make_unique<ProcessHandle>(pid));
  for (const pid_t child : LivingChildren(pid)) {
    if (child != getpid()) doomed.push_back(std::make_unique<ProcessHandle>(child));
  }
  if (doomed[0]->fd() < 0 || fork() != 0) return;
  // Only what is safe in a signal handler from here on: other threads of this process are no more.
  setsid();
  constexpr int kMoreThanAnyRankHas = 1 << 16;
  for (int fd = 0; fd < kMoreThanAnyRankHas; ++fd) {
    const bool needed = std::any_of(doomed.begin(), doomed.end(),
                                    [fd](const auto& process) { return process->fd() == fd; });
    if (!needed) close(fd);
  }
  pollfd ended{doomed[0]->fd(), POLLIN, 0};
  if (poll(&ended, 1, timeout_ms) == 0) {
    for (const auto& process : doomed) process->Kill();
  }
  _exit(0);
}

namespace {

// "vader_segment.HOST.USER.JOB.RANK" of a rank: "osc_sm.HOST.JOB." begins the names of the job's
// windows. Empty for other names.
std::string WindowsOfJob(absl::string_view segment) {
  std::vector<absl::string_view> parts = absl::StrSplit(segment, '.');
  if (parts.size() < 5) return "";
  const absl::string_view job = parts[parts.size() - 2];
  const auto host = absl::StrJoin(parts.begin() + 1, parts.end() - 3, ".");
  return absl::StrCat("osc_sm.", host, ".", job, ".");
}

using Families = std::set<std::pair<std::string, std::string>>;  // folder, how the names begin

// Of the ranks of the jobs that this process has a segment of.
Families MappedFamilies() {
  std::ifstream maps("/proc/self/maps");
  Families families;
  for (std::string line; std::getline(maps, line);) {
    const size_t at = line.find('/');
    if (at == std::string::npos) continue;
    const std::string path = line.substr(at, line.find(" (deleted)") - at);
    const size_t slash = path.rfind('/'), dot = path.rfind('.');
    const std::string name = path.substr(slash + 1), folder = path.substr(0, slash);
    const bool segment =
        absl::StartsWith(name, "vader_segment.") || absl::StartsWith(name, "sm_segment.");
    if (!segment || dot <= slash) continue;
    families.emplace(folder, path.substr(slash + 1, dot - slash));
    // A window's creator may die before anybody else has mapped it.
    const std::string windows = WindowsOfJob(name);
    if (windows.empty()) continue;
    families.emplace(folder, windows);
    families.emplace("/dev/shm", windows);
  }
  return families;
}

}  // namespace

void RemoveSharedSegments() {
  for (const auto& [folder, prefix] : MappedFamilies()) {
    DIR* const open = opendir(folder.c_str());
    if (open == nullptr) continue;
    while (const dirent* const entry = readdir(open)) {
      const std::string path = absl::StrCat(folder, "/", entry->d_name);
      struct stat info;
      if (absl::StartsWith(entry->d_name, prefix) && lstat(path.c_str(), &info) == 0 &&
          S_ISREG(info.st_mode) && info.st_uid == geteuid())
        unlink(path.c_str());
    }
    closedir(open);
    // A supervisor's, which may be gone; not empty while another rank has something in it.
    if (absl::StrContains(folder, "/trireme-")) rmdir(folder.c_str());
  }
}

}  // namespace trireme
