// The ledger: what is planned is what a worker holds, the tightest rank sizes the pool, and a
// difference is told with the table.

#include "runtime/ledger.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "parallel/mpi_communicator.h"
#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/testing.h"
#if defined(TRIREME_HOST_CUDA)
#include "tests/host_cuda/device.h"
#endif

namespace trireme {
namespace {

LedgerOptions Sizes() {
  return {.dtype = DType::kF32,
          .max_model_len = 128,
          .max_num_seqs = 8,
          .max_num_batched_tokens = 64,
          .max_logit_rows = 8,
          .page_size = 16,
          .num_pages = 64};
}

// A worker's with these sizes, but for its pages.
WorkerOptions OptionsOfSizes() {
  const LedgerOptions sizes = Sizes();
  WorkerOptions options;
  options.device.threads = 1;
  options.dtype = sizes.dtype;
  options.max_model_len = sizes.max_model_len;
  options.max_num_seqs = sizes.max_num_seqs;
  options.max_num_batched_tokens = sizes.max_num_batched_tokens;
  return options;
}

// On small models to the byte, but for weights, whose matrices are padded to whole panels.
TEST(LedgerTest, AWorkerHoldsWhatWasPlanned) {
  for (const char* model :
       {"stories260K", "tiny-llama3", "tiny-qwen2", "tiny-qwen3", "tiny-starcoder2"}) {
    for (const Topology& topology : LayoutsOf(World().size())) {
      SCOPED_TRACE(std::string(model) + " " + NameOf(topology));
      const ModelConfig config = LoadModelConfig(GoldenModel(model)).value();
      if (topology.pp_size > config.num_layers) continue;
      auto worker = Worker::Load(World(), topology, GoldenModel(model), OptionsOfSizes());
      ASSERT_TRUE(worker.ok()) << worker.status().message();
      const Ledger planned = PlanLedgers(config, topology, Sizes())[World().rank()];
      const Ledger held = (*worker)->measured_ledger();
      for (const Owner owner :
           {Owner::kKvCache, Owner::kActivations, Owner::kBatch, Owner::kCommunicator})
        EXPECT_EQ(held[owner], planned[owner]) << Name(owner);
      EXPECT_GE(held[Owner::kWeights], planned[Owner::kWeights]);
      EXPECT_EQ(held[Owner::kUnaccounted], 0);
      // A sum and a gather take nothing beyond what was reserved.
      EXPECT_EQ(held[Owner::kCommunicator] > 0, topology.tp_size > 1);
      World().Barrier();
    }
  }
}

TEST(LedgerTest, TheTightestRankSizesThePool) {
  const ModelConfig config = LoadModelConfig(GoldenModel("tiny-llama3")).value();
  const Topology topology{1, 2, 1};
  constexpr int64_t kLimit = 4 << 20;
  LedgerOptions options = Sizes();
  const auto pages = PagesWithinLimit(config, topology, options, kLimit);
  ASSERT_TRUE(pages.ok()) << pages.status().message();
  options.num_pages = *pages;
  int64_t largest = 0;
  for (const Ledger& ledger : PlanLedgers(config, topology, options))
    largest = std::max(largest, ledger.total());
  EXPECT_LE(largest, kLimit);
  ++options.num_pages;
  largest = 0;
  for (const Ledger& ledger : PlanLedgers(config, topology, options))
    largest = std::max(largest, ledger.total());
  EXPECT_GT(largest, kLimit);
  const absl::Status none = PagesWithinLimit(config, topology, options, 1000).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(none.message().find("--memory-limit: rank 0 needs"), std::string::npos);
}

// Of all ranks the same pages: those that the tightest one has room for, but no more than asked
// for.
TEST(LedgerTest, AWorkerTakesThePagesThatFit) {
  const ModelConfig config = LoadModelConfig(GoldenModel("tiny-llama3")).value();
  WorkerOptions options = OptionsOfSizes();
  for (const Topology& topology : LayoutsOf(World().size())) {
    SCOPED_TRACE(NameOf(topology));
    if (topology.pp_size > config.num_layers) continue;
    const auto pages = [&](int64_t wanted, int64_t limit) {
      options.num_pages = wanted;
      options.memory_limit = limit;
      auto worker = Worker::Load(World(), topology, GoldenModel("tiny-llama3"), options);
      World().Barrier();
      return worker.ok() ? (*worker)->options().num_pages : -1;
    };
    LedgerOptions sizes = Sizes();
    sizes.num_pages = 20;
    int64_t limit = 0;  // for 20 pages on the tightest rank
    for (const Ledger& ledger : PlanLedgers(config, topology, sizes))
      limit = std::max(limit, ledger.total());
    EXPECT_EQ(pages(0, limit), 20);
    EXPECT_EQ(pages(0, limit - 1), 19);
    EXPECT_EQ(pages(7, limit), 7);
    EXPECT_EQ(pages(0, 0), 64) << "room for 8 sequences, and the machine has it";
    EXPECT_EQ(pages(100, 0), 100) << "what is asked for";
    EXPECT_EQ(pages(0, 1000), -1);
  }
}

#if defined(TRIREME_HOST_CUDA)
// What inspect tells of a GPU is what loading takes there.
TEST(LedgerTest, KernelsHoldWhatWasPlanned) {
  const ModelConfig config = LoadModelConfig(GoldenModel("tiny-llama3")).value();
  for (const Topology& topology : LayoutsOf(World().size())) {
    if (topology.pp_size > config.num_layers) continue;
    for (const Quantization quantization :
         {Quantization::kNone, Quantization::kFp8, Quantization::kFp8Dynamic}) {
      for (const bool library : {false, true}) {
        SCOPED_TRACE(NameOf(topology) + " " + Name(quantization) + (library ? " cublaslt" : ""));
        WorkerOptions options = OptionsOfSizes();
        options.dtype = DType::kBF16;
        options.quantization = quantization;
        options.graphs = false;
        options.device.cublas_lt = library;
        options.open_device = [](const DeviceOptions& device) {
          return device.cublas_lt ? NewHostCudaDeviceWithCublasLt() : NewHostCudaDevice();
        };
        auto worker = Worker::Load(World(), topology, GoldenModel("tiny-llama3"), options);
        ASSERT_TRUE(worker.ok()) << worker.status().message();
        const Ledger held = (*worker)->measured_ledger();
        const LedgerOptions sizes = LedgerOptionsOf((*worker)->options(), DType::kBF16);
        EXPECT_EQ(held[Owner::kWorkspace],
                  PlanCudaWorkspaces(config, topology, sizes)[World().rank()]);
        EXPECT_EQ(held[Owner::kUnaccounted], 0);
        World().Barrier();
      }
    }
  }
}

// What only the device knows beforehand counts towards the limit too.
TEST(LedgerTest, WorkspacesAreWithinTheLimit) {
  WorkerOptions options = OptionsOfSizes();
  options.dtype = DType::kBF16;
  options.graphs = false;
  options.open_device = [](const DeviceOptions&) { return NewHostCudaDeviceWithCublasLt(); };
  for (const Topology& topology : LayoutsOf(World().size())) {
    SCOPED_TRACE(NameOf(topology));
    const auto load = [&](int64_t limit) {
      options.memory_limit = limit;
      auto worker = Worker::Load(World(), topology, GoldenModel("stories260K"), options);
      World().Barrier();
      return worker;
    };
    auto worker = load(0);
    ASSERT_TRUE(worker.ok()) << worker.status().message();
    const Ledger all = (*worker)->measured_ledger();
    EXPECT_GT(all[Owner::kWorkspace], 0);
    // The tightest rank's.
    const auto most = [](int64_t bytes) {
      int64_t most = 0;
      for (const std::string& of_rank : World().AllGather(std::to_string(bytes)))
        most = std::max<int64_t>(most, std::stoll(of_rank));
      return most;
    };
    const int64_t limit = most(all.total()) - all[Owner::kKvCache] / 8;
    worker = load(limit);
    ASSERT_TRUE(worker.ok()) << worker.status().message();
    EXPECT_LT((*worker)->options().num_pages, 64);
    EXPECT_LE((*worker)->measured_ledger().total(), limit);
    // Room for what is planned, but not for what comes on top.
    const absl::Status none =
        load(most(all.total() - all[Owner::kKvCache]) - all[Owner::kWorkspace] / 2).status();
    EXPECT_EQ(none.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(none.message().find("workspaces"), std::string::npos) << none.message();
  }
}
#endif

// Between hosts a sum's parts go through buffers instead of the window; the plan knows both.
TEST(LedgerTest, ACommunicatorHoldsWhatWasPlannedForMessages) {
  constexpr int64_t kBytes = 100'000;
  const auto comm = NewMpiCommunicator(World(), 0, {.use_shared_memory = false, .name = "tp"});
  ASSERT_TRUE(comm->Reserve(kBytes).ok());
  comm->ChooseSums(kBytes);
  EXPECT_EQ(comm->spans_hosts(), World().size() > 1);
  const int64_t planned = MpiCommunicatorBytes(World().size(), kBytes, true);
  EXPECT_EQ(comm->buffer_bytes(), planned);
  const TestDevice device;
  for (const int64_t elements : {1L, 1000L, 24'999L, 25'000L}) {
    const Tensor data = device.Zeros(DType::kF32, {elements});
    comm->AllReduceSum(device.stream(), data.view());
    EXPECT_EQ(comm->buffer_bytes(), planned) << elements;
  }
}

TEST(LedgerTest, WhatNobodyOwnsIsUnaccounted) {
  Ledger held;
  held[Owner::kWeights] = 1000;
  held[Owner::kKvCache] = 500;
  held[Owner::kCommunicator] = 64;  // not the device's
  AccountFor(1500, &held);
  EXPECT_EQ(held[Owner::kUnaccounted], 0);
  AccountFor(1570, &held);
  EXPECT_EQ(held[Owner::kUnaccounted], 70);
  Ledger planned = held;
  planned[Owner::kUnaccounted] = 0;
  EXPECT_NE(CompareLedgers(planned, held).message().find("(unaccounted)"), std::string::npos);
}

TEST(LedgerTest, ADifferenceOfMoreThanTwoPercentIsRefused) {
  Ledger planned;
  planned[Owner::kWeights] = int64_t{1} << 30;
  Ledger held = planned;
  held[Owner::kWeights] += int64_t{1} << 24;  // 1.6%
  EXPECT_TRUE(CompareLedgers(planned, held).ok());
  planned[Owner::kBatch] = held[Owner::kBatch] = 10'000;
  held[Owner::kBatch] += 201;
  EXPECT_NE(CompareLedgers(planned, held).message().find("(batch)"), std::string::npos);
  held[Owner::kBatch] -= 1;
  EXPECT_TRUE(CompareLedgers(planned, held).ok());
  held[Owner::kUnaccounted] = int64_t{1} << 25;
  const absl::Status status = CompareLedgers(planned, held);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("(unaccounted)"), std::string::npos);
  EXPECT_NE(status.message().find("32.00 MiB\n"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace trireme
