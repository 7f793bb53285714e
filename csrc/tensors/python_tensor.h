// torch's Python tensors, without the header that defines them: it is the slowest one to compile.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace graphcache {

// True for tensors, those of a subclass too. Runs no Python code.
bool is_tensor(PyObject* object);
// True for tensors and parameters, but none of a subclass.
bool is_exact_tensor(PyObject* object);
// `object`: a tensor.
const at::Tensor& tensor_in(PyObject* object);
// Returns a new reference.
PyObject* to_python(at::Tensor tensor);

} // namespace graphcache
