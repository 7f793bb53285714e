// Copies the tensors of a call into static buffers, and held outputs out of the graph's memory: as data that a
// kernel or the CPU follows.
#pragma once

#include "copy_in_kernel.h"
#include "replay/stale_outputs.h"

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace graphcache {

// One static buffer, and the argument that goes there.
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

  // Records the addresses of the arguments. Returns true if any differs from the last call.
  // Raises the stored text if an argument has expired.
  bool read(const at::Tensor* const* arguments, int64_t batch);

  // Records the outputs that move. Returns true if any differs from the last call.
  bool move(const std::vector<PendingMove>& outputs);

  // Bytes that a launch writes to static buffers: no more than padding, where buffers are given as arguments.
  int64_t copied_bytes() const;

  // Copies on the CPU.
  void copy() const;

  // Writes the copies in the short form. Returns false if one of them does not fit into that.
  bool to_dense(std::vector<DenseInputCopy>& dense) const;

  const std::vector<InputCopy>& copies() const { return copies_; } // one for each input
  const OutputMoves& moves() const { return moves_; }
  unsigned blocks() const { return blocks_; } // that a launch needs for each input, without moves
  unsigned blocks_with_moves() const { return std::max(blocks_, move_blocks_); }

 private:
  void read_strided(InputCopy& copy, size_t index, const at::Tensor& source, int64_t batch);

  std::vector<StaticInput> inputs_;
  std::vector<c10::DimVector> orders_; // of each buffer, its dimensions from the outermost
  std::vector<InputCopy> copies_;
  OutputMoves moves_{};
  unsigned blocks_ = 1;
  unsigned move_blocks_ = 0;
};

} // namespace graphcache
