#include "tensors/python_tensor.h"

#include <torch/csrc/autograd/python_variable.h>

namespace graphcache {

bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

bool is_exact_tensor(PyObject* object) {
  return THPVariable_CheckExact(object);
}

const at::Tensor& tensor_in(PyObject* object) {
  return THPVariable_Unpack(object);
}

PyObject* to_python(at::Tensor tensor) {
  return THPVariable_Wrap(std::move(tensor));
}

} // namespace graphcache
