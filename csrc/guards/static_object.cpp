#include "guards/static_object.h"

#include "tensors/weak.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <utility>

namespace py = pybind11;

namespace graphcache {
namespace {

struct Lease {
  c10::Storage owner;
  std::shared_ptr<void> lease;
};

void release_lease(void* lease) {
  delete static_cast<Lease*>(lease);
}

const Lease* lease_of(const c10::Storage& storage) {
  const auto& data = storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  return data.get_deleter() == &release_lease ? static_cast<const Lease*>(data.get_context()) : nullptr;
}

} // namespace

void StaticObject::bind(
    const py::object& object,
    const std::shared_ptr<Guard>& guard,
    const std::vector<at::Tensor>& tensors,
    std::vector<Location> counters) {
  reference_ = py::weakref(object);
  guard_ = guard;
  counters_ = std::move(counters);
  calls = 0;
  versions.clear();
  for (const auto& tensor : tensors) {
    versions.push_back(tensor.unsafeGetTensorImpl()->version_counter());
  }
}

void StaticObject::release() {
  reference_ = py::object();
  guard_.reset();
  counters_.clear();
  versions.clear();
}

bool StaticObject::is(PyObject* object) const {
  return reference_ && reinterpret_cast<PyWeakReference*>(reference_.ptr())->wr_object == object;
}

bool StaticObject::serves(PyObject* object) {
  if (!is(object)) {
    return false;
  }
  const auto guard = guard_.lock();
  if (guard == nullptr || !guard->check(/*grad=*/true)) {
    return false;
  }
  ++calls;
  return true;
}

py::object StaticObject::object() const {
  if (!reference_) {
    return py::none();
  }
  return py::reinterpret_borrow<py::object>(
      reinterpret_cast<PyWeakReference*>(reference_.ptr())->wr_object);
}

LeasedMemory::LeasedMemory(const c10::Storage& storage) : lease_(std::make_shared<char>()) {
  TORCH_CHECK_VALUE(!is_weak(storage), "graphcache: weak memory can't be leased");
  auto* impl = storage.unsafeGetStorageImpl();
  owner_ = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(),
      impl->nbytes(),
      impl->set_data_ptr(c10::DataPtr(nullptr, storage.device())),
      /*allocator=*/nullptr,
      /*resizable=*/false));
  lease(storage);
}

void LeasedMemory::adopt(const c10::Storage& storage) {
  TORCH_CHECK_VALUE(!is_leased(), "graphcache: this memory is in use");
  const auto nbytes = static_cast<int64_t>(owner_.nbytes());
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(storage.nbytes()) == nbytes, "graphcache: memory of another size");
  c10::impl::ExcludeDispatchKeyGuard below_modes(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  carve(owner_, 0, nbytes).copy_(carve(storage, 0, nbytes));
  lease(storage);
}

void LeasedMemory::lease(const c10::Storage& storage) {
  void* data = owner_.mutable_data();
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(
      c10::DataPtr(data, new Lease{owner_, lease_}, &release_lease, owner_.device()));
}

bool LeasedMemory::is_leased() const {
  return lease_.use_count() > 1;
}

bool LeasedMemory::is_leased_to(const c10::Storage& storage) const {
  const auto* lease = lease_of(storage);
  return lease != nullptr && lease->lease == lease_;
}

at::Tensor owned(const at::Tensor& tensor) {
  const auto* lease = lease_of(tensor.storage());
  return over(
      lease == nullptr ? tensor.storage() : lease->owner,
      Metadata(tensor),
      tensor.sizes(),
      tensor.strides(),
      tensor.storage_offset());
}

} // namespace graphcache
