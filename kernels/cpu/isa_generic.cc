// The hot loops for any processor, and for Arm, where the baseline has all that is used.
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/isa.h"

#define TRIREME_ISA generic
#define TRIREME_ISA_FACTORY GenericKernels
#include "kernels/cpu/isa_kernels-inl.h"
