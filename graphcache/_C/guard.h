#pragma once
#include <pybind11/pybind11.h>
namespace graphcache {
class Guard {
 public:
  pybind11::object stub;
  bool hold(bool grad) { using namespace pybind11::literals; return pybind11::cast<bool>(stub(pybind11::arg("grad") = grad)); }
};
}
