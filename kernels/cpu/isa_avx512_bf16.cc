// The hot loops for x86-64-v4 with bf16 dot products. Headers come before the target pragma, so that
// nothing shared with other files is compiled for more than the build's baseline.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/isa.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define TRIREME_ISA avx512_bf16
#define TRIREME_ISA_FACTORY Avx512Bf16Kernels
#include "kernels/cpu/isa_kernels-inl.h"
#endif
