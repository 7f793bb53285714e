#include "replay/result.h"

#include "tensors/python_tensor.h"
#include "tensors/strides.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <optional>

namespace py = pybind11;

namespace graphcache {

Result::Result(Layout layout, std::vector<Output> outputs, bool copy)
    : layout_(std::move(layout)), outputs_(std::move(outputs)), shared_(std::make_shared<SharedOutputs>()) {
  shared_->copy = copy;
  for (const auto& output : outputs_) {
    metadata_.emplace_back(output.tensor);
    groups_.push_back(-1);
    if (output.kind != Output::Pool) {
      continue;
    }
    const auto& storage = output.tensor.storage();
    const auto known = std::find_if(first_.begin(), first_.end(), [&](const c10::Storage& first) {
      return first.is_alias_of(storage);
    });
    groups_.back() = static_cast<int>(known - first_.begin());
    if (known == first_.end()) {
      first_.push_back(storage);
    }
  }
  shared_->storages.resize(first_.size());
}

namespace {

// By torch's own operation where it has one, so that it is a view as eager gives it.
at::Tensor view(const at::Tensor& base, const at::Tensor& like, int64_t offset) {
  return base.scalar_type() == like.scalar_type()
      ? at::as_strided(base, like.sizes(), like.strides(), offset)
      : alias(base, like.sizes(), like.strides(), offset, like);
}

} // namespace

void Result::set_batch_dims(const std::vector<std::vector<int64_t>>& dims) {
  for (size_t index = 0; index < outputs_.size(); ++index) {
    outputs_[index].batch_dims = dims.at(index);
  }
}

py::object Result::give(
    int64_t batch, int64_t size, const Leaves& arguments, const Origin& made_by, Lane& lane) {
  for (size_t group = 0; group < first_.size(); ++group) {
    auto& storage = shared_->storages[group];
    if (!storage || is_expired(storage)) { // by the user's own hand
      storage = weak_storage(first_[group], 0, first_[group].nbytes());
    }
  }
  shared_->origin = made_by;
  shared_->stream = first_.empty() ? std::nullopt : current_stream_of(first_.front().device());
  lane.track(shared_); // first: to build the result may run Python code, which may call other graphs
  made_.clear();
  for (size_t index = 0; index < outputs_.size(); ++index) {
    made_.push_back(tensor(index, batch, size, arguments));
  }
  auto next = made_.cbegin();
  auto result = layout_.build(next);
  made_.clear();
  return result;
}

py::object Result::tensor(
    size_t index, int64_t batch, int64_t size, const Leaves& arguments) const {
  const auto& output = outputs_[index];
  const auto& captured = output.tensor;
  switch (output.kind) {
    case Output::External:
      return output.object;
    case Output::Argument:
      return py::reinterpret_borrow<py::object>(arguments.objects[output.argument]);
    case Output::Constant:
      return py::cast(captured.clone());
    case Output::ExternalView:
      return py::cast(view(captured, captured, captured.storage_offset()));
    case Output::ArgumentView: {
      const auto& base = *arguments.tensors[output.argument];
      return py::cast(view(base, captured, base.storage_offset() + captured.storage_offset()));
    }
    default: {
      // Eager returns a view of the argument then, which is an inference tensor if that is one.
      std::optional<c10::InferenceMode> as_argument;
      if (output.argument >= 0) {
        as_argument.emplace(arguments.tensors[output.argument]->is_inference());
      }
      const bool whole = batch == size || output.batch_dims.empty();
      return py::reinterpret_steal<py::object>(
          to_python(whole ? part(index, captured.sizes()) : cut(index, batch)));
    }
  }
}

at::Tensor Result::part(size_t index, at::IntArrayRef sizes) const {
  const auto& whole = outputs_[index].tensor;
  return over(
      shared_->storages[groups_[index]], metadata_[index], sizes, whole.strides(), whole.storage_offset());
}

// With the strides that eager gives: copied, unless only outer rows were cut.
at::Tensor Result::cut(size_t index, int64_t batch) const {
  const auto& output = outputs_[index];
  const auto& whole = output.tensor;
  c10::DimVector sizes(whole.sizes());
  for (const auto dim : output.batch_dims) {
    sizes[dim] = batch;
  }
  auto cut = part(index, sizes);
  const auto order = outermost_first(whole.strides());
  if (is_dense(sizes, whole.strides(), order) || !is_dense(whole.sizes(), whole.strides(), order)) {
    return cut;
  }
  c10::DimVector strides(sizes.size());
  int64_t run = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides[*dim] = run;
    run *= std::max<int64_t>(sizes[*dim], 1);
  }
  return at::empty_strided(sizes, strides, cut.options()).copy_(cut);
}

} // namespace graphcache
