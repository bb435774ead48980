// Stands where libtrireme_cuda.so would: of this program's build, or of another.
#include "kernels/module_identity.h"

extern "C" const char* trireme_cuda_identity() {
#if defined(TRIREME_OTHER_BUILD)
  return "0123456789ab";
#else
  return TRIREME_MODULE_IDENTITY;
#endif
}
