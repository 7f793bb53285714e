// Outputs whose memory a later graph overwrites: they expire, or move out.
#pragma once

#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <memory>
#include <optional>
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

// A held output that has memory of its own, to which a graph's first node is to copy its bytes.
struct PendingMove {
  c10::Storage* output;
  c10::DataPtr memory;
};

// The storages of one result. The caller holds them through tensors that alias them.
struct SharedOutputs {
  std::vector<c10::Storage> storages; // null where it is the caller's for good
  bool copy = false; // outputs that are held when they are overwritten move out, instead of expiring
  Origin origin;
  std::optional<c10::Stream> stream; // of the call that made them; none on the CPU

  bool held() const;

  // Expires the held outputs, or moves them out. The first `room` that move only get their memory, and are added
  // to `moves`. Where that raises, nothing has changed but that some have moved out.
  Invalidated invalidate(const Origin& overwritten_by, size_t room, std::vector<PendingMove>& moves);
  int64_t expire_held(const Origin& overwritten_by);

 private:
  int64_t move_out(size_t room, std::vector<PendingMove>& moves);
};

// The current stream of a device; none on the CPU.
std::optional<c10::Stream> current_stream_of(const c10::Device& device);

} // namespace graphcache
