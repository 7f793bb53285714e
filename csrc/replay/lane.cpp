#include "replay/lane.h"

#include <utility>

namespace graphcache {

Lane::~Lane() {
  try {
    invalidate(Origin{});
  } catch (...) { // there is no memory; or, at exit, no device
    try {
      live_->expire_held(Origin{});
    } catch (...) {
    }
  }
}

Invalidated Lane::invalidate(const Origin& overwritten_by, size_t room) {
  moves_.clear(); // those of a call that failed: their outputs are where they were
  if (live_ == nullptr) {
    return {};
  }
  const auto invalidated = live_->invalidate(overwritten_by, room, moves_);
  if (moves_.empty()) {
    live_.reset();
  }
  return invalidated;
}

bool Lane::untrack(const c10::Storage& output) {
  if (live_ == nullptr) {
    return false;
  }
  for (auto& storage : live_->storages) {
    if (storage && storage.is_alias_of(output)) {
      storage = c10::Storage();
      return true;
    }
  }
  return false;
}

bool Lane::track_again(const c10::Storage& output) {
  if (live_ == nullptr) {
    return false;
  }
  for (auto& storage : live_->storages) {
    if (!storage) {
      storage = output;
      return true;
    }
  }
  return false;
}

void Lane::moved() {
  for (auto& [output, memory] : moves_) {
    give_memory(*output, std::move(memory));
    *output = c10::Storage();
  }
  moves_.clear();
  live_.reset();
}

} // namespace graphcache
