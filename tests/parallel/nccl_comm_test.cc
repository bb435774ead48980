// A NCCL made of functions of this test: calls that wait until the communicator is aborted, errors
// that come later.
#include "parallel/nccl/nccl_comm.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "parallel/nccl_fault.h"

namespace trireme {
namespace {

std::atomic<int> g_aborted, g_destroyed, g_calls;
std::atomic<ncclResult_t> g_async;
std::atomic<bool> g_inside;  // a call waits in NCCL

void Sleep(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Waits for its peers, who never come.
ncclResult_t StuckAllReduce(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                            cudaStream_t) {
  ++g_calls;
  g_inside.store(true);
  while (g_aborted.load() == 0) Sleep(1);
  g_inside.store(false);
  return ncclInternalError;
}

NcclApi FakeNccl() {
  g_aborted = g_destroyed = g_calls = 0;
  g_async = ncclSuccess;
  g_inside = false;
  NcclApi api{};
  api.GetErrorString = [](ncclResult_t result) {
    return result == ncclRemoteError ? "remote process exited" : "another error";
  };
  api.GetLastError = [](ncclComm_t) { return "socket closed"; };
  api.CommDestroy = [](ncclComm_t) {
    ++g_destroyed;
    return ncclSuccess;
  };
  api.CommAbort = [](ncclComm_t) {
    ++g_aborted;
    return ncclSuccess;
  };
  api.CommGetAsyncError = [](ncclComm_t, ncclResult_t* state) {
    EXPECT_EQ(g_aborted.load(), 0) << "asked of a communicator that is gone";
    *state = g_async.load();
    return ncclSuccess;
  };
  api.AllReduce = &StuckAllReduce;
  return api;
}

ncclComm_t Handle() {
  static int memory;
  return reinterpret_cast<ncclComm_t>(&memory);
}

void AllReduce(const NcclApi& nccl, NcclComm& comm) {
  comm.Do("all-reduce", [&](ncclComm_t handle) {
    return nccl.AllReduce(nullptr, nullptr, 0, ncclFloat32, ncclSum, handle, nullptr);
  });
}

TEST(NcclComm, IsDestroyedAtAProperEnd) {
  const NcclApi nccl = FakeNccl();
  {
    NcclComm comm(nccl, Handle());
    EXPECT_TRUE(comm.Poll().ok());
  }
  EXPECT_EQ(g_destroyed.load(), 1);
  EXPECT_EQ(g_aborted.load(), 0);
}

TEST(NcclComm, AbortBringsAThreadOutOfACall) {
  const NcclApi nccl = FakeNccl();
  NcclComm comm(nccl, Handle());
  std::thread caller([&] { AllReduce(nccl, comm); });
  while (!g_inside.load()) Sleep(1);
  EXPECT_TRUE(comm.Poll().ok()) << "a poll waits for no call";
  comm.Abort();
  caller.join();
  EXPECT_EQ(g_aborted.load(), 1);
  EXPECT_EQ(comm.Poll().message(), "NCCL: aborted, since the job has failed");
  AllReduce(nccl, comm);
  EXPECT_EQ(g_calls.load(), 1) << "no call is made with what is gone";
  comm.Abort();
  EXPECT_EQ(g_aborted.load(), 1) << "once";
}

TEST(NcclComm, AnAsynchronousErrorIsKept) {
  const NcclApi nccl = FakeNccl();
  {
    NcclComm comm(nccl, Handle());
    EXPECT_TRUE(comm.Poll().ok());
    g_async = ncclRemoteError;
    EXPECT_EQ(comm.Poll().message(),
              "NCCL asynchronous error: remote process exited (socket closed)");
    g_async = ncclSuccess;
    EXPECT_FALSE(comm.Poll().ok());
    comm.Abort();
    EXPECT_EQ(comm.Poll().message(),
              "NCCL asynchronous error: remote process exited (socket closed)");
  }
  EXPECT_EQ(g_destroyed.load(), 0) << "an abort destroys already";
}

// The line is the doctor's, which prints the same fault's.
TEST(OpenNccl, SaysThatItIsMissingAsTheDoctorDoes) {
  // Also where it is there: the loader may open no file.
  rlimit files, none;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
  none = {.rlim_cur = 0, .rlim_max = files.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  void* const library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL);
  const char* const error = dlerror();
  const std::string why = error == nullptr ? "" : error;
  const absl::Status status = OpenNccl().status();
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &files), 0);
  ASSERT_EQ(library, nullptr);
  EXPECT_EQ(status.message(), NcclIsMissing(why).Line());
}

// As NCCL codes its versions: until 2.8 with one digit less.
TEST(NcclDoesNotFit, KnowsBothCodesOfAVersion) {
  for (const int version : {2708, 2804, 20900, 22809}) EXPECT_FALSE(NcclDoesNotFit(version));
  EXPECT_EQ(NcclDoesNotFit(30102)->Line().find("NCCL 3.1 is found, and"), 0u);
  EXPECT_EQ(NcclDoesNotFit(1304)->Line().find("NCCL 1.3 is found, and"), 0u);
  EXPECT_EQ(NcclDoesNotFit(2408, "ncclSend")->Line().find("NCCL 2.4 is found, without ncclSend,"),
            0u);
}

// The thread that calls, the one that polls and the one that aborts.
TEST(NcclComm, ThreadsMeet) {
  for (int round = 0; round < 200; ++round) {
    NcclApi nccl = FakeNccl();
    nccl.AllReduce = [](const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                        cudaStream_t) {
      EXPECT_EQ(g_aborted.load(), 0) << "a call with what is gone";
      return ncclSuccess;
    };
    NcclComm comm(nccl, Handle());
    std::thread caller([&] {
      for (int i = 0; i < 50; ++i) AllReduce(nccl, comm);
    });
    std::thread poller([&] {
      for (int i = 0; i < 50; ++i) comm.Poll().IgnoreError();
    });
    comm.Abort();
    caller.join();
    poller.join();
    EXPECT_EQ(g_aborted.load(), 1);
  }
}

}  // namespace
}  // namespace trireme
