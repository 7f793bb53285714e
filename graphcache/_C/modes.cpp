#include "modes.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/AutogradState.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <tuple>

namespace py = pybind11;

namespace graphcache {
namespace {

uint32_t kernel_switches() {
  const auto& context = at::globalContext();
  uint32_t all = 0;
  for (const bool on :
       {context.userEnabledCuDNN(),
        context.benchmarkCuDNN(),
        context.deterministicCuDNN(),
        context.deterministicAlgorithms(),
        context.deterministicAlgorithmsWarnOnly(),
        context.userEnabledFlashSDP(),
        context.userEnabledMemEfficientSDP(),
        context.userEnabledMathSDP(),
        context.userEnabledCuDNNSDP(),
        context.userEnabledMkldnn(),
        context.allowFP16BF16ReductionMathSDP(),
        static_cast<int>(context.allowFP16ReductionCuBLAS()) != 0,
        static_cast<int>(context.allowBF16ReductionCuBLAS()) != 0}) {
    all = all << 1 | static_cast<uint32_t>(on);
  }
  return all;
}

} // namespace

std::optional<Modes> Modes::now(const py::object& device_mode) {
  using Stack = at::impl::PythonTorchFunctionTLS;
  c10::Device default_device(c10::kCPU);
  for (int64_t level = 0; level < Stack::stack_len(); ++level) {
    auto* const mode = Stack::get_stack_at(level)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != device_mode.ptr()) {
      return std::nullopt;
    }
    default_device = py::cast<c10::Device>(py::handle(mode).attr("device"));
  }
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) {
    return std::nullopt; // a tensor may have a tangent, which no graph follows
  }
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const auto& autograd = c10::AutogradState::get_tls_state();
  return Modes{
      keys.included_.raw_repr(),
      keys.excluded_.raw_repr(),
      autograd.get_grad_mode(),
      autograd.get_inference_mode(),
      at::autocast::get_autocast_dtype(at::kCUDA),
      at::autocast::get_autocast_dtype(at::kCPU),
      c10::get_default_dtype_as_scalartype(),
      static_cast<int>(at::globalContext().float32MatmulPrecision()),
      kernel_switches(),
      default_device};
}

namespace {

auto all(const Modes& modes) {
  return std::tie(
      modes.included,
      modes.excluded,
      modes.grad,
      modes.inference,
      modes.autocast_cuda,
      modes.autocast_cpu,
      modes.default_dtype,
      modes.matmul_precision,
      modes.switches,
      modes.default_device);
}

} // namespace

bool Modes::operator==(const Modes& other) const {
  return all(*this) == all(other);
}

py::tuple Modes::key() const {
  return py::make_tuple(
      included,
      excluded,
      grad,
      inference,
      static_cast<int>(autocast_cuda),
      static_cast<int>(autocast_cpu),
      static_cast<int>(default_dtype),
      matmul_precision,
      switches,
      py::cast(default_device));
}

} // namespace graphcache
