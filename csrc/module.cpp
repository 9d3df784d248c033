#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "guard.h"

// Importing this module registers torch.ops.fdfa (ops/schema.cpp). To Python it gives what was built,
// what it runs on, and the guard of fdfa_ext/plan.py.
PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = FDFA_TORCH_VERSION;
  m.attr("cuda_version") = FDFA_CUDA_VERSION;  // empty: built for the CPU alone
  m.attr("cuda_architectures") = FDFA_CUDA_ARCHITECTURES;
  m.def("cpu_isa", &fdfa::cpu::isa);
  pybind11::class_<fdfa::Guard>(m, "Guard")
      .def(pybind11::init<>())
      .def("watch_type", &fdfa::Guard::watch_type)
      .def("watch_attribute", &fdfa::Guard::watch_attribute)
      .def("watch_entry", &fdfa::Guard::watch_entry)
      .def("watch_contents", &fdfa::Guard::watch_contents)
      .def("holds", &fdfa::Guard::holds);
}
