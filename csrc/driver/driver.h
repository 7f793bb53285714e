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

// Raises with the name of the entry point where the driver lacks it.
void* symbol(const char* name);

#define GRAPHCACHE_ENTRY(name, ...) \
  Result (*name)(__VA_ARGS__) = reinterpret_cast<Result (*)(__VA_ARGS__)>(symbol(#name))

struct Api {
  GRAPHCACHE_ENTRY(cuGetErrorName, Result, const char**);
  GRAPHCACHE_ENTRY(cuGetErrorString, Result, const char**);
  GRAPHCACHE_ENTRY(cuCtxGetCurrent, Context*);
  GRAPHCACHE_ENTRY(cuCtxPushCurrent_v2, Context);
  GRAPHCACHE_ENTRY(cuCtxPopCurrent_v2, Context*);
  GRAPHCACHE_ENTRY(cuModuleLoadData, Module*, const void*);
  GRAPHCACHE_ENTRY(cuModuleUnload, Module);
  GRAPHCACHE_ENTRY(cuModuleGetFunction, Function*, Module, const char*);
  GRAPHCACHE_ENTRY(
      cuLaunchKernel,
      Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  GRAPHCACHE_ENTRY(cuStreamCreate, Stream*, unsigned);
  GRAPHCACHE_ENTRY(cuStreamIsCapturing, Stream, int*);
  GRAPHCACHE_ENTRY(
      cuStreamGetCaptureInfo_v2, Stream, int*, uint64_t*, GraphHandle*, const GraphNode**, size_t*);
  GRAPHCACHE_ENTRY(cuGraphGetNodes, GraphHandle, GraphNode*, size_t*);
  GRAPHCACHE_ENTRY(cuGraphGetRootNodes, GraphHandle, GraphNode*, size_t*);
  GRAPHCACHE_ENTRY(cuGraphNodeGetType, GraphNode, int*);
  GRAPHCACHE_ENTRY(cuGraphKernelNodeGetParams_v2, GraphNode, KernelNodeParams*);
  GRAPHCACHE_ENTRY(cuGraphExecKernelNodeSetParams_v2, GraphExec, GraphNode, const KernelNodeParams*);
  GRAPHCACHE_ENTRY(cuGraphLaunch, GraphExec, Stream);
};
#undef GRAPHCACHE_ENTRY

// The entry points, looked up at the first call.
const Api& api();

// Raises a RuntimeError with the name of the status unless it is success.
void check(Result status, const char* what);

} // namespace graphcache::driver
