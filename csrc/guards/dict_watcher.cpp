#include "guards/dict_watcher.h"

#include <algorithm>

#include <utility>

namespace graphcache {

#if PY_VERSION_HEX >= 0x030C0000

namespace {

using Groups = std::unordered_map<PyObject*, std::vector<std::pair<DictGroup*, size_t>>>;

// The groups of each watched dict, with its index there. Never destroyed: dicts are freed until the very end of the process.
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
  static int notify(PyDict_WatchEvent event, PyObject* dict, PyObject* key, PyObject* /*value*/) {
    const auto found = groups().find(dict);
    if (found == groups().end()) {
      return 0;
    }
    const bool freed = event == PyDict_EVENT_DEALLOCATED;
    for (const auto& [group, index] : found->second) {
      if (event == PyDict_EVENT_MODIFIED && group->ignores(dict, key)) {
        continue;
      }
      group->changed_ = group->dicts_[index].changed = true;
      if (freed) {
        group->blind_ = true;
        group->dicts_[index].dict = nullptr;
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
  for (const auto& each : dicts_) {
    auto* const dict = each.dict;
    const auto found = groups().find(dict);
    if (found == groups().end()) {
      continue; // freed, added twice, or never watched
    }
    auto& watching = found->second; // perhaps without this group, of which the dict could not be watched
    const auto rest = std::remove_if(
        watching.begin(), watching.end(), [this](const auto& known) { return known.first == this; });
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
  const auto is_same = [dict](const Dict& known) { return known.dict == dict; };
  if (std::none_of(dicts_.begin(), dicts_.end(), is_same)) {
    add(dict);
  }
}

void DictGroup::add(PyObject* dict) {
  const bool watched = DictWatcher::id() >= 0 && PyDict_Watch(DictWatcher::id(), dict) >= 0;
  dicts_.push_back({dict, !watched, watched});
  if (!watched) {
    PyErr_Clear();
    blind_ = changed_ = true;
    return;
  }
  groups()[dict].emplace_back(this, dicts_.size() - 1);
}

bool DictGroup::clean() const {
  return !changed_;
}

void DictGroup::ignore(PyObject* dict, PyObject* key) {
  ignored_[dict].push_back(key);
}

bool DictGroup::ignores(PyObject* dict, PyObject* key) const {
  const auto found = ignored_.find(dict);
  return found != ignored_.end() &&
      std::find(found->second.begin(), found->second.end(), key) != found->second.end();
}

bool DictGroup::is_alive(size_t index) const {
  return dicts_[index].dict != nullptr;
}

bool DictGroup::has_changed(size_t index) const {
  return dicts_[index].changed;
}

void DictGroup::rearm() {
  changed_ = blind_;
  for (auto& each : dicts_) {
    each.changed = !each.watched;
  }
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

// The table of the dict is compared at each change instead.
void DictGroup::ignore(PyObject* /*dict*/, PyObject* /*key*/) {}

bool DictGroup::is_alive(size_t /*index*/) const {
  return true; // whoever asks knows: a new dict at the same address has another tag
}

bool DictGroup::has_changed(size_t index) const {
  return version(versions_[index].dict) != versions_[index].tag;
}

void DictGroup::rearm() {
  for (auto& [dict, tag] : versions_) {
    tag = version(dict);
  }
}

#endif

} // namespace graphcache
