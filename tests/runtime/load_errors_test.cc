// What loading says of a model that the device cannot take or hold, before or while it is loaded.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "tests/host_cuda/device.h"
#include "tests/parallel/world.h"
#include "tests/random_checkpoint.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"

namespace trireme {
namespace {

// Sums in memory of the device, as NCCL's are.
class DeviceSums final : public Communicator {
 public:
  static constexpr int64_t kBytes = 12'345;
  DeviceSums(std::unique_ptr<Communicator> to, Device* device, int* chosen)
      : to_(std::move(to)), device_(device), chosen_(chosen) {
    rank_ = to_->rank();
    size_ = to_->size();
  }
  absl::Status Reserve(int64_t max_bytes) override {
    ASSIGN_OR_RETURN(buffer_, device_->Allocate(kBytes));
    return to_->Reserve(max_bytes);
  }
  void ChooseSums(int64_t max_bytes) override {
    ++*chosen_;
    to_->ChooseSums(max_bytes);
  }
  int64_t buffer_bytes() const override { return to_->buffer_bytes(); }

 private:
  void DoAllReduceSum(Stream& stream, TensorView data) override { to_->AllReduceSum(stream, data); }
  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override {
    to_->AllGather(stream, in, out);
  }
  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override {
    return to_->Send(stream, data, peer);
  }
  void DoWaitSend(Stream& stream, int64_t ticket) override { to_->WaitSend(stream, ticket); }
  void DoRecv(Stream& stream, TensorView data, int peer) override { to_->Recv(stream, data, peer); }

  const std::unique_ptr<Communicator> to_;
  Device* const device_;
  int* const chosen_;
  Buffer buffer_;
};

class LoadErrorsTest : public ::testing::Test {
 protected:
  ~LoadErrorsTest() override { HostCudaTestHooks() = {}; }
  static WorkerOptions Options() {
    WorkerOptions options;
    options.dtype = DType::kBF16;
    options.max_model_len = 32;
    options.max_num_seqs = 2;
    options.max_num_batched_tokens = 32;
    options.open_device = [](const DeviceOptions&) { return NewHostCudaDevice(); };
    return options;
  }
  static absl::Status Load(const std::string& dir, const WorkerOptions& options = Options()) {
    const auto worker = Worker::Load(World(), {.tp_size = World().size()}, dir, options);
    World().Barrier();
    if (worker.ok()) {
      EXPECT_EQ((*worker)->measured_ledger()[Owner::kUnaccounted], 0);
    }
    return worker.status();
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

TEST_F(LoadErrorsTest, ACacheThatTheDeviceDoesNotTakeIsRefusedBeforeWeightsAreRead) {
  const ScratchDir scratch;
  ModelConfig config = LoadModelConfig(GoldenModel("tiny-llama3")).value();
  config.max_positions = 10 << 20;
  WriteRandomCheckpoint(scratch.path(), config);
  int allocations = 0;
  HostCudaTestHooks().allocating = [&](size_t) {
    ++allocations;
    return absl::OkStatus();
  };
  WorkerOptions options = Options();
  options.max_model_len = 10 << 20;
  options.page_size = 1024;
  absl::Status status = Load(scratch.path(), options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "--page-size 1024: host_cuda takes up to 409 with sequences of 10485760 tokens "
            "(--max-model-len)");
  const int64_t page_rows = 409 * std::max<int64_t>(1, config.num_kv_heads / World().size());
  options.page_size = 409;
  options.num_pages = ((int64_t{1} << 31) - 1) / page_rows + 1;
  status = Load(scratch.path(), options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            absl::StrCat("a KV cache of ", options.num_pages,
                         " pages of 409 tokens: host_cuda takes up to ", options.num_pages - 1,
                         " pages; lower --kv-cache-memory, --max-num-seqs or --max-model-len"));
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

// Else the others would wait for it where they try sums together.
TEST_F(LoadErrorsTest, ARankWithoutMemoryForSumsStopsAllBeforeTheyMeet) {
  Device* device = nullptr;
  int chosen = 0;
  WorkerOptions options = Options();
  options.open_device = [&](const DeviceOptions&) {
    std::unique_ptr<Device> opened = NewHostCudaDevice();
    device = opened.get();
    return opened;
  };
  options.wrap_tp = [&](std::unique_ptr<Communicator> tp) {
    return std::make_unique<DeviceSums>(std::move(tp), device, &chosen);
  };
  EXPECT_TRUE(Load(GoldenModel("stories260K"), options).ok());
  EXPECT_EQ(chosen, 1);
  const int last = World().size() - 1;
  if (World().rank() == last) {
    HostCudaTestHooks().allocating = [](size_t bytes) {
      return bytes == DeviceSums::kBytes ? absl::ResourceExhaustedError("no memory for sums")
                                         : absl::OkStatus();
    };
  }
  const absl::Status status = Load(GoldenModel("stories260K"), options);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  const std::string message(status.message());
  EXPECT_TRUE(absl::StrContains(message, absl::StrCat("no memory for sums\nrank ", last, " (")))
      << message;
  EXPECT_TRUE(absl::StrContains(message, "  communicator ")) << message;
  EXPECT_EQ(chosen, 1);
}

}  // namespace
}  // namespace trireme
