// One captured size: staged, launched, and its result handed out.
#pragma once

#include "replay/lane.h"
#include "replay/copy_in_node.h"
#include "replay/result.h"
#include "replay/input_copier.h"

#include <limits>
#include <memory>
#include <string>

namespace graphcache {

// How a graph is reached. Without `stage`, `fill` copies the inputs by torch calls; without `node`, the
// inputs are in the memory of the CPU; without `replay`, the node launches the graph.
struct Launch {
  std::shared_ptr<InputCopier> stage;
  std::shared_ptr<CopyInNode> node;
  pybind11::object fill; // (tensors, batch)
  pybind11::object replay; // ()
};

class Bucket {
 public:
  Bucket(
      std::shared_ptr<const std::string> name,
      int64_t size,
      std::shared_ptr<Lane> lane,
      Launch launch,
      Result result);

  // Serves call number `call`. The pool's lock is held, and the lane follows `stream`.
  pybind11::object run(const Leaves& arguments, int64_t batch, int64_t call, int64_t stream);

  // Its staging node, if it has one.
  const CopyInNode* node() const { return launch_.node.get(); }

  const std::shared_ptr<const std::string> name;
  const int64_t size;
  const std::shared_ptr<Lane> lane;
  Result result;

  // Lets go of its graph: Python serves such calls eagerly from here on.
  void retire() { launch_ = Launch{}; retired = true; }

  bool retired = false;
  int64_t check_budget = 0; // how many padded calls it may serve until one is compared with eager
  int64_t time_at = std::numeric_limits<int64_t>::max(); // replays after which Python times it
  int64_t replays = 0;
  int64_t padded_rows = 0;
  Invalidated invalidated; // by replays

 private:
  void start(const Leaves& arguments, int64_t batch, const Origin& origin, int64_t stream);

  Launch launch_;
  bool unpatched_ = true; // the node does not hold yet what the stage has read
};

} // namespace graphcache
