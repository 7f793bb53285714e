#include "driver/driver.h"

#include <c10/util/Exception.h>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace graphcache::driver {

void* symbol(const char* name) {
#if defined(_WIN32)
  (void)name;
  TORCH_CHECK(false, "graphcache: no CUDA driver on this platform");
#else
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "graphcache: no CUDA driver (libcuda.so.1)");
  void* const found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, "graphcache: the CUDA driver has no ", name);
  return found;
#endif
}

const Api& api() {
  static const Api entries;
  return entries;
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
