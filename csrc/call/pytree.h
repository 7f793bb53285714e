// Nested arguments and results, as graphcache/call/pytree.py describes them: matched, and put together.
#pragma once

#include "guards/static_object.h"

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace graphcache {

// The tensors of one call, in the order of its layout. Borrowed from the arguments.
struct Leaves {
  c10::SmallVector<PyObject*, 16> objects;
  c10::SmallVector<const at::Tensor*, 16> tensors;
  c10::SmallVector<pybind11::object, 4> owned; // attributes that were made only to be read

  void add(PyObject* tensor);
  void clear();
};

struct Layout {
  enum Kind { Tensor, Constant, Object, List, Tuple, NamedTuple, Dict, Mapping, Fields };

  // Returns true if `value` is nested like this, with the same constants; adds its tensors to `leaves`.
  bool match(PyObject* value, Leaves& leaves) const;

  // Returns a new value with the next of `tensors` in the place of each tensor.
  pybind11::object build(std::vector<pybind11::object>::const_iterator& tensors) const;

  Kind kind = Tensor;
  pybind11::object type; // of a container
  std::vector<Layout> children;
  std::vector<pybind11::object> keys; // or names of fields
  pybind11::object extra; // a constant; the factory of a defaultdict; the keys of fields in a dictionary
  pybind11::object assemble; // puts containers together that C++ does not know
  std::shared_ptr<StaticObject> object; // whose object is passed or returned

 private:
  bool match_items(PyObject* value, Leaves& leaves) const;
  bool match_dict(PyObject* value, Leaves& leaves) const;
  bool match_mapping(PyObject* value, Leaves& leaves) const;
  bool match_fields(PyObject* value, Leaves& leaves) const;
};

} // namespace graphcache
