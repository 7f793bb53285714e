// The Python face of the copies that bring arguments into static inputs.
#include "bindings/bindings.h"
#include "replay/copy_in_node.h"
#include "tensors/weak.h"

namespace graphcache {

void bind_inputs(py::module_& m) {
  py::class_<StaticInput>(m, "StaticInput")
      .def(
          py::init<at::Tensor, int64_t, int64_t, std::string, bool>(),
          "buffer"_a, "argument"_a, "batch_dim"_a, "fill"_a, "edge"_a);
  py::class_<InputCopier, std::shared_ptr<InputCopier>>(m, "InputCopier")
      .def(py::init<std::vector<StaticInput>>(), "inputs"_a)
      .def(
          "read",
          [](InputCopier& copier, const py::list& tensors, int64_t batch) {
            return copier.read(leaves_of(tensors).tensors.data(), batch);
          },
          "tensors"_a, "batch"_a)
      .def(
          "move",
          [](InputCopier& copier, const std::vector<std::pair<at::Tensor, at::Tensor>>& outputs) {
            std::vector<c10::Storage> storages;
            std::vector<PendingMove> moves;
            storages.reserve(outputs.size());
            for (const auto& [output, memory] : outputs) {
              storages.push_back(storage_of(output));
              moves.push_back({&storages.back(), c10::DataPtr(memory.mutable_data_ptr(), memory.device())});
            }
            return copier.move(moves);
          },
          "outputs"_a)
      .def("copy", &InputCopier::copy)
      .def("copied_bytes", &InputCopier::copied_bytes)
      .def_property_readonly("count", [](const InputCopier& copier) { return copier.copies().size(); });
  py::class_<CopyInKernel, std::shared_ptr<CopyInKernel>>(m, "CopyInKernel")
      .def(py::init<std::string, size_t>(), "image"_a, "capacity"_a);
  py::class_<CopyInNode, std::shared_ptr<CopyInNode>>(m, "CopyInNode")
      .def(py::init<std::shared_ptr<CopyInKernel>, std::shared_ptr<InputCopier>>(), "kernel"_a, "copier"_a)
      .def(
          "record",
          [](CopyInNode& node, int64_t stream) { node.record(reinterpret_cast<driver::Stream>(stream)); },
          "stream"_a)
      .def(
          "attach",
          [](CopyInNode& node, int64_t graph, int64_t executable) {
            node.attach(
                reinterpret_cast<driver::GraphHandle>(graph), reinterpret_cast<driver::GraphExec>(executable));
          },
          "graph"_a, "executable"_a)
      .def_property_readonly("nodes", &CopyInNode::nodes);
  m.def("check_driver", [] { driver::api(); });
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("INPUT_BYTES") = sizeof(InputCopy);
  m.attr("MOVES_BYTES") = sizeof(OutputMoves);
  m.attr("MAX_MOVES") = kMaxMoves;
}

} // namespace graphcache
