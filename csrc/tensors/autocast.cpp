#include "tensors/autocast.h"

#include <ATen/autocast_mode.h>

namespace graphcache {

bool is_autocast_enabled(c10::DeviceType type) {
  return at::autocast::is_autocast_enabled(type);
}

c10::ScalarType autocast_dtype(c10::DeviceType type) {
  return at::autocast::get_autocast_dtype(type);
}

} // namespace graphcache
