#include "tensors/weak.h"

#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>

namespace graphcache {

// Despite the name that torch gave it, the call below frees nothing: it sets a flag and a text, so
// kernels in flight are unaffected and every view of the storage raises from here on.
void expire(const c10::Storage& storage, const std::string& message) {
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(message);
}

bool is_expired(const c10::Storage& storage) {
  try {
    storage.unsafeGetStorageImpl()->data(); // no version of torch that we support shows the flag
    return false;
  } catch (const c10::Error&) {
    return true;
  }
}

} // namespace graphcache
