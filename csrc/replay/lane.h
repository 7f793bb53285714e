// The shared outputs of one lane: the next graph of the lane overwrites them.
#pragma once

#include "replay/stale_outputs.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace graphcache {

class Lane {
 public:
  Lane() = default;
  // The memory goes with the lane: whoever holds an output then must not read what follows.
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  bool holds_outputs() const;
  // Returns true if an output is held that another thread was given: that thread may be in the middle of an
  // operation on it, without the GIL, past the point where expiry is noticed.
  bool is_held_elsewhere() const { return thread_ != std::this_thread::get_id() && holds_outputs(); }

  // Expires or moves the outputs that are still held; returns how many storages that were.
  Invalidated invalidate(const Origin& overwritten_by);
  void track(std::shared_ptr<SharedOutputs> shared) {
    live_.push_back(std::move(shared));
    thread_ = std::this_thread::get_id();
  }

  int64_t stream = 0; // that the last replay was launched on

 private:
  std::vector<std::shared_ptr<SharedOutputs>> live_;
  std::thread::id thread_; // that was given the last of them
};

// One graph of a pool is dispatched at a time. Python waits for it without the GIL.
using PoolLock = std::recursive_mutex;

} // namespace graphcache
