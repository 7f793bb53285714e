// The result of a replay: new tensors over the memory of the graph, cut back to the caller's batch.
#pragma once

#include "replay/lane.h"
#include "call/pytree.h"
#include "tensors/weak.h"

#include <memory>
#include <vector>

namespace graphcache {

struct Output {
  enum Kind {
    Pool, // in memory of the graph
    External, // the very tensor that the forward found outside
    ExternalView, // a view of memory that the forward found outside
    Argument, // an argument itself
    ArgumentView, // a view of one
    Constant, // on the host: each caller gets a copy
  };
  Kind kind;
  at::Tensor tensor; // as captured; of a view of an argument, the offset counts from that
  pybind11::object object; // the same, for those that are returned as they are
  int64_t argument; // of those in the pool, the one that it copies a view of
  std::vector<int64_t> batch_dims;
};

class Result {
 public:
  Result(Layout layout, std::vector<Output> outputs, bool copy);

  void set_batch_dims(const std::vector<std::vector<int64_t>>& dims);

  // Returns the result for `batch` of `size` rows. The lane tracks the outputs that the caller now shares.
  pybind11::object give(
      int64_t batch, int64_t size, const Leaves& arguments, const Origin& made_by, Lane& lane);

 private:
  pybind11::object tensor(
      size_t index, int64_t batch, int64_t size, const Leaves& arguments) const;
  at::Tensor part(size_t index, at::IntArrayRef sizes) const; // of memory of the graph
  at::Tensor cut(size_t index, int64_t batch) const;

  Layout layout_;
  std::vector<Output> outputs_;
  std::vector<Metadata> metadata_;
  std::vector<int> groups_; // for each output in the pool, its storage in `first_`
  std::vector<c10::Storage> first_;
  std::vector<pybind11::object> made_; // scratch
  // Not the graph's own storages: those of the caller can expire while the graph goes on.
  std::shared_ptr<SharedOutputs> shared_;
};

} // namespace graphcache
