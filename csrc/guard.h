#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace fdfa {

// Whether Python objects still are what they were when they were first looked at.
//
// Compared are identities, so no user code is called. A step asks for some twenty facts of
// each module, which are a few loads each here and a call each in Python.
class Guard {
 public:
  void watch_type(pybind11::object owner) {
    add(Kind::type, owner, pybind11::none(), pybind11::type::of(owner));
  }

  // owner.name, which must be one and the same object at each look: no bound method.
  void watch_attribute(pybind11::object owner, pybind11::str name) {
    add(Kind::attribute, owner, name, pybind11::getattr(owner, name));
  }

  // entries.get(name)
  void watch_entry(pybind11::dict entries, pybind11::str name) {
    add(Kind::entry, entries, name, entries.attr("get")(name));
  }

  // Keys and values, in their order.
  void watch_contents(pybind11::dict entries) {
    std::vector<pybind11::object> seen;
    for (const auto& [key, value] : entries) {
      seen.push_back(pybind11::reinterpret_borrow<pybind11::object>(key));
      seen.push_back(pybind11::reinterpret_borrow<pybind11::object>(value));
    }
    contents_.emplace_back(std::move(entries), std::move(seen));
  }

  bool holds() const {
    for (const Fact& fact : facts_) {
      if (!same(fact)) return false;
    }
    for (const auto& [entries, seen] : contents_) {
      if (!same_contents(entries.ptr(), seen)) return false;
    }
    return true;
  }

  // For Python's garbage collector: what is watched may lead back to the guard, by a hook say.
  int traverse(visitproc visit, void* arg) const {
    for (const Fact& fact : facts_) {
      Py_VISIT(fact.owner.ptr());
      Py_VISIT(fact.name.ptr());
      Py_VISIT(fact.value.ptr());
    }
    for (const auto& [entries, seen] : contents_) {
      Py_VISIT(entries.ptr());
      for (const auto& object : seen) Py_VISIT(object.ptr());
    }
    return 0;
  }

  void clear() {
    // Letting go may run code that looks at the guard.
    const auto facts = std::exchange(facts_, {});
    const auto contents = std::exchange(contents_, {});
  }

 private:
  enum class Kind { type, attribute, entry };

  struct Fact {
    Kind kind;
    pybind11::object owner, name, value;
  };

  void add(Kind kind, pybind11::object owner, pybind11::object name, pybind11::object value) {
    facts_.push_back({kind, std::move(owner), std::move(name), std::move(value)});
  }

  static bool same(const Fact& fact) {
    PyObject* owner = fact.owner.ptr();
    PyObject* value = fact.value.ptr();
    if (fact.kind == Kind::type) return reinterpret_cast<PyObject*>(Py_TYPE(owner)) == value;
    if (fact.kind == Kind::entry) {
      PyObject* found = PyDict_GetItemWithError(owner, fact.name.ptr());
      return found == value || (found == nullptr && value == Py_None);
    }
    PyObject* found = PyObject_GetAttr(owner, fact.name.ptr());
    if (found == nullptr) PyErr_Clear();
    const bool equal = found == value;
    Py_XDECREF(found);
    return equal;
  }

  static bool same_contents(PyObject* entries, const std::vector<pybind11::object>& seen) {
    if (PyDict_GET_SIZE(entries) * 2 != static_cast<Py_ssize_t>(seen.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (size_t i = 0; PyDict_Next(entries, &position, &key, &value); i += 2) {
      if (key != seen[i].ptr() || value != seen[i + 1].ptr()) return false;
    }
    return true;
  }

  std::vector<Fact> facts_;
  std::vector<std::pair<pybind11::dict, std::vector<pybind11::object>>> contents_;
};

}  // namespace fdfa
