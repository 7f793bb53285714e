#include "capture/branches.h"

#include "tensors/autocast.h"

#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <array>
#include <string_view>

namespace graphcache {
namespace {

using driver::api;
using driver::check;

// Products of more rows fill the device by themselves (docs/performance.md).
constexpr int64_t kMostRows = 256;

// Tensors that are read between products are held meanwhile, so they may not be large.
constexpr size_t kMostBytes = 16 << 20;

// The dispatch keys of a tensor that is nothing but memory on the device. Any other may mean other code.
constexpr c10::DispatchKeySet kPlain({
    c10::DispatchKey::CUDA,
    c10::DispatchKey::ADInplaceOrView,
    c10::DispatchKey::AutogradCUDA,
    c10::DispatchKey::AutocastCUDA,
    c10::DispatchKey::Conjugate,
    c10::DispatchKey::Negative,
});

// Operators that may come between products: they read their arguments, make a new tensor and do nothing else.
constexpr std::array<std::string_view, 14> kKnown = {
    "aten::_to_copy", "aten::add",     "aten::gelu",     "aten::layer_norm", "aten::mean",
    "aten::mul",      "aten::neg",     "aten::pow",      "aten::relu",       "aten::rms_norm",
    "aten::rsqrt",    "aten::sigmoid", "aten::silu",     "aten::tanh",
};

// Not memory of the device, and read when it is captured.
bool is_number(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().is_cpu() && tensor.dim() == 0;
}

// Returns true if an operator is more than its kernel: casts that are cached, a handler in Python, tangents.
bool is_intercepted(c10::DeviceType type) {
  return is_autocast_enabled(type) || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

thread_local Branches* opened = nullptr;

} // namespace

driver::Stream new_stream() {
  driver::Stream stream = nullptr;
  check(api().cuStreamCreate(&stream, driver::kNonBlocking), "cuStreamCreate");
  return stream;
}

struct Branches::Part : at::ObserverContext {
  std::optional<c10::Stream> side;
  bool has_out = false;
  bool parallel = false; // to an earlier product
};

Branches::Branches(driver::Stream handle, c10::Stream main, std::vector<c10::Stream> sides)
    : handle_(handle), main_(main), sides_(std::move(sides)) {
  TORCH_CHECK_VALUE(!sides_.empty(), "graphcache: branches need a stream");
}

Branches::~Branches() {
  close();
}

void Branches::open() {
  TORCH_CHECK(opened == nullptr, "graphcache: this thread captures already");
  callback_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&on_start, &on_end)
                                             .needsInputs(true)
                                             .needsOutputs(true)
                                             .scopes({at::RecordScope::FUNCTION}));
  opened = this;
}

std::exception_ptr Branches::close() {
  if (callback_) {
    at::removeCallback(*callback_);
    callback_.reset();
    opened = nullptr;
  }
  run_.reset();
  return std::exchange(error_, nullptr);
}

// torch logs what a callback throws and goes on, so `close` returns it.
std::unique_ptr<at::ObserverContext> Branches::on_start(const at::RecordFunction& function) {
  if (opened == nullptr || opened->inside_ || opened->error_) {
    return nullptr;
  }
  try {
    return opened->start(function);
  } catch (...) {
    opened->error_ = std::current_exception();
    return nullptr;
  }
}

void Branches::on_end(const at::RecordFunction& function, at::ObserverContext* context) {
  if (opened == nullptr || context == nullptr) {
    return;
  }
  try {
    opened->end(function, static_cast<const Part&>(*context));
  } catch (...) {
    opened->error_ = std::current_exception();
  }
}

std::unique_ptr<Branches::Part> Branches::start(const at::RecordFunction& function) {
  if (run_ && !is_going_on()) {
    run_.reset(); // something else was captured, which waits for all of it: its memory may go
  }
  const std::string_view name = function.name();
  const std::string_view overload = function.overload_name();
  const bool adds = name == "aten::addmm";
  const bool is_product = (adds || name == "aten::mm") && (overload.empty() || overload == "out");
  const bool is_between = !is_product && run_ && overload.find("out") == overload.npos &&
      std::find(kKnown.begin(), kKnown.end(), name) != kKnown.end();
  if ((!is_product && !is_between) || is_intercepted(main_.device_type())) {
    return nullptr;
  }
  std::vector<at::Tensor> read;
  for (const auto& input : function.inputs()) {
    if (input.isTensor() && !(is_between && is_number(input.toTensor()))) {
      read.push_back(input.toTensor());
    }
  }
  const bool plain =
      std::all_of(read.begin(), read.end(), [this](const at::Tensor& tensor) { return is_plain(tensor); });
  if (!plain || c10::impl::VirtualGuardImpl(main_.device_type()).getStream(main_.device()) != main_) {
    return nullptr;
  }
  if (is_between) {
    return start_between(read);
  }
  const auto& rows = read.at(adds ? 1 : 0);
  if (rows.dim() != 2 || rows.size(0) > kMostRows) {
    ++large_;
    return nullptr;
  }
  return start_product(std::move(read), !overload.empty());
}

