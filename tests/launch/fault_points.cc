// Linked into the test's own build of the program (trireme_faults): makes one rank fail at one
// point.
//   TRIREME_FAULT=RANK:PHASE:HOW[:COUNT]   the COUNTth time (default: first) that the rank begins
//   the phase, or a step of it; the phase "start" comes before MPI_Init. HOW: kill, stop, throw,
//   error (the caller returns a status), check, exit, freeze (sleeps for ever), freeze-in-call (in
//   the next call that other ranks take part in), slow (computes for TRIREME_FAULT_SECONDS, default
//   3, and goes on: no failure).
//   TRIREME_FAULT_TIME, TRIREME_FAULT_ONCE: files, see below.
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/check.h"
#include "parallel/flight_recorder.h"

namespace {

struct Fault {
  int rank = -1;
  std::string phase, how;
  int count = 1;
};

Fault FromEnvironment() {
  Fault fault;
  const char* const text = getenv("TRIREME_FAULT");
  if (text == nullptr) return fault;
  std::istringstream in(text);
  std::string rank, count;
  std::getline(in, rank, ':');
  std::getline(in, fault.phase, ':');
  std::getline(in, fault.how, ':');
  if (std::getline(in, count, ':')) fault.count = atoi(count.c_str());
  fault.rank = atoi(rank.c_str());
  return fault;
}

[[noreturn]] void SleepForEver() {
  while (true) pause();
}

void Compute() {
  const char* const text = getenv("TRIREME_FAULT_SECONDS");
  const auto until =
      std::chrono::steady_clock::now() + std::chrono::seconds(text != nullptr ? atoi(text) : 3);
  for (volatile double x = 1.0; std::chrono::steady_clock::now() < until;) x = x * 1.0000001;
}

// With TRIREME_FAULT_TIME=FILE the file gets the moment of the fault, seconds of CLOCK_MONOTONIC.
void NoteTime() {
  const char* const path = getenv("TRIREME_FAULT_TIME");
  if (path == nullptr) return;
  // Under its name only when it is whole.
  const std::string part = std::string(path) + ".part";
  FILE* const file = std::fopen(part.c_str(), "w");
  if (file == nullptr) return;
  std::fprintf(file, "%.6f\n", static_cast<double>(trireme::MonotonicNs()) * 1e-9);
  std::fclose(file);
  std::rename(part.c_str(), path);
}

// With TRIREME_FAULT_ONCE=FILE only who makes the file fails: a job that is started again does not.
bool MayFail() {
  const char* const path = getenv("TRIREME_FAULT_ONCE");
  if (path == nullptr) return true;
  const int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
  if (fd >= 0) close(fd);
  return fd >= 0;
}

bool Fail(const std::string& how) {
  if (how == "kill") raise(SIGKILL);
  if (how == "stop") raise(SIGSTOP);
  if (how == "throw") throw std::runtime_error("thrown by a test");
  CHECK(how != "check") << "asked for by a test";
  if (how == "exit") _exit(0);
  if (how == "freeze") SleepForEver();
  if (how == "slow") Compute();
  return how == "error";
}

}  // namespace

extern "C" bool trireme_fault_point(int rank, const char* phase, int64_t, const char* op) {
  static const Fault fault = FromEnvironment();
  static int seen = 0;
  if (rank != fault.rank) return false;
  if (op == nullptr && fault.phase == phase) ++seen;
  const bool in_call = fault.how == "freeze-in-call";
  if (seen != fault.count || in_call != (op != nullptr)) return false;
  if (op == nullptr && fault.phase != phase) return false;
  ++seen;  // once
  if (!MayFail()) return false;
  NoteTime();
  if (in_call) SleepForEver();
  return Fail(fault.how);
}
