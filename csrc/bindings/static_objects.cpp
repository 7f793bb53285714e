// The Python face of objects that hold tensors for a forward, and of their memory.
#include "bindings/bindings.h"
#include "guards/static_object.h"

namespace graphcache {

void bind_static_objects(py::module_& m) {
  py::class_<StaticObject, std::shared_ptr<StaticObject>>(m, "StaticObject")
      .def(py::init<>())
      .def(
          "bind",
          [](StaticObject& slot,
             const py::object& object,
             const std::shared_ptr<Guard>& guard,
             const std::vector<at::Tensor>& tensors,
             const std::vector<std::pair<py::object, py::object>>& counters) {
            std::vector<Location> places;
            for (const auto& [container, key] : counters) {
              places.emplace_back(container, key, /*borrowed=*/true);
            }
            slot.bind(object, guard, tensors, std::move(places));
          },
          "object"_a, "guard"_a, "tensors"_a, "counters"_a)
      .def("release", &StaticObject::release)
      .def(
          "holds",
          [](const StaticObject& slot, const py::object& object) { return slot.is(object.ptr()); },
          "object"_a)
      .def_property_readonly("object", &StaticObject::object)
      .def_readonly("calls", &StaticObject::calls);
  py::class_<LeasedMemory, std::shared_ptr<LeasedMemory>>(m, "LeasedMemory")
      .def(
          py::init([](const at::Tensor& tensor) { return std::make_shared<LeasedMemory>(tensor.storage()); }),
          "tensor"_a)
      .def(
          "adopt",
          [](LeasedMemory& memory, const at::Tensor& tensor) { memory.adopt(tensor.storage()); },
          "tensor"_a)
      .def("is_leased", &LeasedMemory::is_leased)
      .def(
          "is_leased_to",
          [](LeasedMemory& memory, const at::Tensor& tensor) { return memory.is_leased_to(tensor.storage()); },
          "tensor"_a);
  m.def("owned", &owned, "tensor"_a);
}

} // namespace graphcache
