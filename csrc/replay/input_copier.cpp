#include "replay/input_copier.h"

#include "tensors/strides.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace graphcache {
namespace {

constexpr int64_t kBytesPerBlock = kThreads * 16 * 4;
constexpr int64_t kMaxBlocks = 512; // enough to fill the largest GPUs

bool is_dense(const at::Tensor& tensor, c10::IntArrayRef order) {
  return graphcache::is_dense(tensor.sizes(), tensor.strides(), order);
}

// The largest power of two, at most 16, that divides all that was or-ed into `lengths`.
int unit_of(uint64_t lengths) {
  return static_cast<int>(std::min<uint64_t>(16, lengths == 0 ? 16 : lengths & (~lengths + 1)));
}

} // namespace

InputCopier::InputCopier(std::vector<StaticInput> inputs)
    : inputs_(std::move(inputs)), staged_(inputs_.size()) {
  for (size_t index = 0; index < inputs_.size(); ++index) {
    const auto& input = inputs_[index];
    auto& staged = staged_[index];
    const auto& buffer = input.buffer;
    TORCH_CHECK_VALUE(input.fill.size() == sizeof(staged.fill), "graphcache: a fill of 16 bytes");
    orders_.push_back(outermost_first(buffer.strides()));
    TORCH_CHECK_VALUE(is_dense(buffer, orders_.back()), "graphcache: a static input that is not dense");
    std::memcpy(staged.fill, input.fill.data(), sizeof(staged.fill));
    staged.element = static_cast<int>(buffer.element_size());
    staged.target = static_cast<char*>(buffer.mutable_data_ptr());
    staged.bytes = buffer.numel() * staged.element;
    staged.row = staged.bytes;
    staged.period = staged.bytes;
    if (input.batch_dim >= 0 && staged.bytes > 0) {
      staged.row = buffer.stride(input.batch_dim) * staged.element;
      staged.period = staged.row * buffer.size(input.batch_dim);
    }
    staged.edge = input.edge;
    const int64_t wanted = (staged.bytes + kBytesPerBlock - 1) / kBytesPerBlock;
    blocks_ = std::max(blocks_, static_cast<unsigned>(std::min<int64_t>(wanted, kMaxBlocks)));
  }
  read_nothing();
}

void InputCopier::read_nothing() {
  for (auto& staged : staged_) {
    staged.source = nullptr;
    staged.given = staged.period;
    staged.dims = 0;
    staged.batch = 0;
    staged.batch_dim = -1;
    staged.unit = staged.element;
  }
}

bool InputCopier::read(const at::Tensor* const* arguments, int64_t batch) {
  bool changed = false;
  for (size_t index = 0; index < inputs_.size(); ++index) {
    const auto& input = inputs_[index];
    auto& staged = staged_[index];
    const at::Tensor& source = *arguments[input.argument];
    const auto* address = static_cast<const char*>(source.const_data_ptr());
    if (!is_dense(source, orders_[index])) {
      const InputCopy before = staged;
      read_strided(staged, index, source, batch);
      staged.source = address;
      changed = changed || std::memcmp(&before, &staged, sizeof(before)) != 0;
      continue;
    }
    if (address == staged.target) {
      address = nullptr;
    }
    if (staged.dims == 0 && staged.source == address && staged.batch == batch) {
      continue;
    }
    staged.source = address;
    staged.dims = 0;
    staged.batch = static_cast<unsigned>(batch);
    staged.batch_dim = -1;
    staged.given = input.batch_dim < 0 ? staged.period : staged.row * batch;
    uint64_t lengths = reinterpret_cast<uint64_t>(address) | static_cast<uint64_t>(staged.bytes);
    if (staged.given != staged.period) {
      lengths |= static_cast<uint64_t>(staged.period) | static_cast<uint64_t>(staged.given);
      lengths |= staged.edge ? static_cast<uint64_t>(staged.row) : 0;
    }
    staged.unit = unit_of(lengths);
    changed = true;
  }
  return changed;
}

// Dimensions that follow one another in the source become one; the batch stays alone, for its padding.
void InputCopier::read_strided(InputCopy& staged, size_t index, const at::Tensor& source, int64_t batch) {
  const auto& input = inputs_[index];
  staged.dims = 0;
  staged.batch_dim = -1;
  staged.batch = static_cast<unsigned>(batch);
  staged.unit = staged.element;
  bool mergeable = false;
  for (const auto dim : orders_[index]) {
    const bool is_batch = dim == input.batch_dim;
    const int64_t size = input.buffer.size(dim);
    const int64_t stride = source.stride(dim) * staged.element;
    if (size == 1 && !is_batch) {
      continue;
    }
    const int last = staged.dims - 1;
    if (mergeable && !is_batch && staged.strides[last] == stride * size &&
        staged.sizes[last] <= std::numeric_limits<unsigned>::max() / size) {
      staged.sizes[last] *= static_cast<unsigned>(size);
      staged.strides[last] = stride;
      continue;
    }
    TORCH_CHECK_VALUE(
        staged.dims < kMaxDims && size <= std::numeric_limits<unsigned>::max(),
        "graphcache: an argument with strides over too many dimensions; pass it .contiguous()");
    staged.batch_dim = is_batch ? staged.dims : staged.batch_dim;
    staged.sizes[staged.dims] = static_cast<unsigned>(size);
    staged.strides[staged.dims] = stride;
    ++staged.dims;
    mergeable = !is_batch;
  }
}

bool InputCopier::plain(std::vector<DenseInputCopy>& plain) const {
  for (size_t index = 0; index < staged_.size(); ++index) {
    const auto& staged = staged_[index];
    const bool padded = staged.given != staged.period;
    const bool repeats = std::memcmp(staged.fill, staged.fill + 8, 8) == 0;
    if (staged.dims != 0 || staged.bytes > std::numeric_limits<unsigned>::max() ||
        (padded && ((!staged.edge && !repeats) || staged.period != staged.bytes))) {
      return false;
    }
    auto& into = plain[index];
    into.source = staged.source;
    into.target = staged.target;
    std::memcpy(&into.fill, staged.fill, sizeof(into.fill));
    into.bytes = static_cast<unsigned>(staged.bytes);
    into.row = padded && staged.edge ? static_cast<unsigned>(staged.row) : 0;
    into.given = static_cast<unsigned>(padded ? staged.given : staged.bytes);
    into.unit = staged.unit;
  }
  return true;
}

int64_t InputCopier::copied_bytes() const {
  int64_t bytes = 0;
  for (const auto& staged : staged_) {
    const bool given = staged.dims == 0 && staged.source == nullptr && staged.period > 0;
    bytes += staged.bytes - (given ? staged.given * (staged.bytes / staged.period) : 0);
  }
  return bytes;
}

void InputCopier::copy() const {
  for (const auto& staged : staged_) {
    for (long long position = 0; position < staged.bytes; position += staged.unit) {
      const char* from = origin(staged, position);
      if (from != nullptr) {
        std::memmove(staged.target + position, from, staged.unit);
      }
    }
  }
}

} // namespace graphcache
