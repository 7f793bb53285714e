#include "driver/driver.h"

#include <c10/util/Exception.h>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace graphcache::driver {
namespace {

void* symbol(const char* name) {
#if defined(_WIN32)
  (void)name;
  TORCH_CHECK(false, "graphcache: staging nodes are not supported on this platform");
#else
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "graphcache: no CUDA driver (libcuda.so.1)");
  void* const found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, "graphcache: the CUDA driver has no ", name);
  return found;
#endif
}

Api look_up() {
  Api api{};
#define GRAPHCACHE_LOOK_UP(name) api.name = reinterpret_cast<decltype(api.name)>(symbol(#name))
  GRAPHCACHE_LOOK_UP(cuGetErrorName);
  GRAPHCACHE_LOOK_UP(cuGetErrorString);
  GRAPHCACHE_LOOK_UP(cuCtxGetCurrent);
  GRAPHCACHE_LOOK_UP(cuCtxPushCurrent_v2);
  GRAPHCACHE_LOOK_UP(cuCtxPopCurrent_v2);
  GRAPHCACHE_LOOK_UP(cuModuleLoadData);
  GRAPHCACHE_LOOK_UP(cuModuleUnload);
  GRAPHCACHE_LOOK_UP(cuModuleGetFunction);
  GRAPHCACHE_LOOK_UP(cuLaunchKernel);
  GRAPHCACHE_LOOK_UP(cuStreamCreate);
  GRAPHCACHE_LOOK_UP(cuStreamIsCapturing);
  GRAPHCACHE_LOOK_UP(cuStreamGetCaptureInfo_v2);
  GRAPHCACHE_LOOK_UP(cuGraphGetNodes);
  GRAPHCACHE_LOOK_UP(cuGraphGetRootNodes);
  GRAPHCACHE_LOOK_UP(cuGraphNodeGetType);
  GRAPHCACHE_LOOK_UP(cuGraphKernelNodeGetParams_v2);
  GRAPHCACHE_LOOK_UP(cuGraphExecKernelNodeSetParams_v2);
  GRAPHCACHE_LOOK_UP(cuGraphLaunch);
#undef GRAPHCACHE_LOOK_UP
  return api;
}

} // namespace

const Api& api() {
  static const Api found = look_up();
  return found;
}

void check(Result status, const char* what) {
  if (status == 0) {
    return;
  }
  const char* name = nullptr;
  const char* text = nullptr;
  api().cuGetErrorName(status, &name);
  api().cuGetErrorString(status, &text);
  TORCH_CHECK(
      false,
      "graphcache: ", what, " failed with ",
      name == nullptr ? "an unknown CUDA error" : name,
      text == nullptr ? "" : std::string(" (") + text + ")");
}

} // namespace graphcache::driver
