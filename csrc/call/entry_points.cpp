// The ways into a decorated forward. wrapt takes a microsecond to find the function that it wraps, and so does
// nn.Module to find that it has no hooks. These ask the dispatcher first, and leave the misses to them.
#include "bindings/bindings.h"
#include "replay/dispatcher.h"

#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <string>
#include <vector>

namespace graphcache {
namespace {

PyObject* interned(const char* text) {
  return PyUnicode_InternFromString(text);
}

py::object checked(PyObject* made) {
  if (made == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(made);
}

py::object attribute(PyObject* object, PyObject* name) {
  return checked(PyObject_GetAttr(object, name));
}

// torch.compile: it has to see the Python frames behind the call.
bool is_compiling() {
  static PyObject* const callback =
      py::object(py::module_::import("torch._C._dynamo.eval_frame").attr("get_eval_frame_callback"))
          .release()
          .ptr();
  return !checked(PyObject_CallNoArgs(callback)).is_none();
}

// `dispatchers`: see `_Caches.by_id` in wrappers.py. `instance`: the forward is bound to it.
py::object serve(PyObject* dispatchers, PyObject* key, PyObject* instance, PyObject* args, PyObject* kwargs) {
  PyObject* found = PyDict_GetItemWithError(dispatchers, key);
  if (found == nullptr) {
    return Dispatcher::miss();
  }
  const auto held = py::reinterpret_borrow<py::object>(found); // the call may clear it
  auto* dispatcher = static_cast<Dispatcher*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(found, 2), nullptr));
  return dispatcher->serve(args, kwargs, instance);
}

py::object referent(PyObject* reference) {
  return py::reinterpret_steal<py::object>(PyObject_CallNoArgs(reference));
}

// An attribute whose name begins with `_self_`, without wrapt's search for others.
PyObject* own_attribute(PyObject* self, PyObject* name) {
  PyObject** dict = _PyObject_GetDictPtr(self);
  return dict == nullptr || *dict == nullptr ? nullptr : PyDict_GetItemWithError(*dict, name);
}

// (dispatchers, key, weak reference to the instance or None); null where the wrapper is not ready.
PyObject* served_by(PyObject* self) {
  static PyObject* const name = interned("_self_served");
  return own_attribute(self, name);
}

py::object serve_own(PyObject* self, PyObject* args, PyObject* kwargs) {
  PyObject* served = served_by(self);
  if (served == nullptr) {
    return Dispatcher::miss();
  }
  PyObject* reference = PyTuple_GET_ITEM(served, 2);
  const py::object instance = reference == Py_None ? py::none() : referent(reference);
  return serve(PyTuple_GET_ITEM(served, 0), PyTuple_GET_ITEM(served, 1), instance.ptr(), args, kwargs);
}

// References to the forward of an instance while only its module has any: the module's __dict__, and both halves
// of the way in through `_compiled_call_impl`.
constexpr Py_ssize_t kOwnReferences = 3;

// (wrapper, module) -> bool: false where the call is of a shallow copy of the module.
PyObject* is_alone = nullptr;

// The forward of one instance, called by itself or by a module with hooks: perhaps by a shallow copy of its
// module. No module holds one over compiled code.
py::object serve_instance(PyObject* self, PyObject* args, PyObject* kwargs) {
  static PyObject* const compiled = interned("_self_compiled");
  PyObject* served = served_by(self);
  if (served == nullptr ||
      (own_attribute(self, compiled) != Py_True &&
       !py::cast<bool>(py::handle(is_alone)(py::handle(self), referent(PyTuple_GET_ITEM(served, 2)))))) {
    return Dispatcher::miss();
  }
  return serve_own(self, args, kwargs);
}

py::object serve_bound(PyObject* self, PyObject* args, PyObject* kwargs) {
  static PyObject* const of_instance = interned("_self_instance");
  static PyObject* const of_parent = interned("_self_parent");
  const auto instance = attribute(self, of_instance);
  if (instance.is_none()) { // called through the class
    return Dispatcher::miss();
  }
  const auto parent = attribute(self, of_parent);
  PyObject* served = served_by(parent.ptr());
  if (served == nullptr) {
    return Dispatcher::miss();
  }
  const auto key = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(instance.ptr()));
  return serve(PyTuple_GET_ITEM(served, 0), key.ptr(), instance.ptr(), args, kwargs);
}

using Serve = py::object (*)(PyObject*, PyObject*, PyObject*);

