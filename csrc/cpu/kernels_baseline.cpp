#include "cpu/kernels_includes.h"

#define FDFA_ISA baseline
#define FDFA_VECTOR_BYTES 16
#include "cpu/kernels.inl"
