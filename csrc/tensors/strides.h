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

// The part of strides that code can see besides the numbers: whether a tensor is contiguous, and which dimensions
// of it make one in a view. Dimensions from the outermost to the innermost, each times 4, plus its mark.
// Empty: contiguous.
enum StrideMark { Packed = 0, Gapped = 1, Expanded = 2 };

inline c10::DimVector stride_pattern(c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  c10::DimVector pattern(strides.size());
  std::iota(pattern.begin(), pattern.end(), 0);
  std::stable_sort(pattern.begin(), pattern.end(), [&](int64_t a, int64_t b) {
    return strides[b] != 0 && (strides[a] == 0 || strides[a] > strides[b]);
  });
  int64_t run = 1;
  for (auto dim = pattern.rbegin(); dim != pattern.rend(); ++dim) {
    const int64_t size = sizes[*dim];
    const int64_t stride = strides[*dim];
    StrideMark mark = Packed;
    if (size != 1) {
      mark = stride == 0 ? Expanded : stride == run ? Packed : Gapped;
      run = stride == 0 ? run : stride * size;
    }
    *dim = *dim * 4 + mark;
  }
  return pattern;
}

} // namespace graphcache
