// The hot path: from the arguments of a call to its result, or to Python, which serves what misses.
#pragma once

#include "replay/bucket.h"
#include "guards/guard.h"
#include "call/signature.h"
#include "guards/mutated_memory.h"

#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace graphcache {

// The graphs of one signature.
struct Entry {
  std::shared_ptr<PoolLock> lock;
  // Weakly: it refers to what may lead back here, and only Python's own reference shows that to Python's
  // cycle collector.
  std::weak_ptr<Guard> guard;
  std::shared_ptr<const MutatedMemory> mutated;
  bool exact = false; // batches of exactly these sizes only
  int64_t last = 0; // the number of the last call that it served
  std::vector<std::shared_ptr<Bucket>> buckets; // by size, ascending
  pybind11::object eager; // why it has none and never will; null where it may

  Bucket* find(int64_t batch) const;
};

// A graphed forward that this thread calls inside another's first call or capture is inlined.
bool set_inlining(bool on);
bool is_inlining();

// What the hot path asks Python for.
struct Surroundings {
  pybind11::object disabled; // context variables
  pybind11::object emulated;
  pybind11::object device_mode; // the type of torch's mode behind set_default_device
  pybind11::object capturing; // () -> bool, where the driver can't be asked
};

class Dispatcher {
 public:
  // `has_training`: calls come with an instance whose `training` is part of the signature.
  Dispatcher(Surroundings surroundings, bool has_training)
      : surroundings_(std::move(surroundings)), has_training_(has_training) {}

  // The result of the call; or `miss()`, where Python has to serve it.
  pybind11::object serve(PyObject* args, PyObject* kwargs, PyObject* instance);
  static pybind11::object miss();
  // Why such a call runs eagerly for good, and counts it; None where that is not known.
  pybind11::object why_eager(PyObject* args, PyObject* kwargs, PyObject* instance);

  // Adds a signature, under today's modes.
  void add(
      std::vector<Parameter> parameters,
      std::vector<Leaf> leaves,
      std::vector<size_t> same,
      pybind11::object training,
      std::shared_ptr<Entry> entry);
  void forget(const std::shared_ptr<Entry>& entry);
  size_t signatures() const { return known_.size(); }

  int64_t calls = 0;
  std::unordered_map<int64_t, int64_t> batches; // how many calls had so many rows

 private:
  // The signature of a call, its tensors and its batch; null where there is none.
  std::shared_ptr<const Signature> find(
      PyObject* args, PyObject* kwargs, PyObject* instance, Leaves& leaves, int64_t& batch);
  pybind11::object run(const Signature& signature, const Leaves& leaves, int64_t batch);

  Surroundings surroundings_;
  bool has_training_;
  std::vector<std::shared_ptr<const Signature>> known_;
  size_t last_ = 0; // the signature of the last call: most likely that of the next
};

} // namespace graphcache
