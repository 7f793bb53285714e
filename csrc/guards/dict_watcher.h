// "Has any of these dicts changed since?", from CPython's own bookkeeping, without a look inside.
#pragma once

#include <Python.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace graphcache {

// A group of dicts that are watched together. It keeps none of them alive. The GIL is held throughout.
class DictGroup {
 public:
  DictGroup() = default;
  DictGroup(const DictGroup&) = delete;
  DictGroup& operator=(const DictGroup&) = delete;
  ~DictGroup();

  // Before Python 3.12 `clean` reads each dict, in the order of adding, up to the first that changed:
  // so each must be known to live, or be held by one that was added before it.
  void add(PyObject* dict);

  // Adds a dict that is held, unless it was added; then indexes do not count.
  void add_once(PyObject* dict);

  // Has other values of an entry not count as a change: another check looks at them.
  void ignore(PyObject* dict, PyObject* key);

  // True if none has changed since it was added, or since `rearm`. May err towards "changed".
  bool clean() const;

  // False if the dict that was added at this index was freed; such a group never gets clean again.
  bool is_alive(size_t index) const;
  // True if the dict that was added at this index changed, and lives, or may have.
  bool has_changed(size_t index) const;

  // Takes the present contents for unchanged; only while all of the dicts live.
  void rearm();

#if PY_VERSION_HEX >= 0x030C0000
 private:
  friend struct DictWatcher;

  bool ignores(PyObject* dict, PyObject* key) const;

  struct Dict {
    PyObject* dict; // null: it was freed
    bool changed;
    bool watched;
  };
  std::vector<Dict> dicts_;
  std::unordered_map<PyObject*, std::vector<PyObject*>> ignored_; // keys, which others keep alive
  bool changed_ = false;
  bool blind_ = false; // one can't be watched, or was freed
#else
 private:
  struct Version {
    PyObject* dict;
    uint64_t tag; // unique among all dicts of the process
  };
  std::vector<Version> versions_;
#endif
};

} // namespace graphcache
