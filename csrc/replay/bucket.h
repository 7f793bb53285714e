// One captured size: copies its inputs, launches its graph and returns its result.
#pragma once

#include "guards/guard.h"
#include "guards/mutated_memory.h"
#include "replay/lane.h"
#include "replay/copy_in_node.h"
#include "replay/result.h"
#include "replay/input_copier.h"
#include "tensors/versions.h"

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace graphcache {

// The way to run a graph. Without `copier`, `copy_in` copies the inputs by torch calls; without `node`, the
// inputs are in the memory of the CPU; without `replay`, the node launches the graph.
struct Launch {
  std::shared_ptr<InputCopier> copier;
  std::shared_ptr<CopyInNode> node;
  pybind11::object copy_in; // (tensors, batch)
  pybind11::object replay; // ()
};

// Dependencies of a graph besides the arguments of its calls.
struct Dependencies {
  // Weakly: it refers to what may lead back here, and only Python's own reference shows that to Python's
  // cycle collector.
  std::weak_ptr<Guard> guard;
  std::shared_ptr<MutatedMemory> mutated;

  // Returns true if all values are as they were captured.
  bool guard_passes(bool grad) const {
    const auto locked = guard.lock();
    return locked != nullptr && locked->check(grad);
  }
};

class Bucket {
 public:
  Bucket(
      const std::string& name,
      int64_t size,
      std::shared_ptr<Lane> lane,
      Launch launch,
      Result result,
      Dependencies dependencies)
      : name(std::make_shared<const std::string>(name)),
        size(size),
        lane(std::move(lane)),
        result(std::move(result)),
        dependencies(std::move(dependencies)),
        launch_(std::move(launch)) {}

  // Serves call number `call`. The pool's lock is held, and the lane follows `stream`.
  // Without `repeat` the effects on Python values are left out, and their tensors come with the result.
  pybind11::object run(
      const Leaves& arguments, int64_t batch, int64_t call, int64_t stream, bool repeat = true);

  // Null where its inputs are copied otherwise.
  const CopyInNode* node() const { return launch_.node.get(); }

  const std::shared_ptr<const std::string> name;
  const int64_t size;
  const std::shared_ptr<Lane> lane;
  Result result;
  const Dependencies dependencies;

  // Releases its graph: Python serves such calls eagerly from here on.
  void retire() { launch_ = Launch{}; retired = true; }

  bool retired = false;
  // Return true if calls of `batch` rows, fewer than `size`, were compared with eager, and nothing that
  // `versions` count was written since.
  bool is_proved(int64_t batch) const {
    return !proved_.empty() && proved_[static_cast<size_t>(batch)] &&
        (versions == nullptr || versions->sum() == proved_at_);
  }
  void prove(int64_t batch);
  bool serves(int64_t batch) const { return batch == size || (check_budget > 0 && is_proved(batch)); }
  // Returns true if a call needs nothing of Python: no comparison, and no measurement.
  bool is_ready(int64_t batch) const { return serves(batch) && replays < time_at && !retired; }

  std::shared_ptr<Versions> versions; // of what the graph reads; null where no write matters
  int64_t check_budget = 0; // how many padded calls it may serve until one is compared with eager
  int64_t time_at = std::numeric_limits<int64_t>::max(); // replays after which Python times it
  int64_t replays = 0;
  int64_t padded_rows = 0;
  Invalidated invalidated; // by replays

 private:
  void take_replaced(const Effects& effects, Effects::Found& places) const;
  void put_back_replaced(const Effects& effects, const Effects::Found& places, const Origin& origin) const;
  size_t room() const; // held outputs that the graph can copy out itself
  void start(
      const Leaves& arguments, int64_t batch, const Origin& origin, int64_t stream, bool lets_others_run);

  Launch launch_;
  std::vector<bool> proved_; // by batch; empty until the first one
  int64_t proved_at_ = 0; // the sum of the versions then
  bool unpatched_ = true; // the node lacks the recorded parameters
};

} // namespace graphcache
