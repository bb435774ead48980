// What the NCCL communicator reserves, over doubles of CUDA's library and of NCCL: memory that one
// rank lacks is its status, told without a call that the others would wait in.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/peer_sum.h"
#include "kernels/cuda/rank_sum.h"
#include "parallel/nccl/nccl_api.h"
#include "parallel/nccl_module.h"
#include "parallel/peer_memory.h"
#include "tests/host_cuda/cuda_runtime_double.h"
#include "tests/parallel/world.h"

extern "C" void trireme_nccl_communicator(
    const trireme::NcclGroup* group, trireme::Device* device,
    absl::StatusOr<std::unique_ptr<trireme::Communicator>>* communicator);
extern "C" void trireme_peer_memory(trireme::Device* device,
                                    absl::StatusOr<std::unique_ptr<trireme::PeerMemory>>* memory);

namespace trireme {
namespace {

int g_ranks = 1;        // of the group that is joined
int g_collectives = 0;  // calls of NCCL

ncclComm_t Handle() {
  static int memory;
  return reinterpret_cast<ncclComm_t>(&memory);
}

// All ranks bring what this one does.
NcclApi NcclDouble() {
  NcclApi api{};
  api.GetErrorString = [](ncclResult_t) { return "an error"; };
  api.GetLastError = [](ncclComm_t) { return ""; };
  api.CommInitRank = [](ncclComm_t* comm, int ranks, ncclUniqueId, int) {
    *comm = Handle();
    g_ranks = ranks;
    return ncclSuccess;
  };
  api.CommDestroy = [](ncclComm_t) { return ncclSuccess; };
  api.CommAbort = [](ncclComm_t) { return ncclSuccess; };
  api.CommGetAsyncError = [](ncclComm_t, ncclResult_t* state) {
    *state = ncclSuccess;
    return ncclSuccess;
  };
  api.AllReduce = [](const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                     cudaStream_t) {
    ++g_collectives;
    return ncclSuccess;
  };
  api.AllGather = [](const void* in, void* out, size_t bytes, ncclDataType_t, ncclComm_t,
                     cudaStream_t) {
    ++g_collectives;
    for (int r = 0; r < g_ranks; ++r)
      std::memcpy(static_cast<char*>(out) + static_cast<size_t>(r) * bytes, in, bytes);
    return ncclSuccess;
  };
  return api;
}

constexpr int64_t kLargest = 1 << 20;

class NcclReserveTest : public ::testing::Test {
 protected:
  NcclReserveTest() {
    runtime_ = {};
    g_collectives = 0;
    device_ = cuda::OpenCudaDevice({.name = "cuda"}).value();
  }
  ~NcclReserveTest() override { runtime_ = {}; }

  std::unique_ptr<Communicator> Join(int rank, int size, std::shared_ptr<PeerMapping> peers) {
    const std::vector<NcclIds> ids(size);
    const NcclGroup group{.rank = rank, .size = size, .ids = ids.data(), .peers = std::move(peers)};
    absl::StatusOr<std::unique_ptr<Communicator>> made;
    trireme_nccl_communicator(&group, device_.get(), &made);
    return std::move(made).value();
  }
  // While CUDA has no memory.
  absl::Status ReserveWithout(Communicator& comm) {
    runtime_.allocation = cudaErrorMemoryAllocation;
    const absl::Status status = comm.Reserve(kLargest);
    runtime_.allocation = cudaSuccess;
    return status;
  }
  static void ExpectLacks(const absl::Status& status, int64_t bytes) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(std::string(status.message())
                  .find("communicator, for sums between ranks: cuda:0 double: no memory for " +
                        std::to_string(bytes) + " bytes; "),
              0u)
        << status;
  }

  CudaRuntimeDouble& runtime_ = TheCudaRuntimeDouble();
  std::unique_ptr<Device> device_;
};

TEST_F(NcclReserveTest, PartsOfSumsThatDoNotFitAreAStatus) {
  const auto comm = Join(/*rank=*/1, /*size=*/3, nullptr);
  constexpr int64_t kPiece = (kLargest / 3 + 4) / 4 * 4;  // of a rank, at whole items
  ExpectLacks(ReserveWithout(*comm), 3 * kPiece);
  EXPECT_EQ(comm->buffer_bytes(), 0);
  ASSERT_TRUE(comm->Reserve(kLargest).ok());
  EXPECT_EQ(comm->buffer_bytes(), 3 * kPiece);
  comm->ChooseSums(kLargest);
  EXPECT_EQ(comm->buffer_bytes(), 3 * kPiece);
  EXPECT_EQ(g_collectives, 0) << "there was nothing to find out";
}

TEST_F(NcclReserveTest, MemoryToTrySumsOverPeersInIsTakenBeforeRanksMeet) {
  const int size = World().size(), rank = World().rank();
  std::vector<int> members(size);
  std::iota(members.begin(), members.end(), 0);
  auto mapped = PeerMapping::Create(World(), members, [this] {
    absl::StatusOr<std::unique_ptr<PeerMemory>> memory;
    trireme_peer_memory(device_.get(), &memory);
    return memory;
  });
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const std::shared_ptr<PeerMapping> peers = *std::move(mapped);
  {
    const auto comm = Join(rank, size, peers);
    const int64_t before = comm->buffer_bytes();
    if (rank == size - 1) {
      ExpectLacks(ReserveWithout(*comm), kLargest);
      EXPECT_EQ(comm->buffer_bytes(), before);
    }
    ASSERT_TRUE(comm->Reserve(kLargest).ok());
    EXPECT_EQ(comm->buffer_bytes(), before + 2 * kLargest);
    EXPECT_EQ(g_collectives, 0);
    comm->ChooseSums(kLargest);
    EXPECT_GT(g_collectives, 0);
    EXPECT_EQ(comm->buffer_bytes(), before) << "what only a trial needs is given back";
    EXPECT_EQ(comm->DescribeSums().find("sums over peer memory: up to "), 0u);
  }
  World().Barrier();
}

}  // namespace

absl::StatusOr<const NcclApi*> OpenNccl() {
  static const NcclApi api = NcclDouble();
  return &api;
}
absl::Status NcclStatus(const NcclApi&, ncclResult_t result, const char* what) {
  return result == ncclSuccess ? absl::OkStatus() : absl::UnavailableError(what);
}

// The kernels: sums of what is the same on all ranks, which nobody looks at.
namespace cuda {
void RankSum(gpu::StreamHandle, DType, const void*, int64_t, int, int64_t, void*) {}
PeerRows RowsOfSum(DType, int64_t elements, int ranks) {
  return {1, elements, (elements + ranks - 1) / ranks};
}
PeerRows RowsOfNorm(DType, int64_t rows, int64_t width, int ranks) {
  return {rows, width, (width + ranks - 1) / ranks};
}
int64_t PeerBytes(PeerPath, DType, const PeerRows&, int) { return 0; }
void PeerSum(gpu::StreamHandle, const PeerGroup&, PeerPath, TensorView) {}
void PeerSumAddNorm(gpu::StreamHandle, const PeerGroup&, PeerPath, TensorView, TensorView,
                    const NormParams&, TensorView) {}
}  // namespace cuda

}  // namespace trireme
