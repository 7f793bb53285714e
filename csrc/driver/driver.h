// The CUDA driver, looked up at run time: nothing here needs the CUDA toolkit to be built.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace graphcache::driver {

// The driver's own types and values, as its ABI has them since CUDA 12.0.
using Result = int;
using Context = struct ContextHandle*;
using Module = struct ModuleHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;
using GraphHandle = struct GraphOpaque*;
using GraphNode = struct GraphNodeHandle*;
using GraphExec = struct GraphExecHandle*;

struct KernelNodeParams { // CUDA_KERNEL_NODE_PARAMS_v2
  Function function;
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_memory;
  void** parameters;
  void** extra;
  void* kernel;
  Context context;
};

constexpr int kKernelNode = 0; // CU_GRAPH_NODE_TYPE_KERNEL
constexpr int kCapturing = 1; // CU_STREAM_CAPTURE_STATUS_ACTIVE
constexpr unsigned kNonBlocking = 1; // CU_STREAM_NON_BLOCKING

struct Api {
  Result (*cuGetErrorName)(Result, const char**);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxPushCurrent_v2)(Context);
  Result (*cuCtxPopCurrent_v2)(Context*);
  Result (*cuModuleLoadData)(Module*, const void*);
  Result (*cuModuleUnload)(Module);
  Result (*cuModuleGetFunction)(Function*, Module, const char*);
  Result (*cuLaunchKernel)(
      Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  Result (*cuStreamCreate)(Stream*, unsigned);
  Result (*cuStreamIsCapturing)(Stream, int*);
  Result (*cuStreamGetCaptureInfo_v2)(Stream, int*, uint64_t*, GraphHandle*, const GraphNode**, size_t*);
  Result (*cuGraphGetNodes)(GraphHandle, GraphNode*, size_t*);
  Result (*cuGraphGetRootNodes)(GraphHandle, GraphNode*, size_t*);
  Result (*cuGraphNodeGetType)(GraphNode, int*);
  Result (*cuGraphKernelNodeGetParams_v2)(GraphNode, KernelNodeParams*);
  Result (*cuGraphExecKernelNodeSetParams_v2)(GraphExec, GraphNode, const KernelNodeParams*);
  Result (*cuGraphLaunch)(GraphExec, Stream);
};

// The entry points; raises with the name of what is missing where the driver lacks one.
const Api& api();

// Raises a RuntimeError with the name of the status unless it is success.
void check(Result status, const char* what);

} // namespace graphcache::driver
