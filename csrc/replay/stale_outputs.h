// Outputs whose memory a later graph overwrites: they expire, or move out.
#pragma once

#include <c10/core/Storage.h>

#include <cstdint>
#include <memory>
#include <string>
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

} // namespace graphcache
