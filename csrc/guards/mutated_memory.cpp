#include "guards/mutated_memory.h"

#include "tensors/extent.h"

#include <algorithm>

namespace graphcache {
namespace {

Extent whole_storage(const at::Tensor& tensor) {
  const auto* data = static_cast<const char*>(tensor.storage().data());
  return {data, data + tensor.storage().nbytes()};
}

} // namespace

bool MutatedMemory::overlaps(at::ArrayRef<const at::Tensor*> arguments) const {
  if (external.empty() && bound.empty()) {
    return false;
  }
  return std::any_of(copied_in.begin(), copied_in.end(), [&](size_t copied) {
    const auto read = extent_of(*arguments[copied]);
    return std::any_of(
               external.begin(),
               external.end(),
               [&](const at::Tensor& tensor) { return read.overlaps(whole_storage(tensor)); }) ||
        std::any_of(bound.begin(), bound.end(), [&](size_t index) {
             return read.overlaps(extent_of(*arguments[index]));
           });
  });
}

} // namespace graphcache
