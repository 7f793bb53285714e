#include "replay/lane.h"

#include <algorithm>

namespace graphcache {

Lane::~Lane() {
  try {
    invalidate(Origin{});
  } catch (...) { // at exit, the device may be gone already
  }
}

bool Lane::holds_outputs() const {
  return std::any_of(live_.begin(), live_.end(), [](const auto& shared) { return shared->held(); });
}

Invalidated Lane::invalidate(const Origin& overwritten_by) {
  Invalidated invalidated;
  for (const auto& shared : live_) {
    invalidated += shared->invalidate(overwritten_by);
  }
  live_.clear();
  return invalidated;
}

} // namespace graphcache
