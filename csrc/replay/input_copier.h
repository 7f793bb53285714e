// Staging: from the tensors of a call to their static buffers, as data that a kernel or the CPU follows.
#pragma once

#include "copy_in_kernel.h"

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <cstdint>
#include <string>
#include <vector>

namespace graphcache {

// What one static buffer takes.
struct StaticInput {
  at::Tensor buffer; // of this size: dense, in whatever order of dimensions
  int64_t argument; // which tensor of a call it takes
  int64_t batch_dim; // -1: none
  std::string fill; // 16 bytes: an element of a padded row, repeated
  bool edge; // instead: padded rows repeat the last one
};

class InputCopier {
 public:
  explicit InputCopier(std::vector<StaticInput> inputs);

  // Takes down where the arguments of a call lie. True if anything differs from the last call.
  // Raises the stored text if one of them has expired.
  bool read(const at::Tensor* const* arguments, int64_t batch);

  // ExpectedBytes that a launch writes: no more than padding, where buffers are given as arguments.
  int64_t copied_bytes() const;

  // Copies on the CPU what `read` took down.
  void copy() const;

  // Writes the same in the short form, if that holds it.
  bool plain(std::vector<DenseInputCopy>& plain) const;

  // How many inputs, and the blocks that a launch needs for each.
  size_t count() const { return staged_.size(); }
  unsigned blocks() const { return blocks_; }
  const std::vector<InputCopy>& staged() const { return staged_; }

 private:
  // Takes down that every buffer is given already, so that a capture needs no arguments.
  void read_nothing();
  void read_strided(InputCopy& staged, size_t index, const at::Tensor& source, int64_t batch);

  std::vector<StaticInput> inputs_;
  std::vector<c10::DimVector> orders_; // of each buffer, its dimensions from the outermost
  std::vector<InputCopy> staged_;
  unsigned blocks_ = 1;
};

} // namespace graphcache
