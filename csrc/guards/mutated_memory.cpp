#include "guards/mutated_memory.h"

#include <algorithm>
#include <cstring>

namespace graphcache {
namespace {

// A counter is compared by its address: that is all that a version holds.
bool is_same(const c10::VariableVersion& a, const c10::VariableVersion& b) {
  static_assert(sizeof(a) == sizeof(void*));
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

} // namespace

void MutatedMemory::add_version(
    const at::Tensor& tensor, const std::vector<std::shared_ptr<StaticObject>>& objects) {
  const auto& version = tensor.unsafeGetTensorImpl()->version_counter();
  if (!version.enabled()) { // an inference tensor
    return;
  }
  for (const auto& object : objects) {
    for (size_t index = 0; index < object->versions.size(); ++index) {
      if (is_same(object->versions[index], version)) {
        versions_of_objects.emplace_back(object, index);
        return;
      }
    }
  }
  const auto is_known = [&](const auto& known) { return is_same(known, version); };
  if (std::none_of(versions.begin(), versions.end(), is_known)) { // the views of a tensor share one
    versions.push_back(version);
  }
}

void MutatedMemory::raise_versions(at::ArrayRef<const at::Tensor*> arguments) {
  for (auto& version : versions) {
    version.bump();
  }
  for (const auto index : versions_of_arguments) {
    if (auto* impl = arguments[index]->unsafeGetTensorImpl(); !impl->is_inference()) {
      impl->bump_version();
    }
  }
  for (const auto& [object, index] : versions_of_objects) {
    if (index < object->versions.size() && object->versions[index].enabled()) {
      object->versions[index].bump();
    }
  }
}

bool MutatedMemory::overlaps(at::ArrayRef<const at::Tensor*> arguments) const {
  if (external.empty() && bound.empty()) {
    return false;
  }
  return std::any_of(copied_in.begin(), copied_in.end(), [&](size_t copied) {
    const auto read = extent_of(*arguments[copied]);
    return std::any_of(
               external.begin(),
               external.end(),
               [&](const Extent& mutated) { return read.overlaps(mutated); }) ||
        std::any_of(bound.begin(), bound.end(), [&](size_t index) {
             return read.overlaps(extent_of(*arguments[index]));
           });
  });
}

} // namespace graphcache
