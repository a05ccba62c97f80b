// The generic rule: a node that a Python object computes (capture/generic.py). Runs on the calling thread, by operator.
#pragma once

#include <memory>
#include <vector>

#include "bindings_tensors.h"
#include "layers/rule.h"

namespace infl {

namespace py = pybind11;

template <class T>
class PyRule final : public Rule<T> {
 public:
  explicit PyRule(py::object object) : object_(std::make_shared<py::object>(std::move(object))) {}

  Storage storage(const Node& node) const override {
    return {.keeps_input = std::vector<bool>(node.inputs.size(), true), .state_widths = {}, .on_calling_thread = true};
  }

  // Torch says what second derivatives an operator has; those it has not come out as zeros.
  bool is_curved(const Node&) const override { return true; }

  void forward(const Tile<T>& tile, T* y) const override {
    py::gil_scoped_acquire gil;
    store(tile.ctx, object_->attr("forward")(tile.n, inputs(tile), slots(tile)), y, tile.n * tile.node.width, false);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    py::gil_scoped_acquire gil;
    const auto [of_inputs, of_slots] = tangents(tile, t_x, t_theta);
    store(tile.ctx, object_->attr("jvp")(tile.n, inputs(tile), slots(tile), of_inputs, of_slots), t_y, tile.V * tile.n * tile.node.width, false);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    py::gil_scoped_acquire gil;
    const size_t num_inputs = tile.node.inputs.size();
    std::vector<bool> wanted(num_inputs + tile.node.slots.size(), false);
    wanted[i] = true;
    const py::list found = object_->attr("vjp")(tile.n, inputs(tile), slots(tile), cotangent(tile, g_y), wanted);
    store(tile.ctx, found[i], g_x, tile.V * tile.n * tile.node.input_widths[i], accumulate);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    py::gil_scoped_acquire gil;
    const size_t num_inputs = tile.node.inputs.size();
    std::vector<bool> wanted(num_inputs, false);
    for (size_t k = 0; k < tile.node.slots.size(); ++k) wanted.push_back(g_theta[k] != nullptr);
    const py::list found = object_->attr("vjp")(tile.n, inputs(tile), slots(tile), cotangent(tile, g_y), wanted);
    for (size_t k = 0; k < tile.node.slots.size(); ++k) {
      if (g_theta[k])
        view(tile.ctx, g_theta[k], {tile.V, tile.node.slot_sizes[k]}, {stride, 1}).add_(found[num_inputs + k].template cast<at::Tensor>());
    }
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    py::gil_scoped_acquire gil;
    const Node& node = tile.node;
    const size_t num_inputs = node.inputs.size();
    const auto [of_inputs, of_slots] = tangents(tile, s.t_x, s.t_theta);
    std::vector<bool> wanted;
    for (size_t k = 0; k < num_inputs; ++k) wanted.push_back(s.g_x[k] != nullptr);
    for (size_t k = 0; k < node.slots.size(); ++k) wanted.push_back(s.g_theta[k] != nullptr);
    const py::list found =
        object_->attr("second_order")(tile.n, inputs(tile), slots(tile), view(tile.ctx, s.g_y, {tile.n, node.width}), of_inputs, of_slots, wanted);
    for (size_t k = 0; k < num_inputs; ++k) {
      if (s.g_x[k]) store(tile.ctx, found[k], s.g_x[k], tile.V * tile.n * node.input_widths[k], true);
    }
    for (size_t k = 0; k < node.slots.size(); ++k) {
      if (s.g_theta[k])
        view(tile.ctx, s.g_theta[k], {tile.V, node.slot_sizes[k]}, {s.stride, 1}).add_(found[num_inputs + k].template cast<at::Tensor>());
    }
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    py::gil_scoped_acquire gil;
    std::vector<bool> wanted;
    for (size_t k = 0; k < tile.node.slots.size(); ++k) wanted.push_back(tile.node.is_trainable(k));
    const py::list found = object_->attr("per_example")(tile.n, inputs(tile), slots(tile), cotangent(tile, g_y), wanted);
    for (size_t k = 0; k < tile.node.slots.size(); ++k) {
      if (!tile.node.is_trainable(k)) continue;
      const int64_t size = tile.node.slot_sizes[k];
      T* rows = factors.allocate(tile.V * tile.n * size);
      store(tile.ctx, found[k], rows, tile.V * tile.n * size, false);
      factors.add({.slot = tile.node.slots[k], .rows = size, .row = rows});
    }
  }

 private:
  static at::Tensor view(const Context& ctx, const T* data, at::IntArrayRef sizes, at::IntArrayRef strides = {}) {
    const auto options = at::TensorOptions().dtype(scalar_type<T>()).device(torch_device(ctx));
    T* p = const_cast<T*>(data);
    if (strides.empty()) return at::for_blob(p, sizes).options(options).target_device(options.device()).make_tensor();
    return at::for_blob(p, sizes).strides(strides).options(options).target_device(options.device()).make_tensor();
  }
  static at::Tensor cotangent(const Tile<T>& tile, const T* g_y) { return view(tile.ctx, g_y, {tile.V, tile.n, tile.node.width}); }
  static std::pair<py::list, py::list> tangents(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta) {
    py::list of_inputs, of_slots;
    for (size_t k = 0; k < tile.node.inputs.size(); ++k) {
      of_inputs.append(t_x[k] ? py::cast(view(tile.ctx, t_x[k], {tile.V, tile.n, tile.node.input_widths[k]})) : py::none());
    }
    for (size_t k = 0; k < tile.node.slots.size(); ++k) {
      const T* t = t_theta.theta[k];
      of_slots.append(t ? py::cast(view(tile.ctx, t, {tile.V, tile.node.slot_sizes[k]}, {t_theta.stride, 1}).contiguous()) : py::none());
    }
    return {of_inputs, of_slots};
  }
  static py::list inputs(const Tile<T>& tile) {
    py::list list;
    for (size_t k = 0; k < tile.node.inputs.size(); ++k) list.append(view(tile.ctx, tile.x[k], {tile.n, tile.node.input_widths[k]}));
    return list;
  }
  static py::list slots(const Tile<T>& tile) {
    py::list list;
    for (size_t k = 0; k < tile.node.slots.size(); ++k) list.append(view(tile.ctx, tile.theta[k], {tile.node.slot_sizes[k]}));
    return list;
  }
  static void store(const Context& ctx, const py::handle& result, T* to, int64_t size, bool accumulate) {
    const auto tensor = result.cast<at::Tensor>().contiguous();
    const T* from = data<T>(tensor, size, torch_device(ctx), "generic rule");
    at::Tensor target = view(ctx, to, {size});
    accumulate ? target.add_(view(ctx, from, {size})) : target.copy_(view(ctx, from, {size}));
  }

  std::shared_ptr<py::object> object_;
};

}  // namespace infl
