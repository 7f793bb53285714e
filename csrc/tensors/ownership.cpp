#include "tensors/weak.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/python_headers.h>

#include <utility>

namespace graphcache {

bool is_held(const c10::Storage& storage) {
  // `untyped_storage()` leaves a Python object on the storage: one reference of its own, which counts only
  // where somebody holds that object.
  auto* object = storage.unsafeGetStorageImpl()->pyobj_slot()->load_pyobj();
  if (object == nullptr) {
    return storage.use_count() > 1;
  }
  return storage.use_count() > 2 || Py_REFCNT(object) > 1;
}

// Copies the bytes, then swaps the pointer inside the storage: all views follow, none is rebuilt.
void materialize(const c10::Storage& storage) {
  TORCH_CHECK_VALUE(
      is_weak(storage), "graphcache: the tensor owns its memory already; only weak ones can be moved");
  auto* weak = storage.unsafeGetStorageImpl();
  // carve raises the stored text if the storage has expired: its bytes are no longer its own
  c10::impl::ExcludeDispatchKeyGuard below_modes(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  const at::Tensor copy = carve(storage, 0, static_cast<int64_t>(weak->nbytes())).clone();
  weak->set_data_ptr_noswap(
      copy.storage().unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr(nullptr, storage.device())));
}

} // namespace graphcache
