// capture_faults MODEL_DIR RECORDS_DIR FAILURE_TIMEOUT: a job of as many pipeline stages as ranks
// that captures CUDA graphs, which needs the emulator where there is no GPU, and ends. Linked with
// fault_points.cc: failure_test.py makes one of its ranks fail in that phase.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "kernels/check.h"
#include "kernels/status.h"
#include "kernels/uncaught.h"
#include "parallel/control_plane.h"
#include "parallel/failure_detector.h"
#include "runtime/worker.h"
#include "tests/host_cuda/device.h"

namespace trireme {
namespace {

absl::Status Capture(ControlPlane& control, const std::string& model_dir) {
  WorkerOptions options;
  options.dtype = DType::kF32;
  options.max_model_len = 32;
  options.max_num_seqs = 2;
  options.max_num_batched_tokens = 8;
  options.page_size = 4;
  options.device.threads = 1;
  options.open_device = [](const DeviceOptions&) { return NewHostCudaDevice(); };
  ASSIGN_OR_RETURN(const std::unique_ptr<Worker> worker,
                   Worker::Load(control, {.pp_size = control.size()}, model_dir, options));
  CHECK_GT(worker->graph_stats().graphs, 0);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  EndOnUncaughtExceptions();
  CHECK_EQ(argc, 4);
  const std::unique_ptr<ControlPlane> control = ControlPlane::Start(&argc, &argv).value();
  CHECK(control->Watch({.timeout_s = std::atof(argv[3]), .record_dir = argv[2]}).ok());
  const absl::Status status = Capture(*control, argv[1]);
  if (!control->JobStatus().ok()) control->detector()->WaitForEnd();
  if (status.ok()) return 0;
  control->detector()->SayNothingMore();
  if (control->rank() == 0)
    std::fprintf(stderr, "trireme: %s\n", std::string(status.message()).c_str());
  return 1;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) { return trireme::Main(argc, argv); }
