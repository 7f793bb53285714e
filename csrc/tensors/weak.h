// What the native helper offers to Python, one group a source file.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Storage.h>

#include <string>
#include <vector>

namespace graphcache {

// weak.cpp: tensors that alias memory which they do not own.
void check_weakable(const at::Tensor& tensor);
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

// What a tensor is besides its source.
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

// expire.cpp: tensors whose data may not be touched any more.
void expire(const at::Tensor& tensor, const std::string& message);
bool is_expired(const at::Tensor& tensor);
bool is_expired(const c10::Storage& storage);

// ownership.cpp: who else holds a storage, and memory of its own for a weak one.
int64_t storage_key(const at::Tensor& tensor);
bool is_held(const c10::Storage& storage);
void materialize(const c10::Storage& storage);

// recovery.cpp: what a failed capture leaves behind.
void end_host_capture(uint64_t pool_first, uint64_t pool_second);

} // namespace graphcache
