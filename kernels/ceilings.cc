#include "kernels/ceilings.h"

#include "kernels/cpu/ceilings.h"
#include "kernels/cuda_module.h"
#include "kernels/status.h"

namespace trireme {

absl::StatusOr<Ceilings> MeasureCeilings(Stream& stream) {
  if (stream.device().spec().host_memory) return MeasureCpuCeilings(stream);
  ASSIGN_OR_RETURN(void* const function, CudaModuleFunction("trireme_cuda_ceilings"));
  absl::StatusOr<Ceilings> ceilings = absl::UnknownError("not measured");
  reinterpret_cast<void (*)(Stream*, absl::StatusOr<Ceilings>*)>(function)(&stream, &ceilings);
  return ceilings;
}

}  // namespace trireme
