#include "call/modes.h"

#include "guards/dict_watcher.h"
#include "tensors/autocast.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/AutogradState.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace graphcache {
namespace {

uint64_t kernel_switches(at::Context& context) {
  uint64_t all = 0;
  for (const bool on :
       {context.userEnabledCuDNN(),
        context.benchmarkCuDNN(),
        context.deterministicCuDNN(),
        context.deterministicAlgorithms(),
        context.deterministicAlgorithmsWarnOnly(),
        context.deterministicFillUninitializedMemory(),
        context.userEnabledFlashSDP(),
        context.userEnabledMemEfficientSDP(),
        context.userEnabledMathSDP(),
        context.userEnabledCuDNNSDP(),
        context.userEnabledMkldnn(),
        context.allowFP16BF16ReductionMathSDP(),
        context.allowFP16AccumulationCuBLAS()}) {
    all = all << 1 | static_cast<uint64_t>(on);
  }
  return all << 32 | static_cast<uint32_t>(context.benchmarkLimitCuDNN());
}

uint64_t kernel_choices(at::Context& context) {
  using Backend = at::Float32Backend;
  using Operation = at::Float32Op;
  uint64_t all = 0;
  for (const auto choice :
       // Not `float32MatmulPrecision`, which raises where a program sets these one by one.
       {static_cast<uint64_t>(context.float32Precision(Backend::CUDA, Operation::MATMUL)),
        static_cast<uint64_t>(context.float32Precision(Backend::CUDA, Operation::CONV)),
        static_cast<uint64_t>(context.float32Precision(Backend::CUDA, Operation::RNN)),
        static_cast<uint64_t>(context.float32Precision(Backend::MKLDNN, Operation::MATMUL)),
        static_cast<uint64_t>(context.allowFP16ReductionCuBLAS()),
        static_cast<uint64_t>(context.allowBF16ReductionCuBLAS()),
        static_cast<uint64_t>(context.linalgPreferredBackend()),
        static_cast<uint64_t>(context.blasPreferredBackend())}) {
    all = all << 4 | (choice & 0xF);
  }
  for (const auto backend : context.sDPPriorityOrder()) {
    all = all << 4 | (static_cast<uint64_t>(backend) & 0xF);
  }
  return all;
}

// The switches of torch that are globals of Python files; read again when any global there is set.
class PythonSwitches {
 public:
  PythonSwitches() {
    files_.add(mha());
    files_.add(einsum());
    read();
  }

  // Returns a number for their present values.
  size_t now() {
    if (!files_.clean()) {
      read();
    }
    return now_;
  }

 private:
  using Values = std::array<py::object, 3>;

  void read() {
    files_.rearm();
    const Values values{
        value(mha(), "_is_fastpath_enabled"), value(einsum(), "enabled"), value(einsum(), "strategy")};
    const auto found = std::find_if(known_.begin(), known_.end(), [&](const Values& known) {
      return std::equal(known.begin(), known.end(), values.begin(), [](const auto& a, const auto& b) {
        return a.equal(b);
      });
    });
    now_ = found - known_.begin();
    if (found == known_.end()) {
      known_.push_back(values);
    }
  }

  static PyObject* globals_of(const char* file, const char* function) {
    return py::object(py::module_::import(file).attr(function).attr("__globals__")).ptr();
  }
  static PyObject* mha() { return globals_of("torch.backends.mha", "get_fastpath_enabled"); }
  static PyObject* einsum() { return globals_of("torch.backends.opt_einsum", "_get_strategy"); }

  static py::object value(PyObject* globals, const char* name) {
    auto* found = PyDict_GetItemString(globals, name);
    return found == nullptr ? py::none() : py::reinterpret_borrow<py::object>(found);
  }

  DictGroup files_;
  std::vector<Values> known_;
  size_t now_ = 0;
};

size_t switches_in_python() {
  static auto* const switches = new PythonSwitches; // Python may be gone when the process ends
  return switches->now();
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
  auto& context = at::globalContext();
  return Modes{
      keys.included_.raw_repr(),
      keys.excluded_.raw_repr(),
      autograd.get_grad_mode(),
      autograd.get_inference_mode(),
      static_cast<int>(autocast_dtype(c10::kCUDA)),
      static_cast<int>(autocast_dtype(c10::kCPU)),
      static_cast<int>(c10::get_default_dtype_as_scalartype()),
      kernel_switches(context),
      kernel_choices(context),
      switches_in_python(),
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
      modes.switches,
      modes.choices,
      modes.python_switches,
      modes.default_device);
}

} // namespace

bool Modes::operator==(const Modes& other) const {
  return all(*this) == all(other);
}

py::tuple Modes::key() const {
  return py::cast(all(*this));
}

} // namespace graphcache
