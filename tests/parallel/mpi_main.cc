// main() of multi-rank tests: starts the MPI session, runs the tests on every rank and makes one
// verdict of all. Rank 0 prints as usual, the others only what failed, with their rank in front.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/parallel/world.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#endif

namespace trireme {
namespace {

ControlPlane* g_world = nullptr;

class FailurePrinter : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo& test) override {
    name_ = absl::StrCat(test.test_suite_name(), ".", test.name());
  }
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::printf("rank %d: %s: %s:%d: %s\n", g_world->rank(), name_.c_str(),
                result.file_name() != nullptr ? result.file_name() : "?", result.line_number(),
                result.message());
    std::fflush(stdout);
  }
  std::string name_;
};

// Leaks are looked for while Open MPI's plugins are still loaded: what they leak can then be told
// from ours by their names (tests/lsan.supp).
bool NothingLeaked() {
#if defined(__SANITIZE_ADDRESS__)
  return __lsan_do_recoverable_leak_check() == 0;
#else
  return true;
#endif
}

int Run() {
  if (g_world->rank() > 0) {
    testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailurePrinter);
  }
  const bool passed = RUN_ALL_TESTS() == 0 && NothingLeaked();
  const absl::Status verdict = g_world->Agree(
      passed ? absl::OkStatus()
             : absl::UnknownError(absl::StrCat("tests failed on rank ", g_world->rank())));
  if (!verdict.ok() && g_world->rank() == 0) std::printf("%s\n", verdict.ToString().c_str());
  return verdict.ok() ? 0 : 1;
}

}  // namespace

ControlPlane& World() { return *g_world; }

}  // namespace trireme

int main(int argc, char** argv) {
  auto world = trireme::ControlPlane::Start(&argc, &argv);
  if (!world.ok()) {
    std::fprintf(stderr, "%s\n", world.status().ToString().c_str());
    return 1;
  }
  testing::InitGoogleTest(&argc, argv);
  trireme::g_world = world->get();
  return trireme::Run();
}
