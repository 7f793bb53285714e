#include "replay/copy_in_node.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace graphcache {
namespace {

using driver::api;
using driver::check;

// Another thread, or another device, may have made another context current, or none at all.
class InContext {
 public:
  explicit InContext(driver::Context wanted) {
    driver::Context current = nullptr;
    check(api().cuCtxGetCurrent(&current), "cuCtxGetCurrent");
    if (current != wanted) {
      check(api().cuCtxPushCurrent_v2(wanted), "cuCtxPushCurrent");
      pushed_ = true;
    }
  }
  ~InContext() {
    if (pushed_) {
      driver::Context popped = nullptr;
      api().cuCtxPopCurrent_v2(&popped);
    }
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  bool pushed_ = false;
};

} // namespace

CopyInKernel::CopyInKernel(const std::string& image, size_t capacity) : capacity_(capacity) {
  check(api().cuCtxGetCurrent(&context_), "cuCtxGetCurrent");
  check(api().cuModuleLoadData(&module_, image.data()), "cuModuleLoadData");
  const auto load = [&](driver::Function& function, const char* name) {
    check(api().cuModuleGetFunction(&function, module_, name), "cuModuleGetFunction");
  };
  load(strided_, "graphcache_copy_in");
  load(dense_, "graphcache_copy_in_dense");
  load(dense_with_moves_, "graphcache_move_dense");
}

CopyInKernel::~CopyInKernel() {
  if (module_ != nullptr) {
    api().cuModuleUnload(module_); // at exit the driver may be gone already, and its memory with it
  }
}

CopyInNode::CopyInNode(std::shared_ptr<const CopyInKernel> kernel, std::shared_ptr<InputCopier> copier)
    : kernel_(std::move(kernel)), copier_(std::move(copier)) {
  TORCH_CHECK_VALUE(
      copier_->copies().size() <= kernel_->capacity(), "graphcache: more inputs than the kernel takes");
  dense_.resize(kernel_->capacity());
  strided_.resize(kernel_->capacity());
  params_.block[0] = kThreads;
  params_.grid[2] = params_.block[1] = params_.block[2] = 1;
  params_.parameters = parameters_;
  parameters_[1] = const_cast<OutputMoves*>(&copier_->moves()); // the driver copies it
}

void CopyInNode::fill_in() {
  const auto& moves = copier_->moves();
  const bool dense = copier_->to_dense(dense_);
  params_.function = kernel_->function(dense, moves.count != 0);
  params_.grid[0] = moves.count == 0 ? copier_->blocks() : copier_->blocks_with_moves();
  params_.grid[1] = static_cast<unsigned>(copier_->copies().size()) + moves.count;
  parameters_[0] = dense ? static_cast<void*>(dense_.data()) : strided_.data();
  if (!dense) {
    std::copy(copier_->copies().begin(), copier_->copies().end(), strided_.begin());
  }
}

void CopyInNode::record(driver::Stream stream) {
  if (copier_->copies().empty()) {
    return;
  }
  fill_in();
  const InContext here(kernel_->context());
  check(
      api().cuLaunchKernel(
          params_.function, params_.grid[0], params_.grid[1], 1, kThreads, 1, 1, 0, stream, parameters_, nullptr),
      "cuLaunchKernel");
}

void CopyInNode::attach(driver::GraphHandle graph, driver::GraphExec executable) {
  const InContext here(kernel_->context());
  check(api().cuGraphGetNodes(graph, nullptr, &nodes_), "cuGraphGetNodes");
  executable_ = executable;
  if (copier_->copies().empty()) {
    return;
  }
  size_t count = 0;
  check(api().cuGraphGetRootNodes(graph, nullptr, &count), "cuGraphGetRootNodes");
  std::vector<driver::GraphNode> roots(count);
  check(api().cuGraphGetRootNodes(graph, roots.data(), &count), "cuGraphGetRootNodes");
  for (auto* const root : roots) {
    int type = -1;
    check(api().cuGraphNodeGetType(root, &type), "cuGraphNodeGetType");
    driver::KernelNodeParams found{};
    if (type == driver::kKernelNode) {
      check(api().cuGraphKernelNodeGetParams_v2(root, &found), "cuGraphKernelNodeGetParams");
    }
    if (found.function == params_.function) {
      node_ = root;
    }
  }
  TORCH_CHECK(node_ != nullptr, "graphcache: the captured graph does not begin with the copies of its inputs");
}

void CopyInNode::patch() {
  if (copier_->copies().empty()) {
    return;
  }
  fill_in();
  const InContext here(kernel_->context());
  check(
      api().cuGraphExecKernelNodeSetParams_v2(executable_, node_, &params_),
      "cuGraphExecKernelNodeSetParams");
}

void CopyInNode::launch(driver::Stream stream) const {
  const InContext here(kernel_->context());
  check(api().cuGraphLaunch(executable_, stream), "cuGraphLaunch");
}

bool CopyInNode::is_capturing(driver::Stream stream) const {
  const InContext here(kernel_->context());
  int status = 0;
  check(api().cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

} // namespace graphcache
