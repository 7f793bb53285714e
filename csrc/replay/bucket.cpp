#include "replay/bucket.h"

namespace py = pybind11;

namespace graphcache {

py::object Bucket::run(
    const Leaves& arguments, int64_t batch, int64_t call, int64_t stream, bool repeat) {
  const Origin origin{name, call, batch, size};
  const auto guard = repeat ? dependencies.guard.lock() : nullptr;
  const auto* const effects = guard == nullptr || guard->effects().empty() ? nullptr : &guard->effects();
  auto places = effects == nullptr ? Effects::Found() : effects->find();
  const bool stores_outputs = effects != nullptr && effects->has_outputs();
  if (stores_outputs) {
    take_replaced(*effects, places);
  }
  try {
    start(arguments, batch, origin, stream, places.taken.empty());
  } catch (...) {
    if (stores_outputs) {
      put_back_replaced(*effects, places, origin);
    }
    throw;
  }
  if (effects != nullptr) {
    effects->store(places);
  }
  dependencies.mutated->raise_versions(arguments.tensors);
  lane->stream = stream;
  auto made = result.give(batch, size, arguments, origin, *lane);
  if (stores_outputs) {
    const auto both = py::reinterpret_steal<py::tuple>(made.release());
    effects->store_outputs(places, both[1]);
    made = both[0];
  }
  ++replays;
  padded_rows += size - batch;
  check_budget -= static_cast<int64_t>(batch != size);
  return made;
}

// Outputs of the last replay that this one replaces in Python need not move out, if nobody else holds them.
void Bucket::take_replaced(const Effects& effects, Effects::Found& places) const {
  effects.take(places, [this](const at::Tensor& tensor) {
    const auto& storage = tensor.storage();
    return tensor.use_count() == 1 && storage.use_count() == 2 && // the other one is the lane's
        storage.unsafeGetStorageImpl()->pyobj_slot()->load_pyobj() == nullptr && lane->untrack(storage);
  });
}

void Bucket::put_back_replaced(
    const Effects& effects, const Effects::Found& places, const Origin& origin) const {
  effects.put_back(places, [&](const at::Tensor& tensor) {
    if (!lane->track_again(tensor.storage())) {
      expire(tensor.storage(), "graphcache: " + origin.text() + " failed, and may have overwritten this tensor");
    }
  });
}

// torch's own replay lets other threads run before outputs point at their copies: there, nothing moves inside.
size_t Bucket::room() const {
  if (launch_.node == nullptr) {
    return kMaxMoves;
  }
  return launch_.replay ? 0 : launch_.node->room();
}

void Bucket::prove(int64_t batch) {
  const int64_t sum = versions == nullptr ? 0 : versions->sum();
  if (proved_.empty() || sum != proved_at_) {
    proved_.assign(static_cast<size_t>(size), false);
  }
  proved_at_ = sum;
  proved_.at(static_cast<size_t>(batch)) = true;
}

// An argument may be an output that this replay overwrites: it is read, or found expired, before.
void Bucket::start(const Leaves& arguments, int64_t batch, const Origin& origin, int64_t stream, bool lets_others_run) {
  if (!launch_.copier) {
    py::list tensors;
    for (auto* const tensor : arguments.objects) {
      tensors.append(py::handle(tensor));
    }
    launch_.copy_in(tensors, batch);
    invalidated += lane->invalidate(origin);
    launch_.replay();
    return;
  }
  // Whatever raises before the patch, the node lacks the recorded parameters: the next call must patch it.
  const bool unpatched = std::exchange(unpatched_, true);
  const bool changed = launch_.copier->read(arguments.tensors.data(), batch);
  invalidated += lane->invalidate(origin, room());
  const bool moves = launch_.copier->move(lane->moves());
  if (!launch_.node) {
    launch_.copier->copy();
    lane->moved();
    launch_.replay();
    return;
  }
  if (changed || moves || unpatched) {
    launch_.node->patch();
  }
  unpatched_ = false;
  if (launch_.replay) {
    launch_.replay(); // torch's own: it advances the random generator
    return;
  }
  if (!lane->moves().empty() || !lets_others_run) {
    // Until the copies are launched and the outputs point at them, no other thread may look.
    launch_.node->launch(reinterpret_cast<driver::Stream>(stream));
    lane->moved();
    return;
  }
  // Others may run meanwhile, and a full queue blocks; the pool's lock keeps them off this graph.
  const py::gil_scoped_release released;
  launch_.node->launch(reinterpret_cast<driver::Stream>(stream));
}

} // namespace graphcache
