// The Python face of dispatch: signatures, their entries, and dispatchers.
#include "bindings/bindings.h"
#include "replay/dispatcher.h"

namespace graphcache {
namespace {

// The way from a wrapper of Python to its dispatcher; owns a share of it.
py::object capsule_of(const std::shared_ptr<Dispatcher>& dispatcher) {
  auto capsule = py::reinterpret_steal<py::object>(
      PyCapsule_New(dispatcher.get(), nullptr, [](PyObject* capsule) {
        delete static_cast<std::shared_ptr<Dispatcher>*>(PyCapsule_GetContext(capsule));
      }));
  PyCapsule_SetContext(capsule.ptr(), new std::shared_ptr<Dispatcher>(dispatcher));
  return capsule;
}

void bind_signature(py::module_& m) {
  py::enum_<Leaf::Role>(m, "Role")
      .value("BATCHED", Leaf::Batched)
      .value("WHOLE", Leaf::Whole)
      .value("BOUND", Leaf::Bound);
  py::class_<Leaf>(m, "Leaf")
      .def(
          py::init([](Leaf::Role role,
                      int64_t batch_dim,
                      bool carries_batch,
                      bool must_be_weak,
                      std::vector<int64_t> pattern,
                      std::vector<int64_t> exact,
                      std::optional<bool> inference,
                      const py::object& example) {
            return Leaf(
                role,
                batch_dim,
                carries_batch,
                must_be_weak,
                std::move(pattern),
                std::move(exact),
                inference,
                example.ptr());
          }),
          "role"_a, "batch_dim"_a, "carries_batch"_a, "must_be_weak"_a, "pattern"_a, "exact"_a, "inference"_a,
          "example"_a);
  py::class_<Parameter>(m, "Parameter")
      .def(
          py::init([](Layout layout, int64_t position, const py::object& name, bool ordered) {
            return Parameter{std::move(layout), position, name.is_none() ? py::object() : name, ordered, {}, {}};
          }),
          "layout"_a, "position"_a, "name"_a, "ordered"_a)
      .def(
          "set_default",
          [](Parameter& parameter, const py::object& function, py::object key) {
            parameter.function = py::weakref(function);
            parameter.default_key = std::move(key);
          },
          "function"_a, "key"_a);
}

} // namespace

void bind_dispatch(py::module_& m) {
  bind_signature(m);
  py::class_<MutatedMemory, std::shared_ptr<MutatedMemory>>(m, "MutatedMemory")
      .def(
          py::init([](const std::vector<at::Tensor>& external, std::vector<size_t> bound, std::vector<size_t> copied_in) {
            MutatedMemory mutated{{}, std::move(bound), std::move(copied_in)};
            for (const auto& tensor : external) {
              mutated.external.push_back(whole_storage(tensor));
            }
            return mutated;
          }),
          "external"_a, "bound"_a, "copied_in"_a)
      .def("add_version", &MutatedMemory::add_version, "tensor"_a, "objects"_a)
      .def_readwrite("versions_of_arguments", &MutatedMemory::versions_of_arguments)
      .def(
          "overlaps",
          [](const MutatedMemory& mutated, const py::list& arguments) {
            return mutated.overlaps(leaves_of(arguments).tensors);
          },
          "arguments"_a);
  py::class_<Entry, std::shared_ptr<Entry>>(m, "Entry")
      .def(
          py::init([](std::shared_ptr<PoolLock> lock) { return Entry{std::move(lock)}; }),
          "lock"_a)
      .def_readonly("last", &Entry::last)
      .def(
          "set",
          [](Entry& entry, const std::vector<std::shared_ptr<Bucket>>& buckets, bool unpadded) {
            entry.buckets = buckets;
            entry.unpadded = unpadded;
          },
          "buckets"_a, "unpadded"_a)
      .def("set_eager", [](Entry& entry, const py::str& reason) { entry.eager = reason; }, "reason"_a);
  py::class_<Dispatcher, std::shared_ptr<Dispatcher>>(m, "Dispatcher")
      .def(
          py::init([](const py::object& disabled,
                      const py::object& emulated,
                      const py::object& device_mode,
                      const py::object& capturing,
                      bool has_training) {
            return Dispatcher({disabled, emulated, device_mode, capturing}, has_training);
          }),
          "disabled"_a, "emulated"_a, "device_mode"_a, "capturing"_a, "has_training"_a)
      .def_property_readonly("capsule", &capsule_of)
      .def("eager_reason", &Dispatcher::eager_reason, "args"_a, "kwargs"_a)
      .def("add", &Dispatcher::add, "parameters"_a, "leaves"_a, "identities"_a, "training"_a, "entry"_a)
      .def("forget", &Dispatcher::forget, "entry"_a)
      .def_readwrite("calls", &Dispatcher::calls)
      .def_readwrite("batches", &Dispatcher::batches)
      .def("count", [](Dispatcher& dispatcher, int64_t batch) { ++dispatcher.batches[batch]; }, "batch"_a);
  m.def("set_inlining", &set_inlining, "on"_a);
  m.def("is_inlining", &is_inlining);
  m.def(
      "modes",
      [](const py::object& device_mode) {
        const auto modes = Modes::now(device_mode);
        return modes ? std::make_optional(modes->key()) : std::nullopt;
      },
      "device_mode"_a);
}

} // namespace graphcache
