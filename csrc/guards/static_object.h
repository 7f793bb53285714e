// Objects that are passed to a forward and hold tensors for it, such as a cache of keys and values.
#pragma once

#include "guards/effects.h"
#include "guards/guard.h"

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <memory>
#include <vector>

namespace graphcache {

// The object that the graphs of some signatures stand for at present. Known weakly, like its guard.
class StaticObject {
 public:
  // The guard holds as long as the object has the same contents.
  void bind(
      const pybind11::object& object,
      const std::shared_ptr<Guard>& guard,
      const std::vector<at::Tensor>& tensors,
      std::vector<Location> counters = {});
  void release();

  bool is(PyObject* object) const;
  // Returns true if that object may be passed to a graph; counts how often it was.
  bool serves(PyObject* object);
  pybind11::object object() const; // None once it is gone
  // The place of one of its counters; null where it has none of that number.
  const Location* counter(size_t index) const { return index < counters_.size() ? &counters_[index] : nullptr; }

  int64_t calls = 0;
  std::vector<c10::VariableVersion> versions; // of its tensors, in the order of the object

 private:
  pybind11::object reference_;
  std::weak_ptr<Guard> guard_;
  std::vector<Location> counters_; // in its dicts and lists, which the guard knows
};

// Memory that graphs were captured over, leased to one storage after another. The first one owned it. Later ones
// had memory of their own, which was freed when its bytes moved here.
class LeasedMemory {
 public:
  // Takes the memory of a storage, and leases it back.
  explicit LeasedMemory(const c10::Storage& storage);

  // Moves the bytes of another storage of the same size here and leases this memory to it: all of its views
  // follow. Only while the memory is not leased.
  void adopt(const c10::Storage& storage);

  bool is_leased() const;
  bool is_leased_to(const c10::Storage& storage) const;

 private:
  void lease(const c10::Storage& storage);

  c10::Storage owner_;
  std::shared_ptr<void> lease_; // shared by every lease
};

// Returns an alias of `tensor` that owns its memory and does not count as a lease of it.
at::Tensor owned(const at::Tensor& tensor);

} // namespace graphcache
