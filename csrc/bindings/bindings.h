// The names of graphcache._C._native, one function a group.
#pragma once

#include "call/pytree.h"

#include <torch/csrc/utils/pybind.h>

namespace graphcache {

namespace py = pybind11;
using namespace pybind11::literals;

// Raises a TypeError for anything else.
Leaves leaves_of(const py::list& tensors);

void bind_branches(py::module_& m);
void bind_buckets(py::module_& m);
void bind_calls(py::module_& m);
void bind_dispatch(py::module_& m);
void bind_guards(py::module_& m);
void bind_inputs(py::module_& m);
void bind_lanes(py::module_& m);
void bind_static_objects(py::module_& m);
void bind_tensors(py::module_& m);
void bind_tracing(py::module_& m);

} // namespace graphcache
