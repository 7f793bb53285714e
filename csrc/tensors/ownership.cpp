#include "tensors/weak.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
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

c10::DataPtr memory_for(const c10::Storage& storage) {
  const auto device = storage.device();
  const c10::DeviceGuard here(device);
  // The hooks know an allocator that the user put in the place of torch's own.
  auto* allocator = device.is_cuda() ? at::detail::getCUDAHooks().getCUDADeviceAllocator()
                                     : c10::GetAllocator(device.type());
  return allocator->allocate(storage.nbytes());
}

void give_memory(const c10::Storage& storage, c10::DataPtr memory) {
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
}

void materialize(const c10::Storage& storage) {
  TORCH_CHECK_VALUE(
      is_weak(storage), "graphcache: the tensor owns its memory already; only weak ones can be moved");
  auto* weak = storage.unsafeGetStorageImpl();
  // carve raises the stored text if the storage has expired: its bytes are no longer its own
  c10::impl::ExcludeDispatchKeyGuard below_modes(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  const at::Tensor copy = carve(storage, 0, static_cast<int64_t>(weak->nbytes())).clone();
  give_memory(
      storage, copy.storage().unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr(nullptr, storage.device())));
}

} // namespace graphcache
