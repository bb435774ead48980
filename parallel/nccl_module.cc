#include "parallel/nccl_module.h"

#include "kernels/cuda_module.h"
#include "kernels/status.h"

namespace trireme {

absl::StatusOr<NcclIds> MakeNcclIds() {
  ASSIGN_OR_RETURN(void* const function, CudaModuleFunction("trireme_nccl_ids"));
  absl::StatusOr<NcclIds> ids = absl::UnknownError("not made");
  reinterpret_cast<void (*)(absl::StatusOr<NcclIds>*)>(function)(&ids);
  return ids;
}

absl::StatusOr<std::unique_ptr<PeerMemory>> NewCudaPeerMemory(Device& device) {
  using Result = absl::StatusOr<std::unique_ptr<PeerMemory>>;
  ASSIGN_OR_RETURN(void* const function, CudaModuleFunction("trireme_peer_memory"));
  Result memory = absl::UnknownError("not made");
  reinterpret_cast<void (*)(Device*, Result*)>(function)(&device, &memory);
  return memory;
}

absl::StatusOr<std::unique_ptr<Communicator>> NewNcclCommunicator(const NcclGroup& group,
                                                                  Device& device) {
  using Result = absl::StatusOr<std::unique_ptr<Communicator>>;
  ASSIGN_OR_RETURN(void* const function, CudaModuleFunction("trireme_nccl_communicator"));
  Result communicator = absl::UnknownError("not made");
  reinterpret_cast<void (*)(const NcclGroup*, Device*, Result*)>(function)(&group, &device,
                                                                           &communicator);
  return communicator;
}

}  // namespace trireme
