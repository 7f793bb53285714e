// The thread-local modes of torch that decide what a forward does.
#pragma once

#include <c10/core/Device.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstdint>
#include <optional>

namespace graphcache {

struct Modes {
  uint64_t included; // dispatch keys: autocast, inference mode, tracing, functorch, Python modes
  uint64_t excluded;
  bool grad;
  bool inference;
  int autocast_cuda; // dtypes
  int autocast_cpu;
  int default_dtype;
  uint64_t switches; // of torch.backends: which kernels may be taken
  uint64_t choices; // likewise, where there are more than two
  size_t python_switches; // likewise, those in Python; by number

  c10::Device default_device; // torch.set_default_device

  // `device_mode`: the type of torch's own mode for that. Nothing where Python has to look:
  // another TorchFunctionMode is active, or forward-mode differentiation.
  static std::optional<Modes> now(const pybind11::object& device_mode);
  bool operator==(const Modes& other) const;

  // The same for Python: equal and hashable where these are equal.
  pybind11::tuple key() const;
};

} // namespace graphcache
