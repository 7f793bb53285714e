#include "guards/dict_watcher.h"

#include <algorithm>

#if PY_VERSION_HEX >= 0x030C0000
#include <unordered_map>
#endif

namespace graphcache {

#if PY_VERSION_HEX >= 0x030C0000

namespace {

using Groups = std::unordered_map<PyObject*, std::vector<DictGroup*>>;

// The groups of each watched dict. Never destroyed: dicts are freed until the very end of the process.
Groups& groups() {
  static auto& all = *new Groups;
  return all;
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

} // namespace

// CPython calls this before the change is made: no Python object is touched here, and nothing raised.
struct DictWatcher {
  static int notify(PyDict_WatchEvent event, PyObject* dict, PyObject* /*key*/, PyObject* /*value*/) {
    const auto found = groups().find(dict);
    if (found == groups().end()) {
      return 0;
    }
    const bool freed = event == PyDict_EVENT_DEALLOCATED;
    for (auto* group : found->second) {
      group->changed_ = true;
      if (freed) {
        group->blind_ = true;
        std::replace(group->dicts_.begin(), group->dicts_.end(), dict, static_cast<PyObject*>(nullptr));
      }
    }
    if (freed) {
      groups().erase(found);
    }
    return 0;
  }

  // The watcher of this process; negative where CPython has no slot left, and on 3.13.0, which does
  // not tell of attributes that are set (python/cpython issue 125608).
  static int id() {
    static const int id = [] {
      if (Py_Version >> 8 == 0x030D00) {
        return -1;
      }
      const int added = PyDict_AddWatcher(&notify);
      if (added < 0) {
        PyErr_Clear();
      }
      return added;
    }();
    return id;
  }
};

DictGroup::~DictGroup() {
  for (auto* dict : dicts_) {
    const auto found = groups().find(dict);
    if (found == groups().end()) {
      continue; // freed, added twice, or never watched
    }
    auto& watching = found->second; // perhaps without this group, of which the dict could not be watched
    const auto rest = std::remove(watching.begin(), watching.end(), this);
    if (rest == watching.end()) {
      continue;
    }
    watching.erase(rest, watching.end());
    if (watching.empty()) {
      groups().erase(found);
      // A finalizing interpreter forgets its watchers, and then frees dicts without telling.
      if (!is_finalizing() && PyDict_Unwatch(DictWatcher::id(), dict) < 0) {
        PyErr_Clear();
      }
    }
  }
}

void DictGroup::add_once(PyObject* dict) {
  if (std::find(dicts_.begin(), dicts_.end(), dict) == dicts_.end()) {
    add(dict);
  }
}

void DictGroup::add(PyObject* dict) {
  dicts_.push_back(dict);
  if (DictWatcher::id() < 0 || PyDict_Watch(DictWatcher::id(), dict) < 0) {
    PyErr_Clear();
    blind_ = changed_ = true;
    return;
  }
  groups()[dict].push_back(this);
}

bool DictGroup::clean() const {
  return !changed_;
}

bool DictGroup::is_alive(size_t index) const {
  return dicts_[index] != nullptr;
}

void DictGroup::rearm() {
  changed_ = blind_;
}

#else

namespace {

uint64_t version(PyObject* dict) {
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
}

} // namespace

DictGroup::~DictGroup() = default;

void DictGroup::add_once(PyObject* dict) {
  const auto is_same = [dict](const Version& known) { return known.dict == dict; };
  if (std::none_of(versions_.begin(), versions_.end(), is_same)) {
    add(dict);
  }
}

void DictGroup::add(PyObject* dict) {
  versions_.push_back({dict, version(dict)});
}

bool DictGroup::clean() const {
  for (const auto& [dict, tag] : versions_) {
    if (version(dict) != tag) {
      return false;
    }
  }
  return true;
}

bool DictGroup::is_alive(size_t /*index*/) const {
  return true; // whoever asks knows: a new dict at the same address has another tag
}

void DictGroup::rearm() {
  for (auto& [dict, tag] : versions_) {
    tag = version(dict);
  }
}

#endif

} // namespace graphcache
