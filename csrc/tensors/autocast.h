// The state of autocast, without torch's header for it, which includes every operator.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

namespace graphcache {

bool is_autocast_enabled(c10::DeviceType type);
c10::ScalarType autocast_dtype(c10::DeviceType type);

} // namespace graphcache
