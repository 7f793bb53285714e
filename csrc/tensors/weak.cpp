#include "tensors/weak.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <string>
#include <utility>

namespace graphcache {
namespace {

// The mark of a weak storage: only ours carry this deleter, and it deletes nothing.
void delete_nothing(void* /*memory*/) {}

// Numbers go into texts by this and not by a stream: in a build that links libstdc++ statically, streaming one
// crashes, since the locale belongs to torch's copy of the library.
using std::to_string;

} // namespace

const c10::Storage& storage_of(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.has_storage(), "graphcache: a tensor of layout ", tensor.layout(), " has no storage");
  return tensor.storage();
}

c10::Storage weak_storage(const c10::Storage& owner, size_t offset, size_t nbytes) {
  // mutable_data raises the stored text if `owner` has expired
  void* memory = static_cast<char*>(owner.mutable_data()) + offset;
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(),
      nbytes,
      c10::DataPtr(memory, memory, &delete_nothing, owner.device()),
      /*allocator=*/nullptr,
      /*resizable=*/false));
}

Metadata::Metadata(const at::Tensor& like)
    : keys(like.options().computeDispatchKey()),
      dtype(like.dtype()),
      conj(like.is_conj()),
      neg(like.is_neg()) {}

// A fresh tensor over `storage`; under inference mode it is an inference tensor, as in eager.
at::Tensor over(
    c10::Storage storage,
    const Metadata& like,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t offset) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), like.keys, like.dtype);
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(sizes, strides, offset);
  if (like.conj) {
    impl->_set_conj(true);
  }
  if (like.neg) {
    impl->_set_neg(true);
  }
  return tensor;
}

// Raises a TypeError for a tensor that is more than one block of memory.
void check_weakable(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.layout() == c10::kStrided && tensor.has_storage(),
      "graphcache.weak_ref: a tensor of layout ", tensor.layout(),
      " has no single block of memory to alias; give it a dense (strided) tensor");
  TORCH_CHECK_TYPE(
      !tensor.is_quantized() && !tensor.is_nested(),
      "graphcache.weak_ref: quantized and nested tensors carry data beside their memory; "
      "give it the plain tensor that they are made of");
}

std::vector<at::Tensor> weak_refs(const std::vector<at::Tensor>& tensors) {
  // Outputs are few, so a linear search beats a map.
  std::vector<std::pair<c10::StorageImpl*, c10::Storage>> made;
  std::vector<at::Tensor> weak;
  weak.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    check_weakable(tensor);
    auto* owner = tensor.storage().unsafeGetStorageImpl();
    auto found = std::find_if(made.begin(), made.end(), [&](const auto& one) { return one.first == owner; });
    if (found == made.end()) {
      found = made.emplace(found, owner, weak_storage(tensor.storage(), 0, tensor.storage().nbytes()));
    }
    weak.push_back(
        over(found->second, Metadata(tensor), tensor.sizes(), tensor.strides(), tensor.storage_offset()));
  }
  return weak;
}

at::Tensor alias(
    const at::Tensor& tensor,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t offset,
    const at::Tensor& like) {
  TORCH_CHECK_VALUE(
      sizes.size() == strides.size(),
      "graphcache: " + to_string(sizes.size()) + " sizes but " + to_string(strides.size()) + " strides");
  int64_t last = offset; // in elements, the furthest one that the view reaches
  bool empty = false;
  bool negative = offset < 0;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    empty = empty || sizes[dim] == 0;
    negative = negative || sizes[dim] < 0 || strides[dim] < 0;
    last += (sizes[dim] - 1) * strides[dim];
  }
  const auto bytes = static_cast<int64_t>(tensor.storage().nbytes());
  TORCH_CHECK_VALUE(
      !negative && (empty || (last + 1) * static_cast<int64_t>(like.element_size()) <= bytes),
      "graphcache: a view of elements " + to_string(offset) + " to " + to_string(last) +
          " does not fit in a storage of " + to_string(bytes) + " bytes");
  return over(tensor.storage(), Metadata(like), sizes, strides, offset);
}

at::Tensor carve(const c10::Storage& storage, int64_t offset, int64_t nbytes) {
  const auto whole = static_cast<int64_t>(storage.nbytes());
  TORCH_CHECK_VALUE(
      offset >= 0 && nbytes >= 0 && nbytes <= whole - offset,
      "graphcache: bytes " + to_string(offset) + " to " + to_string(offset + nbytes) + " of a storage of " +
          to_string(whole));
  auto bytes = at::detail::make_tensor<c10::TensorImpl>(
      weak_storage(storage, offset, nbytes),
      c10::DispatchKeySet(at::TensorOptions(storage.device()).computeDispatchKey()),
      caffe2::TypeMeta::Make<uint8_t>());
  bytes.unsafeGetTensorImpl()->set_sizes_contiguous(nbytes);
  return bytes;
}

bool is_weak(const c10::Storage& storage) {
  // Without the checks: an expired storage refuses its pointer, but its deleter stays.
  return storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get_deleter() == &delete_nothing;
}

} // namespace graphcache
