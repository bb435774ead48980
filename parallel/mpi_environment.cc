#include "parallel/mpi_environment.h"

#include <mpi.h>

#include <cstdlib>
#include <string>

namespace trireme {
namespace {

void SetDefault(const char* name, const char* value) { setenv(name, value, /*overwrite=*/0); }

// Open MPI 5 calls the shared-memory transport `sm`; in 4 that name only prints that it is gone.
#if defined(OMPI_MAJOR_VERSION) && OMPI_MAJOR_VERSION >= 5
constexpr char kTransports[] = "self,sm,tcp";
#else
constexpr char kTransports[] = "self,vader,tcp";
#endif

}  // namespace

void PrepareMpiEnvironment() {
  // Without these two, probing UCX and libfabric costs 200 ms.
  SetDefault("OMPI_MCA_pml", "ob1");
  SetDefault("OMPI_MCA_btl", kTransports);
  // A waiting rank yields its core: over-subscribed, an all-reduce takes 10 us instead of 8 ms.
  SetDefault("OMPI_MCA_mpi_yield_when_idle", "1");
  // Started by hand, without mpirun or srun: a group of one needs no daemon of its own.
  const bool launched =
      std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMIX_RANK") != nullptr;
  if (!launched) SetDefault("OMPI_MCA_ess_singleton_isolated", "1");
}

void LetNcclShareGpus(int rank) {
  setenv("NCCL_HOSTID", ("trireme-rank-" + std::to_string(rank)).c_str(), /*overwrite=*/1);
  SetDefault("NCCL_NET", "Socket");
  SetDefault("NCCL_IB_DISABLE", "1");
  SetDefault("NCCL_SOCKET_IFNAME", "lo");
  SetDefault("NCCL_MNNVL_ENABLE", "0");
  SetDefault("NCCL_NVLS_ENABLE", "0");
  SetDefault("NCCL_RAS_ENABLE", "0");
  // Few blocks, so that the kernels of two ranks fit on the GPU side by side.
  SetDefault("NCCL_ALGO", "Ring");
  SetDefault("NCCL_PROTO", "Simple");
  SetDefault("NCCL_MAX_CTAS", "2");
}

}  // namespace trireme
