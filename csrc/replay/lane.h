// The shared outputs of one lane: the next graph of the lane overwrites them.
#pragma once

#include <c10/core/Storage.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace graphcache {

// The call that made an output, or overwrote one: for the text that a stale output raises.
struct Origin {
  std::shared_ptr<const std::string> name; // of the forward; null: the pool went away
  int64_t call = 0;
  int64_t batch = 0;
  int64_t size = 0;

  std::string text() const;
};

// Held outputs that were overwritten, by what became of them.
struct Invalidated {
  int64_t expired = 0;
  int64_t copied = 0;

  Invalidated& operator+=(const Invalidated& more) {
    expired += more.expired;
    copied += more.copied;
    return *this;
  }
};

// The storages of one result. The caller holds them through tensors that alias them.
struct SharedOutputs {
  std::vector<c10::Storage> storages; // null where it is the caller's for good
  bool copy = false; // outputs that are held when they are overwritten move out, instead of expiring
  Origin origin;

  bool held() const;
  Invalidated invalidate(const Origin& overwritten_by);
};

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
