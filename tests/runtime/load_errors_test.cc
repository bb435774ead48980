// What loading says of a model that the device cannot take or hold, before or while it is loaded.

#include <gtest/gtest.h>

#include <string>

#include "absl/strings/match.h"
#include "tests/host_cuda/device.h"
#include "tests/parallel/world.h"
#include "tests/random_checkpoint.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

class LoadErrorsTest : public ::testing::Test {
 protected:
  ~LoadErrorsTest() override { HostCudaTestHooks() = {}; }
  static absl::Status Load(const std::string& dir) {
    WorkerOptions options;
    options.dtype = DType::kBF16;
    options.max_model_len = 32;
    options.max_num_seqs = 2;
    options.max_num_batched_tokens = 32;
    options.open_device = [](const DeviceOptions&) { return NewHostCudaDevice(); };
    const absl::Status status =
        Worker::Load(World(), {.tp_size = World().size()}, dir, options).status();
    World().Barrier();
    return status;
  }
};

TEST_F(LoadErrorsTest, AHeadThatTheDeviceDoesNotTakeIsRefusedBeforeWeightsAreRead) {
  const ScratchDir scratch;
  ModelConfig config = LoadModelConfig(GoldenModel("tiny-llama3")).value();
  config.head_dim = 320;
  WriteRandomCheckpoint(scratch.path(), config);
  int allocations = 0;
  HostCudaTestHooks().allocating = [&](size_t) {
    ++allocations;
    return absl::OkStatus();
  };
  const absl::Status status = Load(scratch.path());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "head_dim 320: host_cuda takes up to 256; use --device cpu");
  EXPECT_EQ(allocations, 0);
}

// Whichever allocation it is: of weights, the pool, buffers, or what the first steps need.
TEST_F(LoadErrorsTest, OutOfMemoryShowsWhatTheRankHolds) {
  int allocations = 0;
  HostCudaTestHooks().allocating = [&](size_t) {
    ++allocations;
    return absl::OkStatus();
  };
  ASSERT_TRUE(Load(GoldenModel("stories260K")).ok());
  const int all = allocations;
  for (const int failing : {1, all / 2, all}) {
    SCOPED_TRACE(failing);
    allocations = 0;
    HostCudaTestHooks().allocating = [&](size_t) {
      return ++allocations == failing ? absl::ResourceExhaustedError("no memory for a test")
                                      : absl::OkStatus();
    };
    const absl::Status status = Load(GoldenModel("stories260K"));
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    const std::string message(status.message());
    EXPECT_TRUE(absl::StrContains(message, "no memory for a test\nrank 0 (")) << message;
    EXPECT_TRUE(absl::StrContains(message, "  weights ")) << message;
    EXPECT_TRUE(absl::StrContains(message, "  total ")) << message;
  }
}

}  // namespace
}  // namespace trireme
