// Reports the calls of a thread, as sys.setprofile does, but not those that the library itself makes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace graphcache {

// Has the calls and returns of this thread reported to `callback` (frame, event, function or result), and the
// calls of functions of C; not those of code in files whose name begins with `skipped`. Until another profile is
// set. Two thirds of the events of a traced run come from the recorders.
void profile_calls(pybind11::object callback, std::string skipped);

} // namespace graphcache
