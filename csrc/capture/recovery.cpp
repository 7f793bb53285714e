#include "tensors/weak.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Winterference-size" // about the ABI of torch's header, not ours
#endif
#include <ATen/core/CachingHostAllocator.h>

namespace graphcache {

// A capture that fails on torch 2.11 stays registered with the allocator of pinned host memory, where
// its filter goes on pointing to a graph that is gone. torch offers Python no way to end it there.
void end_host_capture(uint64_t pool_first, uint64_t pool_second) {
  const c10::MempoolId_t pool{pool_first, pool_second};
  auto* allocator = at::getHostAllocator(at::DeviceType::CUDA);
  TORCH_CHECK(allocator != nullptr, "graphcache: this build of torch has no CUDA");
  allocator->end_allocate_to_pool(pool);
  allocator->release_pool(pool);
}

} // namespace graphcache
