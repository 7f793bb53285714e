// The Python face of what records a traced run.
#include "bindings/bindings.h"
#include "tracing/call_profile.h"

namespace graphcache {

void bind_tracing(py::module_& m) {
  m.def("profile_calls", &profile_calls, "callback"_a, "skipped"_a);
}

} // namespace graphcache
