// The Python face of one captured size: its layout, outputs, launch and replays.
#include "bindings/bindings.h"
#include "replay/bucket.h"
#include "tensors/python_tensor.h"

namespace graphcache {

Leaves leaves_of(const py::list& tensors) {
  Leaves leaves;
  for (const auto tensor : tensors) {
    TORCH_CHECK_TYPE(is_tensor(tensor.ptr()), "graphcache: expected tensors");
    leaves.add(tensor.ptr());
  }
  return leaves;
}

namespace {

py::object null_if_none(const py::object& object) {
  return object.is_none() ? py::object() : object;
}

void bind_layout(py::module_& m) {
  using py::object;
  using Layouts = std::vector<Layout>;
  using Keys = std::vector<object>;
  py::class_<Layout>(m, "Layout")
      .def_static("tensor", [] { return Layout(); })
      .def_static(
          "constant", [](object value) { return Layout{Layout::Constant, {}, {}, {}, value}; }, "value"_a)
      .def_static(
          "static_object",
          [](std::shared_ptr<StaticObject> slot) {
            return Layout{Layout::Object, {}, {}, {}, {}, {}, slot};
          },
          "slot"_a)
      .def_static(
          "sequence",
          [](object type, Layouts children, object assemble) {
            const auto kind = type.is(py::type::of(py::list())) ? Layout::List
                : type.is(py::type::of(py::tuple()))            ? Layout::Tuple
                                                                : Layout::NamedTuple;
            return Layout{kind, type, children, {}, {}, assemble};
          },
          "type"_a, "children"_a, "assemble"_a)
      .def_static(
          "mapping",
          [](object type, Layouts children, Keys keys, object factory, object assemble) {
            const auto kind = type.is(py::type::of(py::dict())) ? Layout::Dict : Layout::Mapping;
            return Layout{kind, type, children, keys, factory, assemble};
          },
          "type"_a, "children"_a, "keys"_a, "factory"_a, "assemble"_a)
      .def_static(
          "fields",
          [](object type, Layouts children, Keys names, object keys, object assemble) {
            return Layout{Layout::Fields, type, children, names, keys, assemble};
          },
          "type"_a, "children"_a, "names"_a, "keys"_a, "assemble"_a);
}

} // namespace

void bind_buckets(py::module_& m) {
  bind_layout(m);
  py::enum_<Output::Kind>(m, "OutputKind")
      .value("POOL", Output::Pool)
      .value("EXTERNAL", Output::External)
      .value("EXTERNAL_VIEW", Output::ExternalView)
      .value("ARGUMENT", Output::Argument)
      .value("ARGUMENT_VIEW", Output::ArgumentView)
      .value("CONSTANT", Output::Constant);
  py::class_<Output>(m, "Output")
      .def(
          py::init([](Output::Kind kind, const py::object& tensor, int64_t argument) {
            return Output{kind, py::cast<at::Tensor>(tensor), tensor, argument, {}};
          }),
          "kind"_a, "tensor"_a, "argument"_a);
  py::class_<Result>(m, "Result")
      .def(py::init<Layout, std::vector<Output>, bool>(), "layout"_a, "outputs"_a, "copy"_a);
  py::class_<Launch>(m, "Launch")
      .def(
          py::init([](std::shared_ptr<InputCopier> copier,
                      std::shared_ptr<CopyInNode> node,
                      const py::object& copy_in,
                      const py::object& replay) {
            return Launch{std::move(copier), std::move(node), copy_in, null_if_none(replay)};
          }),
          "copier"_a, "node"_a, "copy_in"_a, "replay"_a);
  py::class_<Versions, std::shared_ptr<Versions>>(m, "Versions")
      .def(py::init<const std::vector<at::Tensor>&>(), "tensors"_a)
      .def("current", &Versions::current)
      .def("drop", &Versions::drop, "index"_a);
  py::class_<Bucket, std::shared_ptr<Bucket>>(m, "Bucket")
      .def(
          py::init([](const std::string& name,
                      int64_t size,
                      std::shared_ptr<Lane> lane,
                      Launch launch,
                      Result result,
                      std::shared_ptr<Guard> guard,
                      std::shared_ptr<MutatedMemory> mutated) {
            return std::make_shared<Bucket>(
                name, size, std::move(lane), std::move(launch), std::move(result),
                Dependencies{guard, std::move(mutated)});
          }),
          "name"_a, "size"_a, "lane"_a, "launch"_a, "result"_a, "guard"_a, "mutated"_a)
      .def(
          "run",
          [](Bucket& bucket, const py::list& tensors, int64_t batch, int64_t call, int64_t stream, bool repeat) {
            const auto guard = bucket.dependencies.guard.lock();
            if (repeat && guard != nullptr && !guard->effects().empty() && !guard->check(/*grad=*/false)) {
              throw std::runtime_error(
                  "graphcache: " + *bucket.name + " was changed by another thread while it was called");
            }
            return bucket.run(leaves_of(tensors), batch, call, stream, repeat);
          },
          "tensors"_a, "batch"_a, "call"_a, "stream"_a, "repeat"_a = true)
      .def(
          "set_batch_dims",
          [](Bucket& bucket, const std::vector<std::vector<int64_t>>& dims) {
            bucket.result.set_batch_dims(dims);
          },
          "dims"_a)
      .def("retire", &Bucket::retire)
      .def("is_proved", &Bucket::is_proved, "batch"_a)
      .def("prove", &Bucket::prove, "batch"_a)
      .def("serves", &Bucket::serves, "batch"_a)
      .def_readwrite("versions", &Bucket::versions)
      .def_property_readonly("forward_name", [](const Bucket& bucket) { return *bucket.name; })
      .def_readonly("size", &Bucket::size)
      .def_readonly("retired", &Bucket::retired)
      .def_readwrite("time_at", &Bucket::time_at)
      .def_readwrite("check_budget", &Bucket::check_budget)
      .def_readwrite("replays", &Bucket::replays)
      .def_readwrite("padded_rows", &Bucket::padded_rows)
      .def_property_readonly("expired", [](const Bucket& bucket) { return bucket.invalidated.expired; })
      .def_property_readonly("copied", [](const Bucket& bucket) { return bucket.invalidated.copied; });
}

} // namespace graphcache
