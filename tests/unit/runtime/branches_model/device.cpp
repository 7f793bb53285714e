// A CUDA device for a torch that has none: streams, events, an allocator with a free list for each stream
// as torch's own has, and operators that compute nothing and note what they read and write.
#include "driver.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/relu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <random>

namespace {

using at::Tensor;

int64_t current = 0; // stream
std::mt19937 chance;

bool once_in(unsigned count) {
  return chance() % count == 0;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device device() { return {c10::kCUDA, 0}; }
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, device(), id); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current, next.id()));
  }
  void record(
      void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    destroyEvent(*event, 0);
    *event = new size_t(model_record(on.id()));
  }
  void block(void* event, const c10::Stream& on) const override {
    model_wait(on.id(), *static_cast<size_t*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<size_t*>(event);
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Block {
  int64_t stream;
  size_t size;
  void* memory;
};
std::map<std::pair<int64_t, size_t>, std::vector<void*>> idle; // by stream and size

void release_lease(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  idle[{block->stream, block->size}].push_back(block->memory);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (bytes / 512 + 1) * 512;
    auto& list = idle[{current, size}];
    void* memory = list.empty() ? std::aligned_alloc(512, size) : list.back();
    if (!list.empty()) {
      list.pop_back();
    }
    return {memory, new Block{current, size, memory}, release_lease, Guard::device()};
  }
  void copy_data(void*, const void*, size_t) const override {}
} allocator;

Extents extents(std::initializer_list<Tensor> tensors) {
  Extents found;
  for (const auto& tensor : tensors) {
    const auto begin = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      last += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    found.emplace_back(begin, begin + (last + 1) * tensor.itemsize());
  }
  return found;
}

void launch(std::initializer_list<Tensor> reads, std::initializer_list<Tensor> writes) {
  const auto read = extents(reads), mutated = extents(writes);
  model_launch(current, &read, &mutated);
}

Tensor make(at::IntArrayRef sizes) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(sizes, &allocator, keys, at::kFloat, std::nullopt);
}

// Operators. Some take memory for themselves, as those of torch do now and then.

Tensor one(const Tensor& a) {
  auto out = make(a.sizes());
  const auto own = once_in(3) ? make(a.sizes()) : Tensor();
  if (own.defined()) {
    launch({a}, {own});
  }
  launch({own.defined() ? own : a}, {out});
  return out;
}

Tensor two(const Tensor& a, const Tensor& b) {
  auto out = make(a.sizes());
  b.is_cpu() ? launch({a}, {out}) : launch({a, b}, {out});
  return out;
}

Tensor sum_of(const Tensor& a, const Tensor& b, const at::Scalar&) {
  return two(a, b);
}

Tensor& add_to(Tensor& a, const Tensor& b, const at::Scalar&) {
  launch({a, b}, {a});
  return a;
}

Tensor cast(
    const Tensor& a,
    std::optional<at::ScalarType>,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    bool,
    std::optional<at::MemoryFormat>) {
  return one(a); // of the same type: nothing is computed
}

Tensor cumsum(const Tensor& a, int64_t, std::optional<at::ScalarType>) {
  return one(a);
}

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "not the shapes of a product");
  const Tensor left = once_in(3) ? at::relu(a) : a; // an operator that makes it up
  const Tensor result = once_in(4) ? make(out.sizes()) : out;
  launch({left, b}, {result});
  if (once_in(4)) {
    const auto part = make(out.sizes());
    launch({result}, {part});
    launch({part}, {result});
  }
  if (!result.is_same(out)) {
    launch({result}, {out});
  }
  return out;
}

Tensor& addmm_out(
    const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar&, const at::Scalar&, Tensor& out) {
  mm_out(a, b, out);
  launch({c, out}, {out});
  return out;
}

Tensor mm(const Tensor& a, const Tensor& b) {
  auto out = make({a.size(0), b.size(-1)});
  return mm_out(a, b, out);
}

Tensor addmm(
    const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  auto out = make({a.size(0), b.size(-1)});
  return addmm_out(c, a, b, beta, alpha, out);
}

Tensor as_strided(
    const Tensor& self, at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  at::native::setStrided(view, sizes, strides, offset.value_or(self.storage_offset()));
  return view;
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("mm", mm);
  m.impl("mm.out", mm_out);
  m.impl("addmm", addmm);
  m.impl("addmm.out", addmm_out);
  m.impl("relu", one);
  m.impl("silu", one);
  m.impl("sin", one);
  m.impl("cumsum", cumsum);
  m.impl("_to_copy", cast);
  m.impl("mul.Tensor", two);
  m.impl("add.Tensor", sum_of);
  m.impl("add_.Tensor", add_to);
  m.impl("as_strided", as_strided);
}

// The findings of the nodes

bool meet(const Extents& some, const Extents& others) {
  for (const auto& one : some) {
    for (const auto& other : others) {
      if (one.first < other.second && other.first < one.second) {
        return true;
      }
    }
  }
  return false;
}

struct Found {
  std::vector<std::pair<size_t, size_t>> races; // nodes with no order, of which one writes what the other uses
  size_t unordered = 0; // pairs of nodes
};

Found examine() {
  const auto& nodes = *model_nodes();
  std::vector<std::vector<bool>> before(nodes.size(), std::vector<bool>(nodes.size()));
  Found found;
  for (size_t late = 0; late < nodes.size(); ++late) {
    for (const auto direct : nodes[late].after) {
      before[late][direct] = true;
      for (size_t early = 0; early < direct; ++early) {
        before[late][early] = before[late][early] || before[direct][early];
      }
    }
    for (size_t early = 0; early < late; ++early) {
      if (before[late][early]) {
        continue;
      }
      const auto &first = nodes[early], &second = nodes[late];
      ++found.unordered;
      if (meet(first.writes, second.writes) || meet(first.writes, second.reads) ||
          meet(first.reads, second.writes)) {
        found.races.emplace_back(early, late);
      }
    }
  }
  return found;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::kCUDA, &allocator);
  m.def("make", [](const std::vector<int64_t>& sizes) { return make(sizes); });
  m.def("kernel", [](const Tensor& a, const Tensor& out) { launch({a}, {out}); }); // as one of Triton
  m.def("reset", [](unsigned seed, bool with_waits) {
    chance.seed(seed);
    current = 0;
    model_reset(with_waits);
  });
  m.def("use_stream", [](int64_t stream) { return std::exchange(current, stream); });
  m.def("examine", []() {
    auto found = examine();
    return py::make_tuple(std::move(found.races), found.unordered);
  });
}
