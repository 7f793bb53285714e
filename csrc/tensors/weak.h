// Tensors and their storages: weak ones, expired ones, and who owns them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Storage.h>

#include <string>
#include <vector>

namespace graphcache {

// Raises a TypeError for a tensor without one.
const c10::Storage& storage_of(const at::Tensor& tensor);

// weak.cpp: tensors that alias memory which they do not own.
std::vector<at::Tensor> weak_refs(const std::vector<at::Tensor>& tensors);
at::Tensor alias(
    const at::Tensor& tensor,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t offset,
    const at::Tensor& like);
at::Tensor carve(const c10::Storage& storage, int64_t offset, int64_t nbytes);
c10::Storage weak_storage(const c10::Storage& owner, size_t offset, size_t nbytes);
bool is_weak(const c10::Storage& storage);

// The properties of a tensor besides its memory.
struct Metadata {
  explicit Metadata(const at::Tensor& like);
  c10::DispatchKeySet keys;
  caffe2::TypeMeta dtype;
  bool conj;
  bool neg;
};
at::Tensor over(
    c10::Storage storage,
    const Metadata& like,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t offset);

// expire.cpp: storages whose data may not be touched any more.
void expire(const c10::Storage& storage, const std::string& message);
bool is_expired(const c10::Storage& storage);

// ownership.cpp: other holders of a storage, and memory of its own for a weak one.
bool is_held(const c10::Storage& storage);
void materialize(const c10::Storage& storage);
// Allocates as many bytes as the storage has, on the current stream.
c10::DataPtr memory_for(const c10::Storage& storage);
// Points the storage at memory that it owns from here on. All views follow, none is rebuilt.
void give_memory(const c10::Storage& storage, c10::DataPtr memory);

// capture/recovery.cpp: ends a failed capture.
void end_host_capture(uint64_t pool_first, uint64_t pool_second);

} // namespace graphcache
