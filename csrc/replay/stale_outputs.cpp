#include "replay/stale_outputs.h"

#include "tensors/weak.h"

#include <algorithm>

namespace graphcache {

std::string Origin::text() const {
  if (name == nullptr) {
    return "the deletion of its graph pool";
  }
  return "call " + std::to_string(call) + " of " + *name + " (batch " + std::to_string(batch) +
      ", size " + std::to_string(size) + ")";
}

bool SharedOutputs::held() const {
  return std::any_of(
      storages.begin(), storages.end(), [](const auto& storage) { return storage && is_held(storage); });
}

Invalidated SharedOutputs::invalidate(const Origin& overwritten_by) {
  Invalidated invalidated;
  for (auto& storage : storages) {
    if (!storage || !is_held(storage)) {
      continue;
    }
    if (copy) {
      materialize(storage);
      ++invalidated.copied;
    } else {
      expire(
          storage,
          "graphcache: this tensor is an output of " + origin.text() +
          ", and its memory was overwritten by " + overwritten_by.text() +
          ". An output is valid until the next graph of its pool runs. Use it before that, or keep a "
          "copy with .clone(), or decorate with cuda_graphed(..., stale='copy') to have outputs that "
          "are still held copied for you.");
      ++invalidated.expired;
    }
    storage = c10::Storage();
  }
  return invalidated;
}

} // namespace graphcache
