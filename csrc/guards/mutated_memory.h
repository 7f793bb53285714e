// The memory that the graphs of one signature write to besides their own.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace graphcache {

// Arguments are copied in before the graph runs. If one lies in memory that the graph mutates, eager would have
// read the new values.
struct MutatedMemory {
  std::vector<at::Tensor> external; // their storages are mutated
  std::vector<size_t> bound; // positions of the arguments that are mutated
  std::vector<size_t> copied_in; // and of those that are copied in

  bool overlaps(at::ArrayRef<const at::Tensor*> arguments) const;
};

} // namespace graphcache
