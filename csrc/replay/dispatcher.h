// The hot path: from the arguments of a call to its result, or to Python, which serves the misses.
#pragma once

#include "replay/bucket.h"
#include "call/signature.h"

#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace graphcache {

// The graphs of one signature, for one set of values that guards compare.
struct Entry {
  std::shared_ptr<PoolLock> lock;
  bool unpadded = false; // serves batches of exactly these sizes only
  int64_t last = 0; // the number of the last call that it served
  std::vector<std::shared_ptr<Bucket>> buckets; // by size, ascending
  pybind11::object eager; // the reason why it has no graphs and never will; null where it may

  Bucket* find(int64_t batch) const; // by size alone; null: there is none
};

// A graphed forward that this thread calls inside another's first call or capture is inlined.
bool set_inlining(bool on);
bool is_inlining();

// The parts of Python that the hot path asks.
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

  // Returns the result of the call; or `miss()`, where Python has to serve it.
  pybind11::object serve(PyObject* args, PyObject* kwargs, PyObject* instance);
  static pybind11::object miss();
  // Returns the reason why the call that was just missed runs eagerly for good, and counts the call. Returns
  // None where no reason is known, or another call was missed meanwhile.
  pybind11::object eager_reason(const pybind11::tuple& args, const pybind11::dict& kwargs);

  // Adds a signature, under today's modes.
  void add(
      std::vector<Parameter> parameters,
      std::vector<Leaf> leaves,
      std::vector<size_t> identities,
      pybind11::object training,
      std::shared_ptr<Entry> entry);
  void forget(const std::shared_ptr<Entry>& entry);

  int64_t calls = 0;
  std::unordered_map<int64_t, int64_t> batches; // calls, by rows

 private:
  // A call that Python has to serve, eagerly, for a known reason.
  struct Miss {
    std::vector<PyObject*> values; // its arguments: compared, never used
    std::shared_ptr<Entry> entry;
    int64_t batch;
  };

  // Serves a call whose guards hold; or returns `miss()`. The pool's lock is held.
  pybind11::object run(const Signature& signature, Bucket& bucket, const Leaves& leaves, int64_t batch);

  Surroundings surroundings_;
  bool has_training_;
  std::vector<std::shared_ptr<const Signature>> known_; // equal ones have entries with other guards
  size_t last_ = 0; // the one that served the last call: most likely it serves the next
  Miss missed_;
};

} // namespace graphcache
