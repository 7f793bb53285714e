#include "tracing/call_profile.h"

#include <frameobject.h>

#include <memory>
#include <unordered_map>
#include <utility>

namespace py = pybind11;

namespace graphcache {
namespace {

struct CallProfile {
  py::object callback;
  std::string skipped;
  // Code objects are held, so that no other one gets an address that is known.
  std::unordered_map<PyObject*, std::pair<py::object, bool>> known;

  bool skips(PyObject* code) {
    const auto found = known.find(code);
    if (found != known.end()) {
      return found->second.second;
    }
    const auto held = py::reinterpret_borrow<py::object>(code);
    const bool skip = held.attr("co_filename").cast<std::string>().rfind(skipped, 0) == 0;
    known.emplace(code, std::make_pair(held, skip));
    return skip;
  }
};

PyObject* name_of(int event) {
  static PyObject* const call = PyUnicode_InternFromString("call");
  static PyObject* const back = PyUnicode_InternFromString("return");
  static PyObject* const native = PyUnicode_InternFromString("c_call");
  return event == PyTrace_CALL ? call : event == PyTrace_RETURN ? back : event == PyTrace_C_CALL ? native : nullptr;
}

int on_event(PyObject* capsule, PyFrameObject* frame, int event, PyObject* argument) {
  auto* const name = name_of(event);
  if (name == nullptr) {
    return 0;
  }
  try {
    auto& profile = *static_cast<CallProfile*>(PyCapsule_GetPointer(capsule, nullptr));
    const auto code = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
    if (profile.skips(code.ptr())) {
      return 0;
    }
    auto* const given = argument == nullptr ? Py_None : argument;
    const auto done = py::reinterpret_steal<py::object>(
        PyObject_CallFunctionObjArgs(profile.callback.ptr(), frame, name, given, nullptr));
    return done ? 0 : -1;
  } catch (py::error_already_set& error) {
    error.restore();
    return -1;
  }
}

} // namespace

void profile_calls(py::object callback, std::string skipped) {
  auto profile = std::make_unique<CallProfile>();
  profile->callback = std::move(callback);
  profile->skipped = std::move(skipped);
  const auto capsule = py::reinterpret_steal<py::object>(
      PyCapsule_New(profile.release(), nullptr, [](PyObject* object) {
        const std::unique_ptr<CallProfile> owned(static_cast<CallProfile*>(PyCapsule_GetPointer(object, nullptr)));
      }));
  PyEval_SetProfile(&on_event, capsule.ptr());
}

} // namespace graphcache
