// fail_in_communicator HOW: three ranks wait in a collective of a communicator whose calls end only
// when it is aborted, as a GPU's do; meanwhile something fails. Run by job_failure_test.cmake.
//   stuck         rank 1 is killed
//   error         rank 1's communicator reports an asynchronous error
//   consequences  rank 1 is killed, and the communicators of the others report that first
//   deaf          rank 1 is killed, and its communicator no longer answers on the others
//   error-late    as error, but the communicator that reports it is gone by then: no failure
// And with calls that a stream does later, while the host waits for the stream, which looks busy:
//   never-enqueued  rank 1 freezes before its second collective
//   long-kernel     rank 1's device computes for three timeouts before it: no failure
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <list>
#include <string>
#include <thread>

#include "kernels/check.h"
#include "parallel/communicator.h"
#include "parallel/control_plane.h"
#include "parallel/enqueued_calls.h"
#include "parallel/failure_detector.h"

namespace trireme {
namespace {

void Sleep(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

class StuckCommunicator final : public Communicator {
 public:
  StuckCommunicator(int rank, int size) { rank_ = rank, size_ = size; }
  absl::Status Poll() override {
    while (deaf.load()) Sleep(1000);
    if (!broken.load()) return absl::OkStatus();
    return absl::UnavailableError("remote process exited or there was a network error");
  }
  // Waits for the thread that it frees to say so: a detector ends the process soon after.
  void Abort() override {
    aborted_.store(true);
    while (!out.load()) Sleep(1);
  }
  std::atomic<bool> broken{false}, deaf{false}, out{false};

 protected:
  void DoAllReduceSum(Stream&, TensorView) override {
    while (!aborted_.load()) Sleep(1);
  }
  void DoAllGather(Stream&, ConstTensorView, TensorView) override {}
  int64_t DoSend(Stream&, ConstTensorView, int) override { return 0; }
  void DoWaitSend(Stream&, int64_t) override {}
  void DoRecv(Stream&, TensorView, int) override {}

 private:
  std::atomic<bool> aborted_{false};
};

// Its stream does call i at a moment that is known beforehand.
class EnqueuingCommunicator final : public Communicator {
 public:
  EnqueuingCommunicator(int rank, int size) { rank_ = rank, size_ = size, enqueues_ = true; }
  absl::Status Poll() override {
    calls_.Look();
    return absl::OkStatus();
  }
  // When the stream comes to the next call, and when it has passed it.
  void Next(int64_t begin_ns, int64_t end_ns) { times_.push_back({begin_ns, end_ns}); }
  // As a Synchronize: polls, which looks like work.
  void Synchronize() {
    while (!times_.empty() && MonotonicNs() < times_.back().end_ns) continue;
  }

 protected:
  void DoAllReduceSum(Stream&, TensorView) override {
    calls_.Add(*recorder(), call_, &times_.back().begin_ns, &times_.back().end_ns);
  }
  void DoAllGather(Stream&, ConstTensorView, TensorView) override {}
  int64_t DoSend(Stream&, ConstTensorView, int) override { return 0; }
  void DoWaitSend(Stream&, int64_t) override {}
  void DoRecv(Stream&, TensorView, int) override {}

 private:
  struct Times {
    int64_t begin_ns, end_ns;
  };
  std::list<Times> times_;
  EnqueuedCalls calls_{
      [](EnqueuedCalls::Mark at) { return MonotonicNs() >= *static_cast<int64_t*>(at); }};
};

CommGroup TpOf(const ControlPlane& world) {
  CommGroup group{.size = world.size()};
  group.name[0] = 't', group.name[1] = 'p';
  return group;
}

int RunStream(ControlPlane& world, const std::string& how) {
  constexpr int64_t kSecond = 1'000'000'000;
  EnqueuingCommunicator communicator(world.rank(), world.size());
  communicator.RecordWith(world.recorder(), TpOf(world));
  const CommunicatorWatch watch(world.detector(), &communicator);
  std::unique_ptr<Device> device = *OpenDevice({});
  std::unique_ptr<Stream> stream = *device->NewStream();
  CHECK(world.BeginStep(Phase::kDecode, 7, 0).ok());
  world.Barrier();
  const int64_t now = MonotonicNs();
  communicator.Next(now, now + kSecond / 10);
  communicator.AllReduceSum(*stream, TensorView());
  if (how == "never-enqueued") {
    if (world.rank() == 1) Sleep(60'000);
    communicator.Next(now + kSecond / 5, now + 60 * kSecond);
  } else {
    const int64_t reached = world.rank() == 1 ? now + 3 * kSecond : now + kSecond / 5;
    communicator.Next(reached, now + 3 * kSecond + kSecond / 10);
  }
  communicator.AllReduceSum(*stream, TensorView());
  communicator.Synchronize();
  world.EndStep();
  world.Barrier();
  return world.JobStatus().ok() ? 0 : 3;
}

int Run(const std::string& how) {
  auto started = ControlPlane::Start(nullptr, nullptr);
  CHECK(started.ok()) << started.status().ToString();
  ControlPlane& world = **started;
  const bool streams = how == "never-enqueued" || how == "long-kernel";
  // Else longer than the test may take: what is noticed is not noticed by silence.
  CHECK(world.Watch({.timeout_s = streams ? 1.0 : 20.0, .record_dir = ""}).ok());
  if (streams) return RunStream(world, how);
  StuckCommunicator communicator(world.rank(), world.size());
  communicator.RecordWith(world.recorder(), TpOf(world));
  std::unique_ptr<Device> device = *OpenDevice({});
  std::unique_ptr<Stream> stream = *device->NewStream();
  if (how == "error-late") {
    { const CommunicatorWatch watch(world.detector(), &communicator); }
    communicator.broken.store(true);
    Sleep(1500);
    world.Barrier();
    return world.JobStatus().ok() ? 0 : 3;
  }
  const CommunicatorWatch watch(world.detector(), &communicator);
  CHECK(world.BeginStep(Phase::kDecode, 7, 0).ok());
  const bool last = world.rank() == 1;
  std::thread([&] {
    Sleep(300);
    if (last && how != "error") raise(SIGKILL);
    if (last) communicator.broken.store(true);
    if (how == "deaf") communicator.deaf.store(true);
  }).detach();
  if (how == "consequences" && !last) communicator.broken.store(true);
  communicator.AllReduceSum(*stream, TensorView());
  std::fprintf(stderr, "rank %d is out of its collective: %s\n", world.rank(),
               std::string(world.JobStatus().message()).c_str());
  communicator.out.store(true);
  world.detector()->WaitForEnd();
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  CHECK_EQ(argc, 2);
  // mpirun sends it to the survivors; what they say is waited for.
  std::signal(SIGTERM, SIG_IGN);
  return trireme::Run(argv[1]);
}
