// The CUDA backend's device and stream over a double of CUDA's library: what they make of what a
// driver or a GPU can answer.

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/stream_errors.h"
#include "tests/host_cuda/cuda_runtime_double.h"

namespace trireme::cuda {
namespace {

class CudaDeviceTest : public ::testing::Test {
 protected:
  CudaDeviceTest() { TheCudaRuntimeDouble() = {}; }
  ~CudaDeviceTest() override { TheCudaRuntimeDouble() = {}; }

  void Open() {
    device_ = OpenCudaDevice({.name = "cuda"}).value();
    stream_ = device_->NewStream().value();
  }
  cudaStream_t handle() const { return static_cast<CudaStream&>(*stream_).handle(); }
  // What a kernel's launch does (gpu.h).
  void Launch(cudaError_t answer) {
    if (gpu::MayEnqueue(handle())) gpu::CheckLaunch(handle(), answer), ++launches_;
  }
  static void ExpectLost(const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(
        status.message(),
        "cuda:0 double: unspecified launch failure: the GPU was lost or a kernel failed: dmesg "
        "shows its Xid; start again");
  }

  CudaRuntimeDouble& runtime_ = TheCudaRuntimeDouble();
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  int launches_ = 0;
};

TEST_F(CudaDeviceTest, AFailedLaunchIsTheStreamsErrorAndNothingComesBehindIt) {
  Open();
  const std::unique_ptr<Graph> graph = stream_->Capture([] {}).value();
  const std::unique_ptr<Stream> other = device_->NewStream().value();
  Launch(cudaSuccess);
  EXPECT_TRUE(stream_->Fault().ok());
  Launch(cudaErrorLaunchFailure);
  Launch(cudaErrorMemoryAllocation);  // not the first
  EXPECT_EQ(launches_, 2);
  char to = 0, from = 1;
  stream_->Copy(&to, &from, 1);
  stream_->CopyRows(&to, 1, &from, 1, 1, 1);
  graph->Replay(*stream_);
  EXPECT_EQ(runtime_.copies, 0);
  EXPECT_EQ(runtime_.graph_launches, 0);
  ExpectLost(stream_->Fault());
  for (int i = 0; i < 2; ++i) ExpectLost(stream_->Synchronize());
  EXPECT_TRUE(other->Synchronize().ok());
}

TEST_F(CudaDeviceTest, SoAreThoseOfAGraphsLaunchACopyAndAWait) {
  for (cudaError_t CudaRuntimeDouble::*call :
       {&CudaRuntimeDouble::graph_launch, &CudaRuntimeDouble::copy,
        &CudaRuntimeDouble::synchronize}) {
    runtime_ = {};
    Open();
    const std::unique_ptr<Graph> graph = stream_->Capture([] {}).value();
    runtime_.*call = cudaErrorLaunchFailure;
    graph->Replay(*stream_);
    char to = 0, from = 1;
    stream_->Copy(&to, &from, 1);
    ExpectLost(stream_->Synchronize());
    runtime_.*call = cudaSuccess;
    ExpectLost(stream_->Synchronize());
    EXPECT_TRUE(device_->NewStream().value()->Synchronize().ok());
  }
}

// The copies queue, and whoever asked for them goes on writing.
TEST_F(CudaDeviceTest, WhatIsUploadedIsWhatLayThereAtTheCall) {
  Open();
  runtime_.copies_wait = true;
  constexpr int kUploads = 40, kRows = 3000, kColumns = 30, kStride = 50;
  std::vector<int> uploaded(kUploads), source(kRows * kStride), table(kRows * kStride, -1);
  for (int i = 0; i < kUploads; ++i) {
    int value = i;
    stream_->Copy(&uploaded[i], &value, sizeof(value));
    value = -1;
  }
  // More rows than a slot holds.
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<int>(i);
  stream_->CopyRows(table.data(), kStride * sizeof(int), source.data(), kStride * sizeof(int),
                    kColumns * sizeof(int), kRows);
  std::fill(source.begin(), source.end(), -2);
  ASSERT_TRUE(stream_->Synchronize().ok());
  for (int i = 0; i < kUploads; ++i) EXPECT_EQ(uploaded[i], i);
  for (int i = 0; i < kRows * kStride; ++i)
    ASSERT_EQ(table[i], i % kStride < kColumns ? i : -1) << i;
  EXPECT_GT(runtime_.waits_for_events, 0) << "there are fewer slots than uploads";
  EXPECT_EQ(runtime_.page_locked.size(), UploadRing::kSlots);
  stream_.reset();
  EXPECT_TRUE(runtime_.page_locked.empty());
}

TEST_F(CudaDeviceTest, WithoutPageLockedMemoryUploadsGoFromWhereTheyLie) {
  Open();
  runtime_.allocation = cudaErrorMemoryAllocation;
  const int value = 7;
  int uploaded = 0;
  stream_->Copy(&uploaded, &value, sizeof(value));
  EXPECT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(uploaded, 7);
}

// From page-locked memory nothing is copied twice, and in a graph a copy reads what lies there at
// each replay.
TEST_F(CudaDeviceTest, PageLockedMemoryAndGraphsAreCopiedAsTheyAre) {
  Open();
  runtime_.copies_wait = true;
  const Buffer host = device_->AllocateHost(sizeof(int)).value();
  int& value = *static_cast<int*>(host.data());
  EXPECT_EQ(value, 0);
  int copied = -1, captured = -1, source = 1;
  stream_->Copy(&copied, &value, sizeof(value));
  value = 5;
  const auto graph = stream_->Capture([&] { stream_->Copy(&captured, &source, sizeof(source)); });
  ASSERT_TRUE(graph.ok());
  source = 6;
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_EQ(copied, 5);
  EXPECT_EQ(captured, 1) << "the double does what is captured in its wait";
  EXPECT_EQ(runtime_.page_locked.size(), 1u);
  runtime_.allocation = cudaErrorMemoryAllocation;
  EXPECT_EQ(device_->AllocateHost(100).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(CudaDeviceTest, OnlyWhatIsNoMemoryIsCalledSo) {
  Open();
  runtime_.allocation = cudaErrorMemoryAllocation;
  const absl::Status none = device_->Allocate(100).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(std::string(none.message()).find("cuda:0 double: no memory for 100 bytes; "), 0u);
  runtime_.allocation = cudaErrorLaunchFailure;
  const absl::Status lost = device_->Allocate(100).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(lost.message(),
            "cuda:0 double: 100 bytes of memory: unspecified launch failure: the GPU was lost or a "
            "kernel failed: dmesg shows its Xid; start again");
}

TEST_F(CudaDeviceTest, OutOfMemoryAtALaunchSaysWhatToLower) {
  Open();
  Launch(cudaErrorMemoryAllocation);
  const absl::Status status = stream_->Synchronize();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "cuda:0 double: out of memory: lower --kv-cache-memory, --max-num-seqs or "
            "--max-model-len");
}

// The work runs without a graph then.
TEST_F(CudaDeviceTest, WhatACaptureIsRefusedIsNotTheStreamsError) {
  Open();
  const auto graph = stream_->Capture([this] { Launch(cudaErrorMemoryAllocation); });
  EXPECT_EQ(graph.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(std::string(graph.status().message()).find("cuda:0 double: capturing a graph: "), 0u);
  EXPECT_TRUE(stream_->Synchronize().ok());
}

// Ranks count what the kernels fit: a display's GPU in between is nobody's.
TEST_F(CudaDeviceTest, ARanksGpuIsTheNthThatIsSupported) {
  runtime_.gpus = {
      {.name = "display", .major = 7}, {}, {.name = "small", .shared_bytes = 99 << 10}, {}};
  EXPECT_EQ(UsableDevices().value(),
            (std::vector<std::string>{"GPU 0000:01:00", "GPU 0000:03:00"}));
  for (const auto& [local_index, name] :
       {std::pair(0, "cuda:1 double"), std::pair(1, "cuda:3 double"),
        std::pair(2, "cuda:1 double")}) {
    const auto device = OpenCudaDevice({.name = "cuda", .local_index = local_index});
    ASSERT_TRUE(device.ok()) << device.status();
    EXPECT_EQ((*device)->spec().name, name);
    EXPECT_EQ((*device)->spec().identity, UsableDevices().value()[local_index % 2]);
    EXPECT_EQ((*device)->spec().max_head_dim, 256);
    EXPECT_EQ((*device)->spec().max_cache_rows, kMaxCacheRows);
    EXPECT_EQ((*device)->spec().max_page_reach, kMaxPageReach);
  }
}

TEST_F(CudaDeviceTest, WithoutAGpuItSaysWhatIsMissing) {
  const auto why = [] {
    EXPECT_EQ(UsableDevices().status(), OpenCudaDevice({.name = "cuda"}).status());
    return std::string(UsableDevices().status().message());
  };
  runtime_.gpus = {{.name = "old", .major = 7, .minor = 5}};
  EXPECT_EQ(why(),
            "--device cuda: old has compute capability 7.5; 8.0, 9.0 and 10.0 are supported");
  runtime_.gpus = {};
  EXPECT_NE(why().find("the driver shows no GPU ("), std::string::npos);
  runtime_.driver = 11080;
  EXPECT_NE(why().find("the driver knows CUDA 11.8 and this build needs "), std::string::npos);
  runtime_.driver = 0;
  EXPECT_EQ(UsableDevices().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(NoDriver(false).message(), "--device cuda: this machine has no NVIDIA driver");
  EXPECT_NE(NoDriver(true).message().find("libcuda.so.1 is not found: start the container with"),
            std::string::npos);
}

TEST_F(CudaDeviceTest, ALaunchThatNoGpuDoesIsOurFault) {
  Open();
  EXPECT_DEATH(Launch(cudaErrorInvalidConfiguration), "kernel launch: error 9 of CUDA");
  Launch(cudaErrorStreamCaptureInvalidated);  // the capture's end says why
  EXPECT_TRUE(stream_->Synchronize().ok());
}

}  // namespace
}  // namespace trireme::cuda
