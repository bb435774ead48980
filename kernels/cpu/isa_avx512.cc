// The hot loops for x86-64-v4. kernels/CMakeLists.txt gives this file its -m flags, so it may
// use nothing from headers that would leave code behind for other files to share.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/isa.h"

#define TRIREME_ISA avx512
#define TRIREME_ISA_FACTORY Avx512Kernels
#include "kernels/cpu/isa_kernels-inl.h"
#endif
