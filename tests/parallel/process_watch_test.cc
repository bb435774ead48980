#include "parallel/process_watch.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

namespace trireme {
namespace {

void Sleep(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

TEST(ThreadProbe, TellsWorkFromSleep) {
  std::atomic<int> tid{0};
  std::atomic<bool> work{true}, stop{false};
  std::thread thread([&] {
    tid.store(gettid());
    while (work.load()) {
    }
    while (!stop.load()) Sleep(500);
  });
  while (tid.load() == 0) Sleep(1);
  ThreadProbe probe;
  EXPECT_TRUE(probe.Busy(tid.load())) << "nothing is known of it yet";
  Sleep(100);
  EXPECT_TRUE(probe.Busy(tid.load()));
  work.store(false);
  // On a busy machine it may take a while until it has come to its rest.
  bool busy = true;
  for (int i = 0; i < 50 && busy; ++i) {
    Sleep(100);
    busy = probe.Busy(tid.load());
  }
  EXPECT_FALSE(busy);
  stop.store(true);
  thread.join();
}

TEST(ProcessHandle, SeesStopAndEnd) {
  const pid_t child = fork();
  if (child == 0) {
    while (true) pause();
  }
  const ProcessHandle handle(child);
  EXPECT_EQ(handle.pid(), child);
  EXPECT_FALSE(handle.Name().empty());
  EXPECT_FALSE(handle.IsStopped());
  kill(child, SIGSTOP);
  for (int i = 0; i < 500 && !handle.IsStopped(); ++i) Sleep(10);
  EXPECT_TRUE(handle.IsStopped());
  handle.Kill();
  if (handle.fd() >= 0) {
    pollfd wait{handle.fd(), POLLIN, 0};
    EXPECT_EQ(poll(&wait, 1, 10'000), 1) << "its end is to be seen";
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

// What MPI calls its segments, of all ranks of the job that this process has mapped one of.
TEST(RemoveSharedSegments, RemovesWhatIsMapped) {
  const std::string folder = testing::TempDir();
  const std::string job = std::to_string(getpid());
  const std::string ours = folder + "/vader_segment.node.example.0." + job + ".0",
                    unmapped = folder + "/vader_segment.other.0." + job + ".0",
                    sibling = ours + "1", other = folder + "/other." + job,
                    window = folder + "/osc_sm.node.example." + job + ".2.7",
                    other_window = folder + "/osc_sm.node.example." + job + "1.2.7";
  for (const std::string& path : {ours, unmapped, sibling, other, window, other_window}) {
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_GE(fd, 0) << path;
    ASSERT_EQ(ftruncate(fd, 4096), 0);
    if (path == ours || path == other) {
      ASSERT_NE(mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0), MAP_FAILED);
    }
    close(fd);
  }
  RemoveSharedSegments();
  EXPECT_NE(access(ours.c_str(), F_OK), 0);
  EXPECT_NE(access(sibling.c_str(), F_OK), 0) << "of a rank that died";
  EXPECT_NE(access(window.c_str(), F_OK), 0) << "of a rank that died while it made it";
  for (const std::string& path : {unmapped, other, other_window}) {
    EXPECT_EQ(access(path.c_str(), F_OK), 0) << path;
    unlink(path.c_str());
  }
}

// A process with one of its own, both of which would sleep for ever; the pipe's end is the
// second's.
struct Sleepers {
  pid_t pid = 0;
  int pipe = -1;
  bool SecondIsGone() const {
    pollfd wait{pipe, POLLIN, 0};
    return poll(&wait, 1, 10'000) == 1;  // end of file
  }
};
Sleepers StartSleepers(int seconds) {
  int ends[2];
  EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    if (fork() != 0) close(ends[1]);
    Sleep(1000 * seconds);
    _exit(0);
  }
  close(ends[1]);
  Sleep(100);  // for the second to be there
  return {pid, ends[0]};
}

TEST(KillUnlessItEnds, KillsAProcessAndWhatItHasStarted) {
  const Sleepers sleepers = StartSleepers(60);
  KillUnlessItEnds(sleepers.pid, 200);
  int status = 0;
  EXPECT_EQ(waitpid(sleepers.pid, &status, 0), sleepers.pid);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  EXPECT_TRUE(sleepers.SecondIsGone());
  close(sleepers.pipe);
}

TEST(KillUnlessItEnds, LeavesAloneWhatEnds) {
  const Sleepers sleepers = StartSleepers(1);
  KillUnlessItEnds(sleepers.pid, 10'000);
  int status = 0;
  EXPECT_EQ(waitpid(sleepers.pid, &status, 0), sleepers.pid);
  EXPECT_TRUE(WIFEXITED(status));
  close(sleepers.pipe);
}

}  // namespace
}  // namespace trireme
