// The shared outputs of one lane: the next graph of the lane overwrites them.
#pragma once

#include "replay/stale_outputs.h"

#include <pybind11/pytypes.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace graphcache {

class Lane {
 public:
  // `arena`: its memory, which goes with the lane and not before.
  explicit Lane(pybind11::object arena) : arena_(std::move(arena)) {}
  // Whoever holds an output then must not read what follows.
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  bool holds_outputs() const { return live_ != nullptr && live_->held(); }
  // Returns true if an output is held that another thread was given: that thread may be in the middle of an
  // operation on it, without the GIL, past the point where expiry is noticed.
  bool is_held_elsewhere() const { return thread_ != std::this_thread::get_id() && holds_outputs(); }

  // Expires or moves the outputs that are still held; returns how many storages that were. Up to `room` of them
  // become `moves()`: a graph is to copy their bytes before it overwrites them, and `moved()` is called then.
  Invalidated invalidate(const Origin& overwritten_by, size_t room = 0);
  const std::vector<PendingMove>& moves() const { return moves_; }
  void moved();

  // Lets the next replay overwrite an output without moving it; returns false for any other storage.
  bool untrack(const c10::Storage& output);
  // Tracks such an output again; returns false where it may have been overwritten.
  bool track_again(const c10::Storage& output);

  void track(std::shared_ptr<SharedOutputs> shared) {
    live_ = std::move(shared);
    thread_ = std::this_thread::get_id();
  }

  int64_t stream = 0; // that the last replay was launched on

 private:
  pybind11::object arena_; // destroyed last
  std::shared_ptr<SharedOutputs> live_; // of the last replay; null once they are invalid
  std::vector<PendingMove> moves_; // out of `live_`
  std::thread::id thread_; // that was given them
};

// One graph of a pool is dispatched at a time. Python waits for it without the GIL.
using PoolLock = std::recursive_mutex;

} // namespace graphcache
