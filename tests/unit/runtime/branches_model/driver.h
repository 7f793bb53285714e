// The functions by which the model of the device reads the model of the driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

using Extents = std::vector<std::pair<uint64_t, uint64_t>>; // of memory: from, to

struct Node { // a kernel
  std::set<size_t> after; // what it waits for, directly
  Extents reads;
  Extents writes;
};

extern "C" {
std::vector<Node>* model_nodes();
void model_reset(bool with_waits);
void model_launch(uint64_t stream, const Extents* reads, const Extents* writes);
size_t model_record(uint64_t stream);
void model_wait(uint64_t stream, size_t event);
}
