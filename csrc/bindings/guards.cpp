// The Python face of the guards.
#include "guards/guard.h"
#include "guards/static_object.h"

#include <torch/csrc/utils/pybind.h>

#include <memory>

namespace py = pybind11;

namespace graphcache {
namespace {

// Guards may be part of a cycle, so Python's collector has to see what they refer to. An owner besides the
// Python object would need that too: then nothing is shown.
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

py::object referent(const py::object& reference) {
  TORCH_CHECK_TYPE(PyWeakref_Check(reference.ptr()), "graphcache: expected a weak reference");
  return py::reinterpret_borrow<py::object>(
      reinterpret_cast<PyWeakReference*>(reference.ptr())->wr_object);
}

} // namespace

void bind_guards(py::module_& m) {
  const py::arg label("label");
  py::class_<Location, std::shared_ptr<Location>>(m, "Location")
      .def(
          py::init<const py::object&, py::object, bool>(), py::arg("container"), py::arg("key"), py::arg("borrowed"));
  py::class_<Effect>(m, "Effect")
      .def(
          py::init([](std::shared_ptr<Location> place, py::object label) {
            Effect effect;
            effect.place = std::move(place);
            effect.type = py::none();
            effect.label = std::move(label);
            return effect;
          }),
          py::arg("place"), label)
      .def_static(
          "of_object",
          [](std::shared_ptr<StaticObject> object, size_t index, py::object label) {
            Effect effect;
            effect.object = std::move(object);
            effect.index = index;
            effect.type = py::none();
            effect.label = std::move(label);
            return effect;
          },
          py::arg("object"), py::arg("index"), label)
      .def(
          "expect_int",
          [](Effect& effect, int64_t low, int64_t high) {
            effect.low = low;
            effect.high = high;
          },
          py::arg("low"), py::arg("high"))
      .def("expect_type", [](Effect& effect, py::type type) { effect.type = std::move(type); }, py::arg("type"))
      .def(
          "store_sum",
          [](Effect& effect, size_t base, int64_t amount) {
            effect.store = Effect::Sum;
            effect.base = base;
            effect.amount = amount;
          },
          py::arg("base"), py::arg("amount"))
      .def(
          "store_constant",
          [](Effect& effect, py::object value) {
            effect.store = Effect::Constant;
            effect.constant = std::move(value);
          },
          py::arg("value"))
      .def(
          "store_output",
          [](Effect& effect, size_t output) {
            effect.store = Effect::Output;
            effect.output = output;
          },
          py::arg("output"));
  py::class_<Guard, std::shared_ptr<Guard>>(m, "Guard", py::custom_type_setup(&make_collectable))
      .def(py::init<py::object, bool>(), py::arg("names") = py::none(), py::arg("grads") = false)
      .def("add_module", &Guard::add_module, py::arg("module"), label, py::arg("is_root") = false)
      .def("add_object", &Guard::add_object, py::arg("object"), label)
      .def("add_dict", &Guard::add_dict, py::arg("dict"), label, py::arg("named"), py::arg("held"))
      .def("add_items", &Guard::add_items, py::arg("items"), label)
      .def("pin", &Guard::pin, py::arg("list"))
      .def("add_bytes", &Guard::add_bytes, py::arg("array"), label)
      .def("add_reference", &Guard::add_reference, py::arg("reference"), label)
      .def("add_source", &Guard::add_source, py::arg("container"), py::arg("key"), py::arg("value"), label)
      .def("add_absence", &Guard::add_absence, py::arg("container"), py::arg("key"), label)
      .def("add_tensor", &Guard::add_tensor, py::arg("tensor"), label)
      .def("free", &Guard::free, py::arg("container"), py::arg("key"))
      .def("add_effect", &Guard::add_effect, py::arg("effect"))
      .def("keep", &Guard::keep, py::arg("object"))
      .def("check", &Guard::check, py::arg("grad"))
      .def("explain", &Guard::explain, py::arg("grad"))
      .def("is_gone", &Guard::is_gone);
  m.def("referent", &referent, py::arg("reference"));
}

} // namespace graphcache
