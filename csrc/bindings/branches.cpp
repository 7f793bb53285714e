// The Python face of branches.
#include "bindings/bindings.h"
#include "capture/branches.h"

namespace graphcache {

void bind_branches(py::module_& m) {
  m.def("new_stream", []() { return reinterpret_cast<int64_t>(new_stream()); });
  py::class_<Branches>(m, "Branches")
      .def(
          py::init([](int64_t handle, const c10::Stream& main, std::vector<c10::Stream> sides) {
            return std::make_unique<Branches>(reinterpret_cast<driver::Stream>(handle), main, sides);
          }),
          "handle"_a, "main"_a, "sides"_a)
      .def("__enter__", [](Branches& branches) -> Branches& {
        branches.open();
        return branches;
      })
      .def(
          "__exit__",
          [](Branches& branches, const py::object& type, const py::args&) {
            const auto error = branches.close();
            if (error && type.is_none()) { // an error of the block itself says more
              std::rethrow_exception(error);
            }
          })
      .def_property_readonly("count", &Branches::count)
      .def_property_readonly("large", &Branches::large);
}

} // namespace graphcache
