#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

// Importing this module registers torch.ops.fdfa (ops/schema.cpp); to Python it gives only what was
// built and what it runs on.
PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = FDFA_TORCH_VERSION;
  m.attr("cuda_version") = FDFA_CUDA_VERSION;  // empty: built for the CPU alone
  m.attr("cuda_architectures") = FDFA_CUDA_ARCHITECTURES;
  m.def("cpu_isa", &fdfa::cpu::isa);
}
