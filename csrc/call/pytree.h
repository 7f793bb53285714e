// Nested arguments and results, as graphcache/pytree.py lays them out: matched, and put together.
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

class Tree {
 public:
  // `layout`: (kind, type, keys, children, extra), see `tree.native`.
  explicit Tree(const pybind11::handle& layout);

  // Tells whether `value` is nested like this, with the same constants; adds its tensors to `leaves`.
  bool match(PyObject* value, Leaves& leaves) const;

  // Returns a new value with the next of `tensors` in each place.
  pybind11::object build(std::vector<pybind11::object>::const_iterator& tensors) const;

 private:
  enum Kind { Slot, Constant, List, Tuple, Dict, NamedTuple, Fields, Mapping, ObjectRef };

  bool match_fields(PyObject* value, Leaves& leaves) const;
  bool match_mapping(PyObject* value, Leaves& leaves) const;

  Kind kind_;
  pybind11::object type_;
  std::vector<pybind11::object> keys_;
  std::vector<Tree> children_;
  pybind11::object extra_; // of a constant, its value; else what pytree.py keeps beside the children
  std::shared_ptr<StaticObject> object_; // whose object is passed or returned
  pybind11::object make_; // puts containers together that C++ does not know
};

} // namespace graphcache
