// The version counters of tensors, which torch advances with each write in place that it knows of.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace graphcache {

// Keeps no tensor alive. An inference tensor has no counter, and `.data` has another one than its tensor.
class Versions {
 public:
  explicit Versions(const std::vector<at::Tensor>& tensors) {
    for (const auto& tensor : tensors) {
      counters_.push_back(tensor.unsafeGetTensorImpl()->version_counter());
    }
  }

  std::vector<int64_t> current() const {
    std::vector<int64_t> versions;
    for (const auto& counter : counters_) {
      versions.push_back(counter.enabled() ? counter.current_version() : 0);
    }
    return versions;
  }

  // Never the same again after a write, as counters only grow.
  int64_t sum() const {
    int64_t sum = dropped_;
    for (const auto& counter : counters_) {
      sum += counter.enabled() ? counter.current_version() : 0;
    }
    return sum;
  }

  void drop(size_t index) {
    auto& counter = counters_.at(index);
    dropped_ += counter.enabled() ? counter.current_version() : 0; // so that the sum stays
    counter = c10::VariableVersion();
  }

 private:
  int64_t dropped_ = 0;
  std::vector<c10::VariableVersion> counters_;
};

} // namespace graphcache
