#include "guards/mutated_memory.h"

#include <algorithm>

namespace graphcache {
namespace {

struct Range {
  const char* begin;
  const char* end;

  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
};

Range range_of_storage(const at::Tensor& tensor) {
  const auto* data = static_cast<const char*>(tensor.storage().data());
  return {data, data + tensor.storage().nbytes()};
}

Range range_of(const at::Tensor& tensor) {
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = 0; // no dimension has a negative stride
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return {data, tensor.numel() == 0 ? data : data + (last + 1) * static_cast<int64_t>(tensor.itemsize())};
}

} // namespace

bool MutatedMemory::overlaps(at::ArrayRef<const at::Tensor*> arguments) const {
  if (outside_.empty() && bound_.empty()) {
    return false;
  }
  const auto any = [&](const Range& read) {
    return std::any_of(
               outside_.begin(),
               outside_.end(),
               [&](const at::Tensor& tensor) { return read.overlaps(range_of_storage(tensor)); }) ||
        std::any_of(bound_.begin(), bound_.end(), [&](size_t index) {
             return read.overlaps(range_of(*arguments[index]));
           });
  };
  return std::any_of(
      staged_.begin(), staged_.end(), [&](size_t index) { return any(range_of(*arguments[index])); });
}

} // namespace graphcache