template <Serve serve>
PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  if (!is_compiling()) {
    auto result = serve(self, args, kwargs);
    if (!result.is(Dispatcher::miss())) {
      return result.release().ptr();
    }
  }
  static PyObject* const name = interned("_unserved_call");
  const auto unserved = attribute(reinterpret_cast<PyObject*>(Py_TYPE(self)), name);
  const auto given = py::reinterpret_steal<py::tuple>(PyTuple_New(PyTuple_GET_SIZE(args) + 1));
  PyTuple_SET_ITEM(given.ptr(), 0, Py_NewRef(self));
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(args); ++index) {
    PyTuple_SET_ITEM(given.ptr(), index + 1, Py_NewRef(PyTuple_GET_ITEM(args, index)));
  }
  return PyObject_Call(unserved.ptr(), given.ptr(), kwargs);
  END_HANDLE_TH_ERRORS
}

PyMethodDef method(const char* name, PyCFunctionWithKeywords function) {
  return {
      name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
      METH_VARARGS | METH_KEYWORDS,
      nullptr};
}

template <Serve serve>
void define_call(py::type& type) {
  static auto definition = method("__call__", &call<serve>);
  type.attr("_unserved_call") = type.attr("__call__");
  type.attr("__call__") = checked(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition));
}

// The method that nn.Module runs at a call; profilers replace it.
PyObject* plain_call = nullptr;

// Returns true if nn.Module would do no more than to call `forward`, and that is still ours.
bool only_calls_forward(PyObject* module, PyObject* forward) {
  static PyObject* const name = interned("forward");
  static PyObject* const impl = interned("_call_impl");
  static PyObject* const own_hooks[] = {
      interned("_forward_hooks"),
      interned("_forward_pre_hooks"),
      interned("_backward_hooks"),
      interned("_backward_pre_hooks")};
  static const auto global_hooks = [] {
    const auto torch = py::module_::import("torch.nn.modules.module");
    std::vector<PyObject*> dicts;
    for (const auto* kind : {"forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"}) {
      dicts.push_back(py::object(torch.attr((std::string("_global_") + kind).c_str())).release().ptr());
    }
    return dicts;
  }();
  if (own_attribute(module, name) != forward || _PyType_Lookup(Py_TYPE(module), impl) != plain_call) {
    return false;
  }
  for (auto* const hooks : own_hooks) {
    PyObject* dict = own_attribute(module, hooks);
    if (dict == nullptr || PyDict_GET_SIZE(dict) != 0) {
      return false;
    }
  }
  return std::all_of(global_hooks.begin(), global_hooks.end(), [](PyObject* dict) {
    return PyDict_GET_SIZE(dict) == 0;
  });
}

// `self`: (the way to the dispatcher, the wrapper of forward, () -> the module that is called or None).
PyObject* call_module(PyObject* self, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  PyObject* served = PyTuple_GET_ITEM(self, 0);
  const auto module = referent(PyTuple_GET_ITEM(served, 2));
  PyObject* const forward = PyTuple_GET_ITEM(self, 1);
  // One more, and a shallow copy of the module may be what is called.
  if (Py_REFCNT(forward) > kOwnReferences && !is_compiling()) {
    const py::object caller = py::handle(PyTuple_GET_ITEM(self, 2))();
    if (!caller.is_none() && !caller.is(module)) {
      static PyObject* const impl = interned("_call_impl");
      return PyObject_Call(attribute(caller.ptr(), impl).ptr(), args, kwargs);
    }
  }
  if (!is_compiling() && only_calls_forward(module.ptr(), forward)) {
    auto result =
        serve(PyTuple_GET_ITEM(served, 0), PyTuple_GET_ITEM(served, 1), module.ptr(), args, kwargs);
    if (!result.is(Dispatcher::miss())) {
      return result.release().ptr();
    }
  }
  static PyObject* const name = interned("_call_impl");
  return PyObject_Call(attribute(module.ptr(), name).ptr(), args, kwargs);
  END_HANDLE_TH_ERRORS
}

py::object module_call(const py::tuple& served, const py::object& forward, const py::object& called_module) {
  static auto definition = method("call", &call_module);
  return checked(PyCFunction_New(&definition, py::make_tuple(served, forward, called_module).ptr()));
}

} // namespace

void bind_calls(py::module_& m) {
  plain_call = py::object(py::module_::import("torch.nn").attr("Module").attr("_call_impl")).release().ptr();
  m.def("module_call", &module_call, "served"_a, "forward"_a, "called_module"_a);
  m.def("serve_calls", &define_call<serve_own>, "type"_a);
  m.def("serve_bound_calls", &define_call<serve_bound>, "type"_a);
  m.def(
      "serve_instance_calls",
      [](py::type& type, py::object asked) {
        is_alone = asked.release().ptr();
        define_call<serve_instance>(type);
      },
      "type"_a, "is_alone"_a);
}

} // namespace graphcache
