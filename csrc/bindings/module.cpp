#include "bindings/bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  graphcache::bind_tensors(m);
  graphcache::bind_tracing(m);
  graphcache::bind_guards(m);
  graphcache::bind_static_objects(m);
  graphcache::bind_lanes(m);
  graphcache::bind_inputs(m);
  graphcache::bind_branches(m);
  graphcache::bind_calls(m);
  graphcache::bind_buckets(m);
  graphcache::bind_dispatch(m);
}
