// The order of dimensions in memory, and whether anything lies between their elements.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/DimVector.h>

#include <algorithm>
#include <numeric>

namespace graphcache {

// Dimensions from the outermost to the innermost.
inline c10::DimVector outermost_first(c10::IntArrayRef strides) {
  c10::DimVector order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// `order`: as above.
inline bool is_dense(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::IntArrayRef order) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) {
    return true;
  }
  int64_t run = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (sizes[*dim] != 1 && strides[*dim] != run) {
      return false;
    }
    run *= sizes[*dim];
  }
  return true;
}

} // namespace graphcache
