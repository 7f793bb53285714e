// The Python face of the guards.
#include "guards/guard.h"

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

namespace py = pybind11;

namespace graphcache {
namespace {

// Guards refer to what may lead back to them, so Python's cycle collector has to see through them. An
// owner besides the Python object would need what they refer to: then nothing is shown.
Guard* only_owned_guard(PyObject* object) {
  if (!py::detail::is_holder_constructed(object)) {
    return nullptr;
  }
  const auto guard = py::cast<std::shared_ptr<Guard>>(py::handle(object));
  return guard.use_count() == 2 ? guard.get() : nullptr; // the other one is Python's
}

void make_collectable(PyHeapTypeObject* heap_type) {
  auto& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const auto* guard = only_owned_guard(self);
    return guard == nullptr ? 0 : guard->traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (auto* guard = only_owned_guard(self)) {
      guard->clear();
    }
    return 0;
  };
}

} // namespace

void bind_guards(py::module_& m) {
  py::class_<Guard, std::shared_ptr<Guard>>(m, "Guard", py::custom_type_setup(&make_collectable))
      .def(
          py::init([](Guard::Objects modules,
                      py::object root,
                      Guard::Objects objects,
                      std::vector<std::pair<py::object, bool>> dicts,
                      Guard::Objects lists,
                      Guard::Objects buffers,
                      Guard::Objects sources,
                      Guard::Objects tensors,
                      py::object names,
                      bool grads) {
            return std::make_shared<Guard>(Guard::Expectations{
                std::move(modules),
                std::move(root),
                std::move(objects),
                std::move(dicts),
                std::move(lists),
                std::move(buffers),
                std::move(sources),
                std::move(tensors),
                std::move(names),
                grads});
          }),
          py::kw_only(),
          py::arg("modules") = Guard::Objects(),
          py::arg("root") = py::none(),
          py::arg("objects") = Guard::Objects(),
          py::arg("dicts") = std::vector<std::pair<py::object, bool>>(),
          py::arg("lists") = Guard::Objects(),
          py::arg("buffers") = Guard::Objects(),
          py::arg("sources") = Guard::Objects(),
          py::arg("tensors") = Guard::Objects(),
          py::arg("names") = py::none(),
          py::arg("grads") = false)
      .def("check", &Guard::check, py::arg("grad"))
      .def("explain", &Guard::explain, py::arg("grad"));
}

} // namespace graphcache
