#include "replay/input_copier.h"

#include "tensors/strides.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace graphcache {
namespace {

constexpr int64_t kBytesPerBlock = kThreads * 16 * 4;
constexpr int64_t kMaxBlocks = 512; // enough to fill the largest GPUs

// The largest power of two, at most 16, that divides all that was or-ed into `lengths`.
int unit_of(uint64_t lengths) {
  return static_cast<int>(std::min<uint64_t>(16, lengths == 0 ? 16 : lengths & (~lengths + 1)));
}

unsigned blocks_for(int64_t bytes) {
  return static_cast<unsigned>(std::min<int64_t>((bytes + kBytesPerBlock - 1) / kBytesPerBlock, kMaxBlocks));
}

} // namespace

InputCopier::InputCopier(std::vector<StaticInput> inputs)
    : inputs_(std::move(inputs)), copies_(inputs_.size()) {
  for (size_t index = 0; index < inputs_.size(); ++index) {
    const auto& input = inputs_[index];
    auto& copy = copies_[index];
    const auto& buffer = input.buffer;
    TORCH_CHECK_VALUE(input.fill.size() == sizeof(copy.fill), "graphcache: a fill of 16 bytes");
    orders_.push_back(outermost_first(buffer.strides()));
    const bool dense = is_dense(buffer.sizes(), buffer.strides(), orders_.back());
    TORCH_CHECK_VALUE(dense, "graphcache: a static input that is not dense");
    std::memcpy(copy.fill, input.fill.data(), sizeof(copy.fill));
    copy.element = static_cast<int>(buffer.element_size());
    copy.target = static_cast<char*>(buffer.mutable_data_ptr());
    copy.bytes = buffer.numel() * copy.element;
    copy.row = copy.bytes;
    copy.period = copy.bytes;
    if (input.batch_dim >= 0 && copy.bytes > 0) {
      copy.row = buffer.stride(input.batch_dim) * copy.element;
      copy.period = copy.row * buffer.size(input.batch_dim);
    }
    copy.edge = input.edge;
    // As if every buffer was given already: a capture needs no arguments.
    copy.given = copy.period;
    copy.batch_dim = -1;
    copy.unit = copy.element;
    blocks_ = std::max(blocks_, blocks_for(copy.bytes));
  }
}

bool InputCopier::read(const at::Tensor* const* arguments, int64_t batch) {
  bool changed = false;
  for (size_t index = 0; index < inputs_.size(); ++index) {
    const auto& input = inputs_[index];
    auto& copy = copies_[index];
    const at::Tensor& source = *arguments[input.argument];
    const auto* address = static_cast<const char*>(source.const_data_ptr());
    if (!is_dense(source.sizes(), source.strides(), orders_[index])) {
      const InputCopy before = copy;
      read_strided(copy, index, source, batch);
      copy.source = address;
      changed = changed || std::memcmp(&before, &copy, sizeof(before)) != 0;
      continue;
    }
    if (address == copy.target) {
      address = nullptr;
    }
    if (copy.dims == 0 && copy.source == address && copy.batch == batch) {
      continue;
    }
    copy.source = address;
    copy.dims = 0;
    copy.batch = static_cast<unsigned>(batch);
    copy.batch_dim = -1;
    copy.given = input.batch_dim < 0 ? copy.period : copy.row * batch;
    uint64_t lengths = reinterpret_cast<uint64_t>(address) | static_cast<uint64_t>(copy.bytes);
    if (copy.given != copy.period) {
      lengths |= static_cast<uint64_t>(copy.period) | static_cast<uint64_t>(copy.given);
      lengths |= copy.edge ? static_cast<uint64_t>(copy.row) : 0;
    }
    copy.unit = unit_of(lengths);
    changed = true;
  }
  return changed;
}

