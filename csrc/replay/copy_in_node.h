// The first kernel of a captured graph copies the inputs in, and held outputs out. It is patched before a launch.
#pragma once

#include "driver/driver.h"
#include "replay/input_copier.h"

#include <memory>
#include <string>
#include <vector>

namespace graphcache {

// The kernel in its three forms, loaded into the current context.
class CopyInKernel {
 public:
  // `image`: copy_in_kernel.h compiled for the device, for at most `capacity` inputs.
  CopyInKernel(const std::string& image, size_t capacity);
  ~CopyInKernel();
  CopyInKernel(const CopyInKernel&) = delete;
  CopyInKernel& operator=(const CopyInKernel&) = delete;

  // `dense`: takes inputs in the short form. The other form takes moves in any case.
  driver::Function function(bool dense, bool moves) const {
    return !dense ? strided_ : moves ? dense_with_moves_ : dense_;
  }
  driver::Context context() const { return context_; }
  size_t capacity() const { return capacity_; }

 private:
  driver::Module module_ = nullptr;
  driver::Function strided_ = nullptr;
  driver::Function dense_ = nullptr;
  driver::Function dense_with_moves_ = nullptr;
  driver::Context context_ = nullptr;
  size_t capacity_;
};

class CopyInNode {
 public:
  CopyInNode(std::shared_ptr<const CopyInKernel> kernel, std::shared_ptr<InputCopier> copier);

  // Launches the kernel, so that a capture on `stream` begins with it.
  void record(driver::Stream stream);

  // Finds this node in the captured graph. The graph and its executable must outlive the node.
  void attach(driver::GraphHandle graph, driver::GraphExec executable);

  // Writes the recorded parameters into the kernel node of the executable; only later launches see them.
  void patch();

  void launch(driver::Stream stream) const;
  bool is_capturing(driver::Stream stream) const;

  // Outputs that it can move out.
  size_t room() const { return copier_->copies().empty() ? 0 : kMaxMoves; }

  // Nodes of the graph, this one included.
  size_t nodes() const { return nodes_; }

 private:
  void fill_in();

  std::shared_ptr<const CopyInKernel> kernel_;
  std::shared_ptr<InputCopier> copier_;
  std::vector<DenseInputCopy> dense_; // the parameter of the kernel in its short form
  std::vector<InputCopy> strided_; // and in its long one
  void* parameters_[2];
  driver::KernelNodeParams params_{};
  driver::GraphNode node_ = nullptr;
  driver::GraphExec executable_ = nullptr;
  size_t nodes_ = 0;
};

} // namespace graphcache
