// The Python face of objects that keep tensors for a forward, and of their memory.
#include "keeper.h"

#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace graphcache {

void bind_keeper(py::module_& m) {
  py::class_<Keeper, std::shared_ptr<Keeper>>(m, "Keeper")
      .def(py::init<>())
      .def("bind", &Keeper::bind, py::arg("object"), py::arg("guard"))
      .def("release", &Keeper::release)
      .def(
          "holds",
          [](const Keeper& keeper, const py::object& object) { return keeper.is(object.ptr()); },
          py::arg("object"))
      .def_property_readonly("object", &Keeper::object)
      .def_readonly("calls", &Keeper::calls);
  py::class_<Memory, std::shared_ptr<Memory>>(m, "Memory")
      .def(
          py::init([](const at::Tensor& tensor) { return std::make_shared<Memory>(tensor.storage()); }),
          py::arg("tensor"))
      .def(
          "move_in",
          [](Memory& memory, const at::Tensor& tensor) { memory.move_in(tensor.storage()); },
          py::arg("tensor"))
      .def("is_lent", &Memory::is_lent)
      .def(
          "is_lent_to",
          [](const Memory& memory, const at::Tensor& tensor) {
            return memory.is_lent_to(tensor.storage());
          },
          py::arg("tensor"));
  m.def("owned", &owned, py::arg("tensor"));
}

} // namespace graphcache
