#include "launch/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "launch/doctor_checks.h"
#include "launch/environment.h"
#include "launch/job_folder.h"
#include "launch/journal.h"
#include "launch/mpi_trial.h"
#include "launch/single_node.h"
#include "nlohmann/json.hpp"
#include "parallel/process_watch.h"

namespace trireme {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kInterruptedStatus = 130;
constexpr int kNoMpirun = 127;  // it could not be started
// mpirun asks its ranks to end, waits, and kills them: about two seconds.
constexpr std::chrono::seconds kMpirunLeaves(10);
// mpirun starts ranks in a second; nobody who waits for more has anything else to wait for.
constexpr std::chrono::seconds kMpirunStarts(60);
// After rank 0's last word: the end of MPI, of all ranks and of mpirun, on a busy machine.
constexpr std::chrono::seconds kJobLeaves(30);
// For ranks whose mpirun was killed to notice that and end.
constexpr std::chrono::seconds kRanksLeave(15);

std::atomic<pid_t> g_child{0};
std::atomic<int> g_signal{0};

extern "C" void OnSignal(int signal) {
  g_signal.store(signal);
  if (const pid_t child = g_child.load(); child > 0) kill(child, SIGTERM);
}

constexpr char kSupervised[] = "TRIREME_SUPERVISED";

// Where mpirun would take it for the beginning of another program. What such a word can be: a
// value, which may be part of its flag's word, or the name of a folder.
void HideColon(std::vector<std::string>* words) {
  for (size_t i = 1; i < words->size(); ++i) {
    if ((*words)[i] != ":") continue;
    std::string& flag = (*words)[i - 1];
    if (!absl::StartsWith(flag, "--") || absl::StrContains(flag, "=")) {
      (*words)[i] = "./:";
    } else {
      flag += "=:";
      words->erase(words->begin() + static_cast<ptrdiff_t>(i--));
    }
  }
}

// Does not come back when mpirun starts.
void BecomeMpirun(const SupervisorOptions& options, const std::vector<std::string>& more) {
  char self[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
  std::vector<std::string> words = {"mpirun", "-n", std::to_string(options.ranks),
                                    std::string(self, length > 0 ? length : 0)};
  words.insert(words.end(), options.arguments.begin(), options.arguments.end());
  words.insert(words.end(), more.begin(), more.end());
  HideColon(&words);
  setenv(kSupervised, "1", 1);
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  execvp("mpirun", argv.data());
  std::fprintf(stderr,
               "trireme: --ranks: mpirun cannot be started: %s; install it (Debian package "
               "openmpi-bin) or put it on PATH\n",
               std::strerror(errno));
}

bool WriteStandardOutput(const std::string& text) {
  return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() &&
         std::fflush(stdout) == 0;
}

// Returns when this process has no child left.
void WaitForAll(Clock::duration patience) {
  const auto until = Clock::now() + patience;
  bool killed = false;
  while (true) {
    const pid_t pid = waitpid(-1, nullptr, WNOHANG);
    if (pid < 0 && errno == ECHILD) return;
    if (pid > 0) continue;
    if (!killed && Clock::now() >= until) {
      // Ranks whose mpirun was killed come to their next ancestor: this process.
      for (const pid_t child : LivingChildren(getpid())) kill(child, SIGKILL);
      killed = true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// Tells when an mpirun whose ranks are gone does not go: it was stopped, or has crashed in a way
// that its own handler does not come out of. Nobody but the supervisor is left to end it.
class LeftoverWatch {
 public:
  explicit LeftoverWatch(pid_t mpirun) : mpirun_(mpirun) {}
  // They may come and go between two looks.
  void HeardOfRanks() { had_ranks_ = true; }
  // Asked again and again; looks only now and then.
  bool HasLastedTooLong() {
    const auto now = Clock::now();
    if (now < look_at_) return false;
    look_at_ = now + std::chrono::milliseconds(500);
    if (!LivingChildren(mpirun_).empty()) {
      had_ranks_ = true;
      since_ = now;
    }
    return now - since_ > (had_ranks_ ? kMpirunLeaves : kMpirunStarts);
  }

 private:
  const pid_t mpirun_;
  bool had_ranks_ = false;
  Clock::time_point since_ = Clock::now(), look_at_;
};

// Ranks that somebody supervises say nothing of it.
int Interrupted() {
  std::fputs("\ntrireme: interrupted\n", stderr);
  return kInterruptedStatus;
}

class Supervisor {
 public:
  explicit Supervisor(const SupervisorOptions& options) : options_(options) {}

  int Run() {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGPIPE, SIG_IGN);
    for (int attempt = 0;; ++attempt) {
      const std::optional<int> status = RunOnce();
      WaitForAll(kRanksLeave);
      folder_.Empty();
      if (g_signal.load() != 0) return Interrupted();
      if (!output_ok_) {
        std::fprintf(stderr, "trireme: standard output cannot be written: %s\n",
                     std::strerror(output_error_));
        return 1;
      }
      if (status) return *status;
      if (attempt >= options_.max_restarts) return GiveUp();
      std::fprintf(stderr, "trireme: starting again (%d of %d): %s\n", attempt + 1,
                   options_.max_restarts, Progress().c_str());
    }
  }

 private:
  // The exit status of a job that came to an end of its own; nothing when it failed and may start
  // again.
  std::optional<int> RunOnce() { return options_.max_restarts > 0 ? WithJournal() : Plainly(); }

  // What the ranks print comes by mpirun, which says nothing when it cannot write it: so it writes
  // to this process.
  int Plainly() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return Fault("--ranks: no pipe");
    std::optional<int> none;
    const int status = StartAndFollow({}, {.from = ends[0], .mpirun_writes_to = ends[1]}, &none);
    close(ends[0]);
    if (status < 0) return Fault("--ranks: no process");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  std::optional<int> WithJournal() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return Fault("--max-restarts: no pipe");
    const int history = WriteHistory();
    if (history < 0) return Fault("--max-restarts: no memory for the journal");
    const std::string own = absl::StrCat("/proc/", getpid(), "/fd/");
    std::optional<int> verdict;
    const int status = StartAndFollow(
        {"--journal", absl::StrCat(own, ends[0]), "--history", absl::StrCat(own, history)},
        {.from = ends[0]}, &verdict);
    if (status < 0) verdict = Fault("--max-restarts: no process");
    // The writing end was kept so that the pipe has one before rank 0 has opened it.
    close(ends[0]);
    close(ends[1]);
    close(history);
    if (status >= 0 && WIFEXITED(status) && WEXITSTATUS(status) == kNoMpirun) verdict = 1;
    return verdict;
  }

  // Where what the ranks produce is read: the journal, or mpirun's standard output.
  struct Pipe {
    int from;
    int mpirun_writes_to = -1;  // -1: it is the journal; closed by StartAndFollow
  };

  // mpirun's status as of waitpid; below 0: there is no process for it.
  int StartAndFollow(const std::vector<std::string>& more, Pipe pipe, std::optional<int>* verdict) {
    const pid_t parent = getpid(), child = fork();
    if (child == 0) {
      // Should this process be killed, mpirun is asked to end, and the ranks with it.
      prctl(PR_SET_PDEATHSIG, SIGTERM);
      if (getppid() != parent) _exit(1);
      // Ctrl-C comes to this process, which passes it on once.
      setpgid(0, 0);
      signal(SIGPIPE, SIG_DFL);
      if (pipe.mpirun_writes_to >= 0) dup2(pipe.mpirun_writes_to, STDOUT_FILENO);
      BecomeMpirun(options_, more);
      _exit(kNoMpirun);
    }
    if (pipe.mpirun_writes_to >= 0) close(pipe.mpirun_writes_to);
    if (child < 0) return child;
    g_child.store(child);
    if (g_signal.load() != 0) kill(child, SIGTERM);
    const int status = Follow(child, pipe, verdict);
    g_child.store(0);
    if (WIFSIGNALED(status))
      std::fprintf(stderr, "trireme: mpirun was ended by signal %d\n", WTERMSIG(status));
    return status;
  }

  static int Fault(const char* what) {
    std::fprintf(stderr, "trireme: %s: %s\n", what, std::strerror(errno));
    return 1;
  }

  // In memory that has no name and goes with this process.
  int WriteHistory() {
    if (submitted_)
      history_.seconds = std::chrono::duration<double>(Clock::now() - *submitted_).count();
    const std::string bytes = Serialize(history_);
    const int fd = memfd_create("trireme-history", MFD_CLOEXEC);
    if (fd < 0) return -1;
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t n = write(fd, bytes.data() + done, bytes.size() - done);
      if (n <= 0) {
        close(fd);
        return -1;
      }
      done += static_cast<size_t>(n);
    }
    return fd;
  }

  // Until mpirun has ended and the pipe is empty. Its status as of waitpid.
  int Follow(pid_t child, Pipe pipe, std::optional<int>* verdict) {
    fcntl(pipe.from, F_SETFL, O_NONBLOCK);
    JournalReader reader;
    LeftoverWatch leftover(child);
    const ProcessHandle mpirun(child);
    std::optional<Clock::time_point> kill_at, verdict_at;
    int status = 0;
    for (bool ended = false;;) {
      // Nothing that is written after mpirun's end counts as lost: ranks have ended before, or are
      // orphans that end now.
      if (!ended) ended = waitpid(child, &status, WNOHANG) == child;
      const bool read_something = Read(pipe, reader, verdict);
      if (ended && !read_something) return status;
      if (read_something) {
        leftover.HeardOfRanks();
        continue;
      }
      if ((g_signal.load() != 0 || !output_ok_) && !kill_at) {
        kill(child, SIGTERM);
        kill_at = Clock::now() + kMpirunLeaves;
      }
      if ((kill_at && Clock::now() > *kill_at) || (!ended && leftover.HasLastedTooLong()))
        kill(child, SIGKILL);
      if (!ended && verdict->has_value()) {
        // The ranks are at the end of MPI, where they need mpirun. Whoever has stopped it meant a
        // job that runs.
        if (!verdict_at) verdict_at = Clock::now();
        if (mpirun.IsStopped()) kill(child, SIGCONT);
        if (Clock::now() > *verdict_at + kJobLeaves) kill(child, SIGKILL);
      }
      pollfd wait{pipe.from, POLLIN, 0};
      poll(&wait, 1, /*timeout_ms=*/20);  // then the end of mpirun is looked for
    }
  }

  bool Read(Pipe pipe, JournalReader& reader, std::optional<int>* verdict) {
    char piece[65536];
    const ssize_t n = read(pipe.from, piece, sizeof(piece));
    if (n <= 0) return false;
    if (pipe.mpirun_writes_to >= 0) {
      Print({piece, static_cast<size_t>(n)});
      return true;
    }
    for (const JournalEntry& entry : reader.Take(piece, static_cast<size_t>(n))) {
      if (entry.kind == JournalEntry::Kind::kStarted && !submitted_) submitted_ = Clock::now();
      if (entry.kind == JournalEntry::Kind::kVerdict) *verdict = static_cast<int>(entry.id);
      history_.Add(entry);
      if (!entry.out.empty()) Print(entry.out);
    }
    return true;
  }

  void Print(const std::string& text) {
    if (!output_ok_ || WriteStandardOutput(text)) return;
    output_ok_ = false;
    output_error_ = errno;
  }

  std::string Progress() const {
    if (history_.total == 0) return "no request was taken yet";
    uint64_t open = 0, tokens = 0;
    for (const auto& [id, request] : history_.by_id) {
      if (request.finished || request.tokens.empty()) continue;
      ++open;
      tokens += request.tokens.size();
    }
    return absl::StrCat(history_.finished(), " of ", history_.total, " requests are finished, ",
                        open, " go on after ", tokens, " tokens");
  }

  int GiveUp() {
    const uint64_t lost = history_.total - history_.finished();
    std::fprintf(stderr,
                 "trireme: given up after %d restarts: %llu of %llu requests did not finish\n",
                 options_.max_restarts, static_cast<unsigned long long>(lost),
                 static_cast<unsigned long long>(history_.total));
    for (uint64_t id = 0; options_.json && id < history_.total; ++id) {
      const RequestHistory& request = history_.by_id[id];
      if (request.finished) continue;
      const nlohmann::ordered_json line{{"index", id},
                                        {"text", request.text},
                                        {"finish_reason", "error"},
                                        {"error", "a rank failed, too often to start again"}};
      WriteStandardOutput(line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) +
                          "\n");
    }
    return 1;
  }

  const SupervisorOptions& options_;
  const JobFolder folder_;
  JobHistory history_;
  std::optional<Clock::time_point> submitted_;
  bool output_ok_ = true;
  int output_error_ = 0;
};

// --ranks means this machine, whatever Slurm has given or a container has inherited.
void ForgetSlurm() {
  std::vector<std::string> names;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string variable = *entry;
    if (absl::StartsWith(variable, "SLURM_"))
      names.push_back(variable.substr(0, variable.find('=')));
  }
  for (const std::string& name : names) unsetenv(name.c_str());
}

}  // namespace

bool StartedBySupervisor() { return std::getenv(kSupervised) != nullptr; }

int RunSupervised(const SupervisorOptions& options) {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  SetSingleNodeEnvironment();
  ForgetSlurm();
  Environment environment = CollectEnvironment({.programs = true, .root = {}});
  TryMpiVariables(&environment, /*mpirun=*/true);
  Findings findings = CheckLaunch(environment);
  for (Finding& finding : CheckMpirun(environment, {.tp = options.ranks}))
    findings.push_back(std::move(finding));
  const JobPlan plan{.tp = options.ranks, .cuda = options.cuda, .ahead = true};
  for (Finding& finding : CheckHost(environment, plan, 1, 1, /*look_for_nccl=*/false))
    findings.push_back(std::move(finding));
  if (g_signal.load() != 0) return Interrupted();
  for (const Finding& finding : findings) {
    if (finding.severity == Severity::kError)
      std::fprintf(stderr, "trireme: %s\n", finding.Line().c_str());
  }
  if (HasError(findings)) return 1;
  return Supervisor(options).Run();
}

}  // namespace trireme
