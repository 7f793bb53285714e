// The bytes of memory that a tensor reaches.
#pragma once

#include <ATen/core/Tensor.h>

namespace graphcache {

struct Extent {
  const char* begin;
  const char* end;

  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

inline Extent extent_of(const at::Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) {
    return {begin, begin};
  }
  int64_t last = 0; // no dimension has a negative stride
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.itemsize())};
}

inline Extent whole_storage(const at::Tensor& tensor) {
  const auto* data = static_cast<const char*>(tensor.storage().data());
  return {data, data + tensor.storage().nbytes()};
}

} // namespace graphcache
