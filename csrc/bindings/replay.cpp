// The Python face of staging, branches, buckets and dispatch.
#include "capture/branches.h"
#include "replay/dispatcher.h"
#include "tensors/python_tensor.h"

namespace py = pybind11;

namespace graphcache {
namespace {

// What `__call__` finds its dispatcher by.
py::object capsule_of(const std::shared_ptr<Dispatcher>& dispatcher) {
  // It keeps the dispatcher alive.
  auto capsule = py::reinterpret_steal<py::object>(
      PyCapsule_New(dispatcher.get(), nullptr, [](PyObject* capsule) {
        delete static_cast<std::shared_ptr<Dispatcher>*>(PyCapsule_GetContext(capsule));
      }));
  PyCapsule_SetContext(capsule.ptr(), new std::shared_ptr<Dispatcher>(dispatcher));
  return capsule;
}

Leaves leaves_of(const py::list& tensors) {
  Leaves leaves;
  for (const auto tensor : tensors) {
    TORCH_CHECK_TYPE(is_tensor(tensor.ptr()), "graphcache: expected tensors");
    leaves.add(tensor.ptr());
  }
  return leaves;
}

void bind_lane(py::module_& m) {
  py::class_<PoolLock, std::shared_ptr<PoolLock>>(m, "PoolLock")
      .def(py::init<>())
      .def("__enter__", &PoolLock::lock, py::call_guard<py::gil_scoped_release>())
      .def("__exit__", [](PoolLock& lock, const py::args&) { lock.unlock(); })
      // In a forked child the owner of a held lock is nobody.
      .def("renew", [](PoolLock& lock) { new (&lock) PoolLock; });
  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
      .def(py::init<>())
      .def_readwrite("stream", &Lane::stream)
      .def("holds_outputs", &Lane::holds_outputs)
      .def("is_held_elsewhere", &Lane::is_held_elsewhere);
}

void bind_input_copier(py::module_& m) {
  py::class_<InputCopier, std::shared_ptr<InputCopier>>(m, "InputCopier")
      .def(
          py::init([](const std::vector<at::Tensor>& buffers,
                      const std::vector<int64_t>& arguments,
                      const std::vector<int64_t>& batch_dims,
                      const std::vector<std::string>& fills,
                      const std::vector<bool>& edges) {
            std::vector<StaticInput> inputs;
            for (size_t index = 0; index < buffers.size(); ++index) {
              inputs.push_back(StaticInput{
                  buffers[index],
                  arguments.at(index),
                  batch_dims.at(index),
                  fills.at(index),
                  edges.at(index)});
            }
            return std::make_shared<InputCopier>(std::move(inputs));
          }),
          py::arg("buffers"),
          py::arg("arguments"),
          py::arg("batch_dims"),
          py::arg("fills"),
          py::arg("edges"))
      .def(
          "read",
          [](InputCopier& stage, const py::list& tensors, int64_t batch) {
            return stage.read(leaves_of(tensors).tensors.data(), batch);
          },
          py::arg("tensors"),
          py::arg("batch"))
      .def("copy", &InputCopier::copy)
      .def("copied_bytes", &InputCopier::copied_bytes)
      .def_property_readonly("count", &InputCopier::count);
  py::class_<CopyInKernel, std::shared_ptr<CopyInKernel>>(m, "CopyInKernel")
      .def(
          py::init([](const py::bytes& image, size_t capacity) {
            return std::make_shared<CopyInKernel>(std::string(image), capacity);
          }),
          py::arg("image"),
          py::arg("capacity"));
  py::class_<CopyInNode, std::shared_ptr<CopyInNode>>(m, "CopyInNode")
      .def(
          py::init([](const std::shared_ptr<CopyInKernel>& kernel, const std::shared_ptr<InputCopier>& stage) {
            return std::make_shared<CopyInNode>(kernel, stage);
          }),
          py::arg("kernel"),
          py::arg("stage"))
      .def(
          "record",
          [](CopyInNode& node, int64_t stream) {
            node.record(reinterpret_cast<driver::Stream>(stream));
          },
          py::arg("stream"))
      .def(
          "attach",
          [](CopyInNode& node, int64_t graph, int64_t executable) {
            node.attach(
                reinterpret_cast<driver::GraphHandle>(graph),
                reinterpret_cast<driver::GraphExec>(executable));
          },
          py::arg("graph"),
          py::arg("executable"))
      .def_property_readonly("nodes", &CopyInNode::nodes);
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("INPUT_BYTES") = sizeof(InputCopy);
}

void bind_branches(py::module_& m) {
  m.def("new_stream", []() { return reinterpret_cast<int64_t>(new_stream()); });
  py::class_<Branches>(m, "Branches")
      .def(
          py::init([](int64_t handle, const c10::Stream& main, std::vector<c10::Stream> sides) {
            return std::make_unique<Branches>(
                reinterpret_cast<driver::Stream>(handle), main, std::move(sides));
          }),
          py::arg("handle"),
          py::arg("main"),
          py::arg("sides"))
      .def("__enter__", [](Branches& branches) -> Branches& {
        branches.open();
        return branches;
      })
      .def(
          "__exit__",
          [](Branches& branches, const py::object& type, const py::args&) {
            const auto error = branches.close();
            if (error && type.is_none()) { // what the block raised says more
              std::rethrow_exception(error);
            }
          })
      .def_property_readonly("count", &Branches::count)
      .def_property_readonly("large", &Branches::large);
}

void bind_bucket(py::module_& m) {
  py::class_<Bucket, std::shared_ptr<Bucket>>(m, "Bucket")
      .def(
          py::init([](const std::string& name,
                      int64_t size,
                      const std::shared_ptr<Lane>& lane,
                      const std::shared_ptr<InputCopier>& stage,
                      const std::shared_ptr<CopyInNode>& node,
                      const py::object& fill,
                      const py::object& replay,
                      const py::handle& layout,
                      const std::vector<std::tuple<int, py::object, int64_t>>& outputs,
                      bool copy) {
            std::vector<Output> parsed;
            for (const auto& [kind, tensor, argument] : outputs) {
              parsed.push_back(Output{
                  static_cast<Output::Kind>(kind), py::cast<at::Tensor>(tensor), tensor, argument, {}});
            }
            Launch launch{stage, node, fill, replay.is_none() ? py::object() : replay};
            return std::make_shared<Bucket>(
                std::make_shared<const std::string>(name),
                size,
                lane,
                std::move(launch),
                Result(Tree(layout), std::move(parsed), copy));
          }),
          py::arg("name"),
          py::arg("size"),
          py::arg("lane"),
          py::arg("stage"),
          py::arg("node"),
          py::arg("fill"),
          py::arg("replay"),
          py::arg("layout"),
          py::arg("outputs"),
          py::arg("copy"))
      .def(
          "run",
          [](Bucket& bucket, const py::list& tensors, int64_t batch, int64_t call, int64_t stream) {
            return bucket.run(leaves_of(tensors), batch, call, stream);
          },
          py::arg("tensors"),
          py::arg("batch"),
          py::arg("call"),
          py::arg("stream"))
      .def(
          "set_batch_dims",
          [](Bucket& bucket, const std::vector<std::vector<int64_t>>& dims) {
            bucket.result.set_batch_dims(dims);
          },
          py::arg("dims"))
      .def("retire", &Bucket::retire)
      .def_readonly("size", &Bucket::size)
      .def_readonly("retired", &Bucket::retired)
      .def_readwrite("time_at", &Bucket::time_at)
      .def_readwrite("check_budget", &Bucket::check_budget)
      .def_readwrite("replays", &Bucket::replays)
      .def_readwrite("padded_rows", &Bucket::padded_rows)
      .def_property_readonly("expired", [](const Bucket& bucket) { return bucket.invalidated.expired; })
      .def_property_readonly("copied", [](const Bucket& bucket) { return bucket.invalidated.copied; });
}

void bind_dispatcher(py::module_& m) {
  py::class_<MutatedMemory, std::shared_ptr<MutatedMemory>>(m, "MutatedMemory")
      .def(
          py::init<std::vector<at::Tensor>, std::vector<size_t>, std::vector<size_t>>(),
          py::arg("outside"),
          py::arg("bound"),
          py::arg("staged"))
      .def(
          "overlaps",
          [](const MutatedMemory& mutated, const std::vector<at::Tensor>& arguments) {
            std::vector<const at::Tensor*> each;
            for (const auto& argument : arguments) {
              each.push_back(&argument);
            }
            return mutated.overlaps(each);
          },
          py::arg("arguments"));
  py::class_<Entry, std::shared_ptr<Entry>>(m, "Entry")
      .def(
          py::init([](const std::shared_ptr<PoolLock>& lock,
                      const std::shared_ptr<Guard>& guard,
                      const std::shared_ptr<MutatedMemory>& mutated) {
            return std::make_shared<Entry>(Entry{lock, guard, mutated});
          }),
          py::arg("lock"),
          py::arg("guard"),
          py::arg("mutated"))
      .def_readonly("last", &Entry::last)
      .def(
          "set",
          [](Entry& entry, const std::vector<std::shared_ptr<Bucket>>& buckets, bool exact) {
            entry.buckets = buckets;
            entry.exact = exact;
          },
          py::arg("buckets"),
          py::arg("exact"))
      .def(
          "set_eager", [](Entry& entry, const py::str& why) { entry.eager = why; }, py::arg("why"));
  using Slot = std::tuple<int64_t, py::object, py::object, py::object>;
  using Role = std::tuple<int, int64_t, bool, bool, std::vector<int64_t>, at::Tensor>;
  py::class_<Dispatcher, std::shared_ptr<Dispatcher>>(m, "Dispatcher")
      .def(
          py::init([](const py::object& disabled,
                      const py::object& emulated,
                      const py::object& device_mode,
                      const py::object& capturing,
                      bool has_training) {
            return std::make_shared<Dispatcher>(
                Surroundings{disabled, emulated, device_mode, capturing}, has_training);
          }),
          py::arg("disabled"),
          py::arg("emulated"),
          py::arg("device_mode"),
          py::arg("capturing"),
          py::arg("has_training"))
      .def_property_readonly("capsule", &capsule_of)
      .def(
          "serve",
          [](Dispatcher& dispatcher, const py::tuple& args, const py::dict& kwargs, const py::object& instance) {
            return dispatcher.serve(args.ptr(), kwargs.ptr(), instance.ptr());
          },
          py::arg("args"),
          py::arg("kwargs"),
          py::arg("instance"))
      .def(
          "why_eager",
          [](Dispatcher& dispatcher, const py::tuple& args, const py::dict& kwargs, const py::object& instance) {
            return dispatcher.why_eager(args.ptr(), kwargs.ptr(), instance.ptr());
          },
          py::arg("args"),
          py::arg("kwargs"),
          py::arg("instance"))
      .def(
          "add",
          [](Dispatcher& dispatcher,
             const std::vector<Slot>& slots,
             const std::vector<Role>& roles,
             const std::vector<size_t>& same,
             const py::object& training,
             const std::shared_ptr<Entry>& entry) {
            std::vector<Parameter> parameters;
            for (const auto& [position, name, fallback, layout] : slots) {
              parameters.push_back(Parameter{
                  position,
                  name.is_none() ? py::object() : name,
                  // in a tuple, since None is a default too
                  fallback.is_none() ? py::object() : py::cast<py::tuple>(fallback)[0],
                  Tree(layout)});
            }
            std::vector<Leaf> leaves;
            for (const auto& [role, batch_dim, carries_batch, must_be_weak, order, example] : roles) {
              leaves.emplace_back(
                  static_cast<Leaf::Role>(role), batch_dim, carries_batch, must_be_weak, order, example);
            }
            dispatcher.add(std::move(parameters), std::move(leaves), same, training, entry);
          },
          py::arg("parameters"),
          py::arg("leaves"),
          py::arg("same"),
          py::arg("training"),
          py::arg("entry"))
      .def("forget", &Dispatcher::forget, py::arg("entry"))
      .def_property_readonly("signatures", &Dispatcher::signatures)
      .def_readwrite("calls", &Dispatcher::calls)
      .def_readwrite("batches", &Dispatcher::batches)
      .def("count", [](Dispatcher& dispatcher, int64_t batch) { ++dispatcher.batches[batch]; }, py::arg("batch"));
  m.attr("MISS") = Dispatcher::miss();
  m.def("set_inlining", &set_inlining, py::arg("on"));
  m.def("is_inlining", &is_inlining);
  m.def(
      "modes",
      [](const py::object& device_mode) -> py::object {
        const auto modes = Modes::now(device_mode);
        return modes ? py::object(modes->key()) : py::object(py::none());
      },
      py::arg("device_mode"));
  m.def("check_driver", [] { driver::api(); });
}

} // namespace

void bind_replay(py::module_& m) {
  bind_lane(m);
  bind_input_copier(m);
  bind_branches(m);
  bind_bucket(m);
  bind_dispatcher(m);
}

} // namespace graphcache
