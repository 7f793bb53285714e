#include "lane.h"

#include "weak.h"

#include <c10/util/Exception.h>

namespace graphcache {

std::string Origin::text() const {
  if (name == nullptr) {
    return "the deletion of its graph pool";
  }
  return "call " + std::to_string(call) + " of " + *name + " (batch " + std::to_string(batch) +
      ", size " + std::to_string(size) + ")";
}

bool Handed::held() const {
  for (const auto& storage : storages) {
    if (storage && is_held(storage)) {
      return true;
    }
  }
  return false;
}

GivenUp Handed::give_up(const Origin& overwritten_by) {
  GivenUp given_up;
  for (auto& storage : storages) {
    if (!storage || !is_held(storage)) {
      continue;
    }
    if (copy) {
      materialize(storage);
      ++given_up.copied;
    } else {
      storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
          "graphcache: this tensor is an output of " + origin.text() +
          ", and its memory was overwritten by " + overwritten_by.text() +
          ". An output is valid until the next graph of its pool runs. Use it before that, or keep a "
          "copy with .clone(), or decorate with cuda_graphed(..., stale='copy') to have outputs that "
          "are still held copied for you.");
      ++given_up.expired;
    }
    storage = c10::Storage();
  }
  return given_up;
}

Lane::~Lane() {
  try {
    give_up(Origin{});
  } catch (...) { // at exit, the device may be gone already
  }
}

bool Lane::holds_outputs() const {
  for (const auto& handed : live_) {
    if (handed->held()) {
      return true;
    }
  }
  return false;
}

GivenUp Lane::give_up(const Origin& overwritten_by) {
  GivenUp given_up;
  for (const auto& handed : live_) {
    given_up += handed->give_up(overwritten_by);
  }
  live_.clear();
  return given_up;
}

} // namespace graphcache