std::unique_ptr<Branches::Part> Branches::start_product(std::vector<at::Tensor> read, bool has_out) {
  std::optional<at::Tensor> out;
  if (has_out) {
    out = read.back();
    read.pop_back();
  }
  auto part = std::make_unique<Part>();
  part->has_out = has_out;
  part->parallel = may_join(read, out);
  if (!part->parallel) {
    run_.reset();
    run_.emplace(Run{c10::Event(main_.device_type()), !out});
    run_->fork.record(main_);
  }
  for (const auto& tensor : read) {
    add(tensor, run_->read);
  }
  if (part->parallel || out) {
    part->side = sides_[run_->sides++ % sides_.size()];
    run_->fork.block(*part->side);
    c10::impl::VirtualGuardImpl(main_.device_type()).exchangeStream(*part->side);
  }
  inside_ = true;
  return part;
}

std::unique_ptr<Branches::Part> Branches::start_between(const std::vector<at::Tensor>& read) {
  const auto is_large = [](const at::Tensor& tensor) { return tensor.storage().nbytes() > kMostBytes; };
  if (std::any_of(read.begin(), read.end(), is_large)) {
    ++large_;
    return nullptr; // which ends the run
  }
  for (const auto& tensor : read) {
    add(tensor, run_->read);
  }
  run_->on_main = true;
  inside_ = true;
  return std::make_unique<Part>();
}

void Branches::end(const at::RecordFunction& function, const Part& part) {
  inside_ = false;
  if (part.side) {
    c10::impl::VirtualGuardImpl(main_.device_type()).exchangeStream(main_);
    c10::Event done(main_.device_type());
    done.record(*part.side);
    done.block(main_);
  }
  const auto& outputs = function.outputs();
  if (outputs.size() != 1 || !outputs.front().isTensor()) { // it raised
    run_.reset();
    return;
  }
  const auto& output = outputs.front().toTensor();
  // Somebody gave memory away under a tensor that lives (`untyped_storage().resize_`).
  TORCH_CHECK(
      !part.side || part.has_out || !(overlap(run_->read, output) || overlap(run_->mutated, output)),
      "graphcache: a product was given memory that a parallel one uses");
  add(output, run_->mutated);
  count_ += part.parallel ? 1 : 0;
  tips_ = tips();
}

bool Branches::is_going_on() const {
  return !tips_.empty() && tips_ == tips();
}

bool Branches::may_join(const std::vector<at::Tensor>& read, const std::optional<at::Tensor>& out) const {
  // Memory that a part takes for itself goes back to its stream when it is captured, and from the main
  // stream to whoever asks next: it might be this `out`, and the part may still run.
  if (!run_ || (out && run_->on_main)) {
    return false;
  }
  const bool reads_a_result = std::any_of(read.begin(), read.end(), [this](const at::Tensor& tensor) {
    return overlap(run_->mutated, tensor);
  });
  return !reads_a_result && !(out && (overlap(run_->read, *out) || overlap(run_->mutated, *out)));
}

bool Branches::is_plain(const at::Tensor& tensor) const {
  return tensor.defined() && tensor.device() == main_.device() && tensor.has_storage() &&
      (tensor.key_set().raw_repr() & ~kPlain.raw_repr()) == 0 &&
      !(c10::GradMode::is_enabled() && tensor.requires_grad()); // its backward would run on that stream
}

// The nodes that whatever comes next on the main stream waits for: others than before, if anything was
// captured there since. None where the driver does not say.
std::vector<driver::GraphNode> Branches::tips() const {
  int status = 0;
  uint64_t id = 0;
  driver::GraphHandle graph = nullptr;
  const driver::GraphNode* nodes = nullptr;
  size_t count = 0;
  const auto result = api().cuStreamGetCaptureInfo_v2(handle_, &status, &id, &graph, &nodes, &count);
  if (result != 0 || status != driver::kCapturing) {
    return {};
  }
  std::vector<driver::GraphNode> found(nodes, nodes + count);
  std::sort(found.begin(), found.end());
  return found;
}

bool Branches::overlap(const std::vector<Extent>& extents, const at::Tensor& tensor) {
  const auto extent = extent_of(tensor);
  return std::any_of(
      extents.begin(), extents.end(), [&extent](const Extent& other) { return other.overlaps(extent); });
}

void Branches::add(const at::Tensor& tensor, std::vector<Extent>& extents) {
  extents.push_back(extent_of(tensor));
  run_->held.push_back(tensor.storage());
}

} // namespace graphcache
