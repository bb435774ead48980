// The hot loops for any processor. Headers come before the target pragma, so that
// nothing shared with other files is compiled for more than the build's baseline.
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/isa.h"

#define TRIREME_ISA generic
#define TRIREME_ISA_FACTORY GenericKernels
#include "kernels/cpu/isa_kernels-inl.h"
