// The memory that the graphs of one signature write to besides their own.
#pragma once

#include "guards/static_object.h"
#include "tensors/extent.h"

#include <ATen/core/Tensor.h>

#include <memory>
#include <utility>
#include <vector>

namespace graphcache {

// Arguments are copied in before the graph runs. If one lies in memory that the graph mutates, eager would have
// read the new values.
struct MutatedMemory {
  std::vector<Extent> external; // storages that are mutated, at the addresses that guards compare
  std::vector<size_t> bound; // positions of the arguments that are mutated
  std::vector<size_t> copied_in; // and of those that are copied in
  // By which autograd finds out that a tensor that it saved was changed. A graph raises none of them itself.
  std::vector<c10::VariableVersion> versions = {};
  std::vector<size_t> versions_of_arguments = {};
  std::vector<std::pair<std::shared_ptr<StaticObject>, size_t>> versions_of_objects = {};

  // Adds a tensor whose version eager raises; it may be one of an object of `objects`, of another one later.
  void add_version(const at::Tensor& tensor, const std::vector<std::shared_ptr<StaticObject>>& objects);
  // Raises the versions as eager does.
  void raise_versions(at::ArrayRef<const at::Tensor*> arguments);

  bool overlaps(at::ArrayRef<const at::Tensor*> arguments) const;
};

} // namespace graphcache
