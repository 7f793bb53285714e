// The Python face of lanes and of the lock of a pool.
#include "bindings/bindings.h"
#include "replay/lane.h"

namespace graphcache {

void bind_lanes(py::module_& m) {
  py::class_<PoolLock, std::shared_ptr<PoolLock>>(m, "PoolLock")
      .def(py::init<>())
      .def("__enter__", &PoolLock::lock, py::call_guard<py::gil_scoped_release>())
      .def("__exit__", [](PoolLock& lock, const py::args&) { lock.unlock(); })
      // In a forked child the owner of a held lock is nobody.
      .def("renew", [](PoolLock& lock) { new (&lock) PoolLock; });
  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
      .def(py::init<py::object>(), "arena"_a)
      .def_readwrite("stream", &Lane::stream)
      .def("holds_outputs", &Lane::holds_outputs)
      .def("is_held_elsewhere", &Lane::is_held_elsewhere);
}

} // namespace graphcache
