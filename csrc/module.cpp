#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "dual.h"
#include "guard.h"

namespace {

// Null while Python is still making it.
fdfa::Guard* guard_of(PyObject* self) {
  auto* instance = reinterpret_cast<pybind11::detail::instance*>(self);
  const bool made = instance->get_value_and_holder().holder_constructed();
  return made ? pybind11::cast<fdfa::Guard*>(pybind11::handle(self)) : nullptr;
}

void collect_guards(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const fdfa::Guard* guard = guard_of(self);
    return guard == nullptr ? 0 : guard->traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (fdfa::Guard* guard = guard_of(self)) guard->clear();
    return 0;
  };
}

}  // namespace

// Importing this module registers torch.ops.fdfa (ops/schema.cpp). To Python it gives what was built,
// what it runs on, dual tensors, and the guard of fdfa_ext/plan.py.
PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = FDFA_TORCH_VERSION;
  m.attr("cuda_version") = FDFA_CUDA_VERSION;  // empty: built for the CPU alone
  m.attr("cuda_architectures") = FDFA_CUDA_ARCHITECTURES;
  m.def("cpu_isa", &fdfa::cpu::isa);
  m.def("has_tangent", &fdfa::has_tangent);
  m.def("unpack_dual", &fdfa::unpack_dual);
  m.def("make_dual", &fdfa::make_dual);
  m.def("make_dual_of_fresh", &fdfa::make_dual_of_fresh);
  m.def("dual_output_layer", &fdfa::dual_output_layer);
  pybind11::class_<fdfa::Guard>(m, "Guard", pybind11::custom_type_setup(collect_guards))
      .def(pybind11::init<>())
      .def("watch_type", &fdfa::Guard::watch_type)
      .def("watch_attribute", &fdfa::Guard::watch_attribute)
      .def("watch_entry", &fdfa::Guard::watch_entry)
      .def("watch_contents", &fdfa::Guard::watch_contents)
      .def("holds", &fdfa::Guard::holds);
}
