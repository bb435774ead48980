#include "launch/start_watch.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "parallel/process_watch.h"

namespace trireme {
namespace {

// At most 15 characters, as Linux has it.
constexpr char kStarting[] = "trireme-start", kWaiting[] = "trireme-mpi", kOver[] = "trireme-over";

// One rank of a host speaks, the others wait for it, or for mpirun to end them. A host where nobody
// is missing leaves the word to the others.
constexpr double kWordSeconds = 1.0, kOthersSeconds = 3.0;
// What is seen must still be so then: a rank that ends has lost its threads a moment before.
constexpr double kSecondLookSeconds = 0.2;

std::string Contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// The names of a folder's entries that are numbers.
std::vector<int> Numbers(const std::string& folder) {
  std::vector<int> out;
  DIR* const open = opendir(folder.c_str());
  if (open == nullptr) return out;
  while (const dirent* const entry = readdir(open)) {
    if (const int number = std::atoi(entry->d_name); number > 0) out.push_back(number);
  }
  closedir(open);
  return out;
}

// As mpirun or Slurm's PMIx has told the process.
int RankOf(int pid) {
  const std::string environment = Contents(absl::StrCat("/proc/", pid, "/environ"));
  for (const absl::string_view name : {"OMPI_COMM_WORLD_RANK=", "PMIX_RANK="}) {
    for (const absl::string_view variable : absl::StrSplit(environment, '\0')) {
      if (absl::StartsWith(variable, name))
        return std::atoi(std::string(variable.substr(name.size())).c_str());
    }
  }
  return -1;
}

bool HasThread(int pid, const std::string& name) {
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  const std::vector<int> threads = Numbers(tasks);
  return std::any_of(threads.begin(), threads.end(), [&](int thread) {
    return Contents(absl::StrCat(tasks, "/", thread, "/comm")) == name + "\n";
  });
}

// The children of this process's parent that have a rank, by rank.
std::vector<StartingRank> RanksOfThisHost() {
  std::vector<StartingRank> out;
  const std::string parent = absl::StrCat("\nPPid:\t", getppid(), "\n");
  for (const int pid : Numbers("/proc")) {
    if (!absl::StrContains(Contents(absl::StrCat("/proc/", pid, "/status")), parent)) continue;
    const int rank = RankOf(pid);
    if (rank < 0) continue;
    const bool ended =
        absl::StrContains(Contents(absl::StrCat("/proc/", pid, "/status")), "\nState:\tZ");
    out.push_back({rank, pid, HasThread(pid, kWaiting), ProcessHandle(pid).IsStopped(),
                   ended || HasThread(pid, kOver)});
  }
  std::sort(out.begin(), out.end(),
            [](const StartingRank& a, const StartingRank& b) { return a.rank < b.rank; });
  return out;
}

std::string HostName() {
  char name[256] = "?";
  gethostname(name, sizeof(name) - 1);
  return name;
}

}  // namespace

StartVerdict JudgeStart(const std::vector<StartingRank>& here, int ranks, double timeout_s,
                        const std::string& host) {
  StartVerdict verdict;
  std::vector<std::string> missing;
  std::vector<int> present;
  for (size_t i = 0; i < here.size(); ++i) {
    const StartingRank& one = here[i];
    if (one.waits && !one.stopped) {
      present.push_back(one.rank);
      continue;
    }
    verdict.missing.push_back(static_cast<int>(i));
    missing.push_back(absl::StrCat(
        "rank ", one.rank, " (", host, ", pid ", one.pid, ") ",
        one.stopped ? "is stopped (SIGSTOP, or a debugger) in init" : "has not come to MPI_Init"));
  }
  const std::string waited = absl::StrFormat("%g s (--start-timeout)", timeout_s);
  if (!missing.empty()) {
    verdict.line = absl::StrCat(absl::StrJoin(missing, "; "), ": others wait for ", waited);
  } else if (ranks > 0 && static_cast<int>(here.size()) >= ranks) {
    verdict.line = absl::StrCat("all ranks are in MPI_Init, which does not connect them in ",
                                waited, "; trireme doctor may tell why");
  } else {
    verdict.line = absl::StrCat(
        "ranks ", absl::StrJoin(present, ", "), " (", host, ") wait in MPI_Init for ", waited,
        ": ranks of other hosts have not come, or cannot be reached; trireme doctor may tell why");
  }
  return verdict;
}

StartWatch::StartWatch(const StartWatchOptions& options) : options_(options) {
  sigset_t all, before;  // signals are for the program's own threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { Run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), kStarting);
}

StartWatch::~StartWatch() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    found_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void StartWatch::EnterMpi() {
  pthread_setname_np(thread_.native_handle(), kWaiting);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    entered_ = true;
  }
  wake_.notify_all();
}

// False when it is over meanwhile.
bool StartWatch::SleepFor(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !wake_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return found_; });
}

// Looks at no variable: MPI sets some meanwhile.
void StartWatch::Run() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return entered_ || found_; });
  }
  if (SleepFor(options_.timeout_s)) End();
}

void StartWatch::End() {
  const std::string host = HostName();
  std::vector<StartingRank> here = RanksOfThisHost();
  const size_t count = here.size();
  SleepFor(kSecondLookSeconds);
  here = RanksOfThisHost();
  const bool over =
      here.size() != count ||
      std::any_of(here.begin(), here.end(), [](const StartingRank& one) { return one.over; });
  const StartVerdict verdict = JudgeStart(here, options_.ranks, options_.timeout_s, host);
  const auto first = std::find_if(
      here.begin(), here.end(), [](const StartingRank& one) { return one.waits && !one.stopped; });
  const bool speaks = !over && (first == here.end() || first->rank == options_.rank);
  if (speaks && verdict.missing.empty()) SleepFor(kWordSeconds);
  if (speaks && (!verdict.missing.empty() || options_.rank == 0 || first == here.end())) {
    pthread_setname_np(pthread_self(), kOver);
    std::fprintf(stderr, "trireme: %s\n", verdict.line.c_str());
    // What stands still does not end when it is asked to.
    for (const int i : verdict.missing) kill(here[i].pid, SIGKILL);
  }
  // The others come to look at about the same time; mpirun, which has lost a rank, ends all.
  SleepFor(kOthersSeconds);
  _exit(1);
}

}  // namespace trireme