// Dimensions that follow one another in the source become one; the batch stays alone, for its padding.
void InputCopier::read_strided(InputCopy& copy, size_t index, const at::Tensor& source, int64_t batch) {
  const auto& input = inputs_[index];
  copy.dims = 0;
  copy.batch_dim = -1;
  copy.batch = static_cast<unsigned>(batch);
  copy.unit = copy.element;
  bool mergeable = false;
  for (const auto dim : orders_[index]) {
    const bool is_batch = dim == input.batch_dim;
    const int64_t size = input.buffer.size(dim);
    const int64_t stride = source.stride(dim) * copy.element;
    if (size == 1 && !is_batch) {
      continue;
    }
    const int last = copy.dims - 1;
    if (mergeable && !is_batch && copy.strides[last] == stride * size &&
        copy.sizes[last] <= std::numeric_limits<unsigned>::max() / size) {
      copy.sizes[last] *= static_cast<unsigned>(size);
      copy.strides[last] = stride;
      continue;
    }
    TORCH_CHECK_VALUE(
        copy.dims < kMaxDims && size <= std::numeric_limits<unsigned>::max(),
        "graphcache: an argument with strides over too many dimensions; pass it .contiguous()");
    copy.batch_dim = is_batch ? copy.dims : copy.batch_dim;
    copy.sizes[copy.dims] = static_cast<unsigned>(size);
    copy.strides[copy.dims] = stride;
    ++copy.dims;
    mergeable = !is_batch;
  }
}

bool InputCopier::to_dense(std::vector<DenseInputCopy>& dense) const {
  for (size_t index = 0; index < copies_.size(); ++index) {
    const auto& copy = copies_[index];
    const bool padded = copy.given != copy.period;
    const bool repeats = std::memcmp(copy.fill, copy.fill + 8, 8) == 0;
    if (copy.dims != 0 || copy.bytes > std::numeric_limits<unsigned>::max() ||
        (padded && ((!copy.edge && !repeats) || copy.period != copy.bytes))) {
      return false;
    }
    auto& into = dense[index];
    into.source = copy.source;
    into.target = copy.target;
    std::memcpy(&into.fill, copy.fill, sizeof(into.fill));
    into.bytes = static_cast<unsigned>(copy.bytes);
    into.row = padded && copy.edge ? static_cast<unsigned>(copy.row) : 0;
    into.given = static_cast<unsigned>(padded ? copy.given : copy.bytes);
    into.unit = copy.unit;
  }
  return true;
}

bool InputCopier::move(const std::vector<PendingMove>& outputs) {
  if (outputs.empty() && moves_.count == 0) {
    return false;
  }
  TORCH_CHECK_VALUE(outputs.size() <= kMaxMoves, "graphcache: more outputs than one launch moves");
  const auto count = static_cast<unsigned>(outputs.size());
  bool changed = std::exchange(moves_.count, count) != count;
  move_blocks_ = 0;
  for (size_t index = 0; index < outputs.size(); ++index) {
    const auto& [storage, memory] = outputs[index];
    const OutputMove move{
        static_cast<const char*>(storage->data()), static_cast<char*>(memory.get()),
        static_cast<long long>(storage->nbytes())};
    changed = changed || std::memcmp(&moves_.moves[index], &move, sizeof(move)) != 0;
    moves_.moves[index] = move;
    move_blocks_ = std::max(move_blocks_, blocks_for(move.bytes));
  }
  return changed;
}

int64_t InputCopier::copied_bytes() const {
  int64_t bytes = 0;
  for (const auto& copy : copies_) {
    const bool given = copy.dims == 0 && copy.source == nullptr && copy.period > 0;
    bytes += copy.bytes - (given ? copy.given * (copy.bytes / copy.period) : 0);
  }
  return bytes;
}

void InputCopier::copy() const {
  for (unsigned index = 0; index < moves_.count; ++index) {
    for (long long position = 0; position < moves_.moves[index].bytes; position += kMoveUnit) {
      move_unit(moves_.moves[index], position);
    }
  }
  for (const auto& copy : copies_) {
    for (long long position = 0; position < copy.bytes; position += copy.unit) {
      const char* from = origin(copy, position);
      if (from != nullptr) {
        std::memmove(copy.target + position, from, copy.unit);
      }
    }
  }
}

} // namespace graphcache
