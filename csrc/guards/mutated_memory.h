// What the graphs of one signature write besides their own memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace graphcache {

// A staged argument is copied before the graph runs. If it lies in memory that the graph writes, eager would
// have read what was written meanwhile.
class MutatedMemory {
 public:
  // `outside`: tensors whose storages are written to; `bound`, `staged`: positions of the arguments that are
  // written to, and of those that are copied.
  MutatedMemory(std::vector<at::Tensor> outside, std::vector<size_t> bound, std::vector<size_t> staged)
      : outside_(std::move(outside)), bound_(std::move(bound)), staged_(std::move(staged)) {}

  bool overlaps(at::ArrayRef<const at::Tensor*> arguments) const;

 private:
  std::vector<at::Tensor> outside_;
  std::vector<size_t> bound_;
  std::vector<size_t> staged_;
};

} // namespace graphcache
