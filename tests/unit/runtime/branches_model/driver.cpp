// The functions of the CUDA driver that `branches.cpp` calls, by the rules of a capture: a node waits for what its stream
// waits for, and what is found out is who waits for whom. Built as libcuda.so.1; it launches nothing.
#include "driver.h"

#include <map>

namespace {

std::vector<Node> nodes;
std::map<uint64_t, std::set<size_t>> tips; // of each stream: what its next node waits for
std::vector<std::set<size_t>> events;
std::vector<uintptr_t> answer;
uint64_t streams = 1000;
bool waits = true;

} // namespace

extern "C" {

std::vector<Node>* model_nodes() {
  return &nodes;
}

void model_reset(bool with_waits) {
  nodes.clear();
  tips.clear();
  events.clear();
  waits = with_waits;
}

void model_launch(uint64_t stream, const Extents* reads, const Extents* writes) {
  nodes.push_back(Node{tips[stream], *reads, *writes});
  tips[stream] = {nodes.size() - 1};
}

size_t model_record(uint64_t stream) {
  events.push_back(tips[stream]);
  return events.size() - 1;
}

void model_wait(uint64_t stream, size_t event) {
  if (waits) {
    tips[stream].insert(events[event].begin(), events[event].end());
  }
}

int cuStreamCreate(uint64_t* stream, unsigned) {
  *stream = ++streams;
  return 0;
}

int cuStreamGetCaptureInfo_v2(
    uint64_t stream, int* status, uint64_t* id, void** graph, const uintptr_t** found, size_t* count) {
  answer.clear();
  for (const auto tip : tips[stream]) {
    answer.push_back(tip + 1); // a node is a pointer
  }
  *status = 1;
  *id = 1;
  *graph = nullptr;
  *found = answer.data();
  *count = answer.size();
  return 0;
}

#define NOT_ASKED(name) \
  int name() { return 1; }
NOT_ASKED(cuGetErrorName)
NOT_ASKED(cuGetErrorString)
NOT_ASKED(cuCtxGetCurrent)
NOT_ASKED(cuCtxPushCurrent_v2)
NOT_ASKED(cuCtxPopCurrent_v2)
NOT_ASKED(cuModuleLoadData)
NOT_ASKED(cuModuleUnload)
NOT_ASKED(cuModuleGetFunction)
NOT_ASKED(cuLaunchKernel)
NOT_ASKED(cuStreamIsCapturing)
NOT_ASKED(cuGraphGetNodes)
NOT_ASKED(cuGraphGetRootNodes)
NOT_ASKED(cuGraphNodeGetType)
NOT_ASKED(cuGraphKernelNodeGetParams_v2)
NOT_ASKED(cuGraphExecKernelNodeSetParams_v2)
NOT_ASKED(cuGraphLaunch)
}
