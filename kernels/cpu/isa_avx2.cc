// The hot loops for x86-64-v3. Headers come before the target pragma, so that
// nothing shared with other files is compiled for more than the build's baseline.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/isa.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define TRIREME_ISA avx2
#define TRIREME_ISA_FACTORY Avx2Kernels
#include "kernels/cpu/isa_kernels-inl.h"
#endif
