// fail_on_rank RANK HOW: all ranks but RANK wait in a collective; RANK fails. Run by
// job_failure_test.cmake.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "kernels/check.h"
#include "parallel/control_plane.h"

int main(int argc, char** argv) {
  auto world = trireme::ControlPlane::Start(&argc, &argv);
  CHECK(world.ok()) << world.status().ToString();
  CHECK_EQ(argc, 3);
  const std::string how = argv[2];
  if ((*world)->rank() == std::atoi(argv[1])) {
    if (how == "check") {
      CHECK_EQ(2 + 2, 5) << "on purpose";
    }
    if (how == "check-on-thread") std::thread([] { CHECK(false) << "on purpose"; }).join();
    if (how == "abort") (*world)->Abort(7);

    if (how == "bad-peer") (*world)->Send((*world)->size(), 0, "no such peer");
  }
  if (how == "none") return 0;
  std::string bytes;
  (*world)->Receive(std::atoi(argv[1]), 9);  // never sent
  return 0;
}
