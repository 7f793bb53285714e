// The staging node: the first kernel of a captured graph, patched before every launch.
#pragma once

#include "driver.h"
#include "stage.h"

#include <memory>
#include <string>
#include <vector>

namespace graphcache {

// The staging kernel in its two forms, loaded into the current context.
class StageKernel {
 public:
  // `image`: stage_kernel.h compiled for the device, for at most `capacity` inputs.
  StageKernel(const std::string& image, size_t capacity);
  ~StageKernel();
  StageKernel(const StageKernel&) = delete;
  StageKernel& operator=(const StageKernel&) = delete;

  driver::Function function() const { return function_; }
  driver::Function plain() const { return plain_; }
  driver::Context context() const { return context_; }
  size_t capacity() const { return capacity_; }

 private:
  driver::Module module_ = nullptr;
  driver::Function function_ = nullptr;
  driver::Function plain_ = nullptr;
  driver::Context context_ = nullptr;
  size_t capacity_;
};

class StageNode {
 public:
  StageNode(std::shared_ptr<const StageKernel> kernel, std::shared_ptr<Stage> stage);

  // Launches the kernel, so that a capture on `stream` begins with it.
  void record(driver::Stream stream);

  // Finds its node in the captured graph. Both must live as long as this is used.
  void attach(driver::GraphHandle graph, driver::GraphExec executable);

  // Brings what `Stage::read` took down into the executable; only later launches see it.
  void patch();

  void launch(driver::Stream stream) const;
  bool is_capturing(driver::Stream stream) const;

  // Nodes of the graph, this one included.
  size_t nodes() const { return nodes_; }

 private:
  void fill_in();

  std::shared_ptr<const StageKernel> kernel_;
  std::shared_ptr<Stage> stage_;
  std::vector<PlainInput> plain_; // the parameter of the kernel in its short form
  std::vector<StagedInput> staged_; // and in its long one
  void* parameters_[1];
  driver::KernelNodeParams params_{};
  driver::GraphNode node_ = nullptr;
  driver::GraphExec executable_ = nullptr;
  size_t nodes_ = 0;
};

} // namespace graphcache
