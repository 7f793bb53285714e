// The calls that one signature serves. graphcache/call/signature.py reads what this one does not match.
#pragma once

#include "call/modes.h"
#include "call/pytree.h"

#include <c10/core/Device.h>

#include <memory>
#include <optional>
#include <vector>

namespace graphcache {

// One argument of the forward, in the order of its parameters.
struct Parameter {
  Layout layout;
  int64_t position; // among the positional arguments; -1: none
  pybind11::object name; // null: it can't be given by name
  bool ordered; // lands in **kwargs, which keeps the caller's order
  // Its default, which anybody may replace: of this function, known weakly, by number from the end or by name.
  // Null: none.
  pybind11::object function;
  pybind11::object default_key;

  PyObject* fallback() const; // borrowed; null: none
};

// The role of one tensor.
struct Leaf {
  enum Role { Batched, Whole, Bound };

  // `example`: a Python tensor.
  Leaf(
      Role role,
      int64_t batch_dim,
      bool carries_batch,
      bool must_be_weak,
      std::vector<int64_t> pattern,
      std::vector<int64_t> exact,
      std::optional<bool> inference,
      PyObject* example);
  bool matches(PyObject* object, const at::Tensor& tensor, int64_t batch, bool grad) const;

  Role role;
  int64_t batch_dim; // where the batch would lie; -1: it has too few dimensions
  bool carries_batch; // that dimension is as long as the batch
  bool must_be_weak; // too large to be copied in, unless it is the output of a graph
  std::vector<int64_t> pattern; // see stride_pattern
  std::vector<int64_t> exact; // strides and the storage offset, -1: any; empty: all are any
  std::optional<bool> inference; // an inference tensor; nothing: either
  PyTypeObject* type; // Tensor or Parameter
  uint64_t keys; // dispatch keys: layout, backend, conjugate and negative bits
  caffe2::TypeMeta dtype;
  c10::Device device;
  bool requires_grad;
  bool is_leaf;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides; // Bound: exactly these
  const void* address;

 private:
  bool matches_strides(const at::Tensor& tensor) const;
};

struct Entry;

class Signature {
 public:
  Signature(
      std::vector<Parameter> parameters,
      std::vector<Leaf> leaves,
      std::vector<size_t> identities,
      pybind11::object training,
      Modes modes,
      std::shared_ptr<Entry> entry);

  // Returns true if a call is of this signature; sets its tensors and its batch.
  bool match(
      PyObject* args,
      PyObject* kwargs,
      PyObject* training,
      const Modes& modes,
      Leaves& leaves,
      int64_t& batch) const;

  const c10::Device& device() const { return leaves_.front().device; }
  bool grad() const { return modes_.grad; }
  const std::shared_ptr<Entry> entry; // its graphs

 private:
  bool match_parameters(PyObject* args, PyObject* kwargs, Leaves& leaves) const;
  bool match_order(PyObject* kwargs) const;
  bool match_identities(const Leaves& leaves) const;

  std::vector<Parameter> parameters_;
  std::vector<PyObject*> ordered_; // names that land in **kwargs; the parameters own them
  std::vector<Leaf> leaves_;
  std::vector<size_t> identities_; // for each leaf, the first that is the same tensor
  size_t distinct_; // how many tensors those are
  pybind11::object training_;
  Modes modes_;
  size_t batch_leaf_ = 0; // whose length is the batch
  Py_ssize_t positional_ = 0;
};

} // namespace graphcache
