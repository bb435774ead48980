// A device that fails on a stage that waits for nothing of it: what it enqueues goes on without it,
// and nobody would hear of it before the job's end.

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <utility>

#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/runtime/failing_device.h"

namespace trireme {
namespace {

TEST(StageFaultTest, AFirstStageEndsTheEngineWithItsDevicesError) {
  std::atomic<bool> fail = false;
  WorkerOptions options;
  options.open_device =
      [&fail](const DeviceOptions& asked) -> absl::StatusOr<std::unique_ptr<Device>> {
    absl::StatusOr<std::unique_ptr<Device>> device = OpenDevice(asked);
    if (!device.ok()) return device.status();
    return std::make_unique<FailingDevice>(*std::move(device), &fail, /*stays=*/true);
  };
  WithWorker("stories260K", {.pp_size = World().size()}, std::move(options), [&](Worker& worker) {
    const std::unique_ptr<Engine> engine = Engine::Create(worker, nullptr).value();
    fail = true;  // on the leader, the first stage
    Request request;
    request.prompt = {1, 403, 407};
    request.max_tokens = 50;
    TokenOutput last;
    ASSERT_TRUE(engine->Submit(request, [&](const TokenOutput& output) { last = output; }).ok());
    EXPECT_EQ(engine->Drain().message(), FailingDevice::kError);
    EXPECT_EQ(last.finish, FinishReason::kError);
    EXPECT_EQ(last.status.message(), FailingDevice::kError);
  });
}

}  // namespace
}  // namespace trireme
