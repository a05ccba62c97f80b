// Calls of the core recorded once and replayed (common/launch_graph.h), for Python.
#pragma once

#include <memory>
#include <optional>

#include "bindings_tensors.h"
#include "kernels/elementwise.h"

namespace infl {

namespace py = pybind11;

class BoundGraph {
 public:
  BoundGraph(at::Device device, const py::function& body) : device_(device) {
    const Run run(device);
    LaunchRecorder* recorder = launch_recorder(run.ctx);
    TORCH_CHECK(recorder != nullptr, "Graph: expected a device other than the CPU, got ", device, ".");
    py::gil_scoped_release release;  // the recorder takes one recording at a time
    graph_ = recorder->record(run.ctx.stream, [&body] {
      py::gil_scoped_acquire acquire;
      body();
    });
  }
  void replay(int64_t times) {
    const Run run(device_);
    py::gil_scoped_release release;
    for (int64_t i = 0; i < times; ++i) graph_->replay(run.ctx.stream);
  }
  int64_t num_launches() const { return graph_->num_launches(); }

 private:
  at::Device device_;
  std::unique_ptr<LaunchGraph> graph_;
};

// The stream that calls on this device's tensors are enqueued on, if they may be recorded: none on the CPU, and none while somebody records it.
inline std::optional<int64_t> recordable_stream(at::Device device) {
  const Run run(device);
  LaunchRecorder* recorder = launch_recorder(run.ctx);
  if (recorder == nullptr || recorder->is_recording(run.ctx.stream)) return std::nullopt;
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(run.ctx.stream));
}

// out += factor · v, as a launch of the core.
template <class T>
void add_multiple(double factor, const at::Tensor& v, const at::Tensor& out) {
  const Run run(v.device());
  const T* from = data<T>(v, v.numel(), v.device(), "add_multiple");
  T* to = const_cast<T*>(data<T>(out, v.numel(), v.device(), "add_multiple"));
  combine_stub<T>(run.ctx, v.numel(), static_cast<T>(factor), from, T(0), static_cast<const T*>(nullptr), to, true);
}

inline void bind_graphs(py::module_& m) {
  py::class_<BoundGraph>(m, "Graph")
      .def(py::init<at::Device, const py::function&>(), py::arg("device"), py::arg("body"))
      .def("replay", &BoundGraph::replay, py::arg("times") = 1)
      .def_property_readonly("num_launches", &BoundGraph::num_launches);
  m.def("recordable_stream", &recordable_stream, py::arg("device"));
  m.def(
      "add_multiple",
      [](double factor, const at::Tensor& v, const at::Tensor& out) {
        v.scalar_type() == at::kFloat ? add_multiple<float>(factor, v, out) : add_multiple<double>(factor, v, out);
      },
      py::arg("factor"), py::arg("v"), py::arg("out"));
}

}  // namespace infl
