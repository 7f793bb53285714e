#include "replay/stale_outputs.h"

#include "tensors/weak.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>

namespace graphcache {
namespace {

// Makes `stream` current, and the stream that was current wait for it in the end. The users of outputs that were
// made on a stream need not know of another one.
class OnStream {
 public:
  OnStream(const c10::Stream& stream, const c10::Stream& current)
      : stream_(stream), current_(current), guard_(stream) {}
  ~OnStream() noexcept(false) {
    c10::Event done(stream_.device_type());
    done.record(stream_);
    done.block(current_);
  }
  OnStream(const OnStream&) = delete;
  OnStream& operator=(const OnStream&) = delete;

 private:
  c10::Stream stream_;
  c10::Stream current_;
  c10::StreamGuard guard_;
};

bool must_move(const c10::Storage& storage) {
  return storage && is_held(storage) && !is_expired(storage); // expired: by the user's own hand
}

} // namespace

std::optional<c10::Stream> current_stream_of(const c10::Device& device) {
  if (device.is_cpu()) {
    return std::nullopt;
  }
  return c10::impl::getDeviceGuardImpl(device.type())->getStream(device);
}

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

Invalidated SharedOutputs::invalidate(
    const Origin& overwritten_by, size_t room, std::vector<PendingMove>& moves) {
  Invalidated invalidated;
  if (!copy) {
    invalidated.expired = expire_held(overwritten_by);
  } else if (held()) {
    invalidated.copied = move_out(room, moves);
  }
  return invalidated;
}

int64_t SharedOutputs::expire_held(const Origin& overwritten_by) {
  int64_t expired = 0;
  for (auto& storage : storages) {
    if (!storage || !is_held(storage)) {
      continue;
    }
    expire(
        storage,
        "graphcache: this tensor is an output of " + origin.text() +
        ", and its memory was overwritten by " + overwritten_by.text() +
        ". An output of a forward with stale='error' is valid until the next graph of its pool runs. Use "
        "it before that, or keep a copy with .clone(), or leave out stale='error': by default, an output "
        "that is still held is copied for you.");
    ++expired;
    storage = c10::Storage();
  }
  return expired;
}

int64_t SharedOutputs::move_out(size_t room, std::vector<PendingMove>& moves) {
  const auto current = stream ? current_stream_of(stream->device()) : std::nullopt;
  std::optional<OnStream> elsewhere;
  if (current != stream) {
    elsewhere.emplace(*stream, *current);
    room = 0;
  }
  int64_t moved = 0;
  for (auto& storage : storages) {
    if (!must_move(storage)) {
      continue;
    }
    ++moved;
    if (moves.size() < room) {
      moves.push_back({&storage, memory_for(storage)});
      continue;
    }
    materialize(storage);
    storage = c10::Storage();
  }
  return moved;
}

} // namespace graphcache
