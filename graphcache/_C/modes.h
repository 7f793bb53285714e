// The thread-local modes of torch that decide what a forward does.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>

namespace graphcache {

struct Modes {
  uint64_t included; // dispatch keys: autocast, inference mode, tracing, functorch, Python modes
  uint64_t excluded;
  bool grad;
  bool inference;
  c10::ScalarType autocast_cuda;
  c10::ScalarType autocast_cpu;
  c10::ScalarType default_dtype;
  int matmul_precision;

  c10::Device default_device; // torch.set_default_device

  // `device_mode`: the type of torch's own mode for that. Nothing where another TorchFunctionMode is
  // active, which Python has to look at.
  static std::optional<Modes> now(const pybind11::object& device_mode);
  bool operator==(const Modes& other) const;

  // The same for Python: equal and hashable where these are equal.
  pybind11::tuple key() const;
};

} // namespace graphcache
