// Python's and torch's side of the core: tensors in, pointers on, tensors out. No logic.
//
// Shapes and types are promised by the Python layer (influence_ext/plan.py, losses/), which words the errors for users; the checks here keep
// a wrong call from reading foreign memory.
#include <torch/extension.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bindings_ensemble.h"
#include "bindings_generic.h"
#include "bindings_graph.h"
#include "bindings_interruption.h"
#include "bindings_losses.h"
#include "bindings_tensors.h"
#include "common/build_info.h"
#include "common/device_library.h"
#include "common/memory.h"
#include "kernels/elementwise.h"
#include "kernels/krylov.h"
#include "kernels/movement.h"
#include "layers/rule.h"
#include "losses/class_indices.h"
#include "plan/example_gradients.h"
#include "plan/tape.h"

namespace py = pybind11;

namespace {

using namespace infl;

template <class T>
OutputHessian<T> make_hessian(int shape, int64_t C, double scale, int64_t N, const std::optional<at::Tensor>& state,
                              const std::optional<at::Tensor>& weights, at::Device device) {
  constexpr int kSoftmax = static_cast<int>(HessianShape::softmax), kInnermostSoftmax = 3;  // [N, K, positions], [N, positions, K]
  TORCH_CHECK(shape >= 0 && shape <= kInnermostSoftmax && (shape == 0) == !state.has_value(),
              "OutputHessian: expected a state for shapes 1 to 3 only, got shape ", shape, ".");
  OutputHessian<T> h;
  h.shape = static_cast<HessianShape>(std::min(shape, kSoftmax));
  h.C = C;
  h.scale = static_cast<T>(scale);
  const bool at_positions = shape >= kSoftmax && state->dim() == 3;
  if (at_positions) h.positions = state->size(shape == kSoftmax ? 2 : 1);
  h.untransposed = at_positions && shape == kSoftmax && !state->is_contiguous() && state->transpose(1, 2).is_contiguous();
  h.classes_innermost = h.untransposed || shape == kInnermostSoftmax;
  if (state) h.state = data<T>(h.untransposed ? state->transpose(1, 2) : *state, N * C, device, "OutputHessian state");
  if (weights) h.weights = data<T>(*weights, N * h.positions, device, "OutputHessian weights");
  return h;
}

// A tape and the tensors it points into.
template <class T>
struct BoundTape {
  BoundTape(std::shared_ptr<Plan<T>> plan, std::vector<at::Tensor> inputs) {
    TORCH_CHECK(!inputs.empty(), "Tape: expected at least one input, got none.");
    const int64_t N = inputs[0].size(0);
    device = inputs[0].device();
    const Run run(device);
    tape = std::make_shared<Tape<T>>(run.ctx, plan, N, pointers(*plan, inputs, N));
    this->inputs = std::make_shared<std::vector<at::Tensor>>(std::move(inputs));
  }
  void rebind(std::vector<at::Tensor> others) {
    tape->rebind(pointers(tape->plan(), others, N()));
    *inputs = std::move(others);
  }
  std::vector<const T*> pointers(const Plan<T>& plan, const std::vector<at::Tensor>& inputs, int64_t N) const {
    TORCH_CHECK(static_cast<int>(inputs.size()) == plan.num_inputs(), "Tape: expected ", plan.num_inputs(), " inputs, got ", inputs.size(), ".");
    std::vector<const T*> found;
    for (size_t i = 0; i < inputs.size(); ++i) found.push_back(data<T>(inputs[i], N * plan.input_widths()[i], device, "Tape input"));
    return found;
  }
  // Slots without a value of their own lie in theta, at their offsets.
  void linearize(const std::vector<std::optional<at::Tensor>>& values, const std::optional<at::Tensor>& theta) {
    const auto& slots = tape->plan().slots();
    TORCH_CHECK(values.size() == slots.size(), "Tape: expected ", slots.size(), " parameters and constants, got ", values.size(), ".");
    const int64_t P = theta ? theta->numel() : 0;
    const T* flat = theta ? data<T>(*theta, P, device, "Tape parameters") : nullptr;
    std::vector<const T*> pointers;
    for (size_t s = 0; s < slots.size(); ++s) {
      TORCH_CHECK(values[s] || (slots[s].offset >= 0 && slots[s].offset + slots[s].size <= P), "Tape: expected a value for slot ", s, ", got none.");
      pointers.push_back(values[s] ? data<T>(*values[s], slots[s].size, device, "Tape parameter") : flat + slots[s].offset);
    }
    const Run run(device);
    const Released released;
    tape->linearize(run.ctx, pointers);
  }
  int64_t N() const { return tape->num_examples(); }
  int64_t C() const { return tape->plan().output_width(); }
  int64_t P() const { return tape->plan().num_parameters(); }

  std::shared_ptr<std::vector<at::Tensor>> inputs;  // with the tape: of all that share it
  at::Device device = at::kCPU;
  Precision precision = Precision::full;  // of products; the point itself is always computed in full
  std::shared_ptr<Tape<T>> tape;
};

// The gradients of a tape's examples for cotangents of its outputs.
template <class T>
struct BoundFactors {
  BoundFactors(std::shared_ptr<BoundTape<T>> tape_, const at::Tensor& g)
      : tape(std::move(tape_)),
        cotangents(g),
        gradients(*tape->tape, g.size(0), data<T>(g, g.size(0) * tape->N() * tape->C(), tape->device, "factors")) {}
  at::Tensor empty_norms() const { return empty<T>({gradients.num_vectors(), gradients.num_examples()}, tape->device); }

  std::shared_ptr<BoundTape<T>> tape;
  at::Tensor cotangents;
  ExampleGradients<T> gradients;
};

// [V, P] -> [V, P] by ggn or hvp.
template <class T, void (Tape<T>::*method)(const Context&, int64_t, const T*, const OutputHessian<T>&, T*) const>
at::Tensor product(const BoundTape<T>& b, const at::Tensor& v, int shape, double scale, const std::optional<at::Tensor>& state,
                   const std::optional<at::Tensor>& weights) {
  const int64_t V = v.size(0);
  const T* from = data<T>(v, V * b.P(), b.device, "product");
  const OutputHessian<T> h = make_hessian<T>(shape, b.C(), scale, b.N(), state, weights, b.device);
  at::Tensor out = empty<T>({V, b.P()}, b.device);
  T* to = out.mutable_data_ptr<T>();
  const Run run(b.device, b.precision);
  const Released released;
  if (V > 0) (b.tape.get()->*method)(run.ctx, V, from, h, to);
  return out;
}

template <class T>
void bind(py::module_& m, const std::string& suffix) {
  py::class_<Plan<T>, std::shared_ptr<Plan<T>>>(m, ("Plan" + suffix).c_str())
      .def(py::init([](const std::vector<py::dict>& nodes, const std::vector<std::pair<int64_t, int64_t>>& slots, std::vector<int64_t> input_widths,
                       std::vector<int> aliases, int output, int64_t num_parameters, bool second_order, bool on_device) {
             std::vector<Node> parsed;
             std::vector<std::shared_ptr<const Rule<T>>> own_rules;
             for (const py::dict& d : nodes) {
               Node node;
               node.rule = d["rule"].cast<std::string>();
               node.name = d["name"].cast<std::string>();
               node.inputs = d["inputs"].cast<std::vector<int>>();
               node.output = d["output"].cast<int>();
               node.slots = d["slots"].cast<std::vector<int>>();
               node.ints = d["ints"].cast<std::map<std::string, int64_t>>();
               node.floats = d["floats"].cast<std::map<std::string, double>>();
               if (d.contains("lists")) node.lists = d["lists"].cast<std::map<std::string, std::vector<int64_t>>>();
               node.width = d["width"].cast<int64_t>();
               parsed.push_back(std::move(node));
               const bool generic = d.contains("operator") && !d["operator"].is_none();
               own_rules.push_back(generic ? std::make_shared<PyRule<T>>(d["operator"]) : nullptr);
             }
             std::vector<Slot> parsed_slots;
             for (const auto& [size, offset] : slots) parsed_slots.push_back({size, offset});
             return std::make_shared<Plan<T>>(std::move(parsed), std::move(parsed_slots), std::move(input_widths), std::move(aliases), output,
                                              num_parameters, std::move(own_rules), second_order, on_device);
           }),
           py::arg("nodes"), py::arg("slots"), py::arg("input_widths"), py::arg("aliases"), py::arg("output"), py::arg("num_parameters"),
           py::arg("second_order") = false, py::arg("on_device") = false)
      .def_property_readonly("num_parameters", &Plan<T>::num_parameters)
      .def_property_readonly("output_depends_on_parameters", &Plan<T>::output_depends_on_parameters)
      .def_property_readonly("widest_activation", &Plan<T>::widest_activation)
      .def_property_readonly("untransposed_classes", &Plan<T>::untransposed_classes)
      .def_property_readonly("sweep_width", [](const Plan<T>& plan) { return plan.schedules().sweep_width; })
      .def_property_readonly("curved_nodes",
                             [](const Plan<T>& plan) {
                               std::vector<std::string> names;
                               for (const Node& node : plan.nodes()) {
                                 if (node.curved) names.push_back(node.name);
                               }
                               return names;
                             })
      .def_property_readonly("fused_nodes", [](const Plan<T>& plan) {
        std::vector<std::string> names;
        for (const Node& node : plan.nodes()) {
          for (size_t k = 1; k < node.parts.size(); ++k) names.push_back(node.parts[k].name);
        }
        for (const TangentStep& step : plan.schedules().tangent) {
          if (step.scale_by >= 0) names.push_back(plan.nodes()[step.scale_by].name);
        }
        return names;
      });

  py::class_<BoundTape<T>, std::shared_ptr<BoundTape<T>>>(m, ("Tape" + suffix).c_str())
      .def(py::init<std::shared_ptr<Plan<T>>, std::vector<at::Tensor>>(), py::arg("plan"), py::arg("inputs"))
      .def("rebind", &BoundTape<T>::rebind, py::arg("inputs"))
      .def("linearize", &BoundTape<T>::linearize, py::arg("values"), py::arg("theta") = py::none())
      .def_property_readonly("num_examples", &BoundTape<T>::N)
      .def_property_readonly("cached_bytes", [](const BoundTape<T>& b) { return b.tape->cached_bytes(); })
      .def(
          "set_schedule", [](BoundTape<T>& b, int choice) { b.tape->set_schedule(static_cast<ScheduleChoice>(choice)); }, py::arg("choice"))
      .def(
          "set_shortcuts", [](BoundTape<T>& b, bool allowed) { b.tape->set_shortcuts(allowed); }, py::arg("allowed"))
      .def(
          "takes_shortcuts", [](const BoundTape<T>& b, int64_t V) { return b.tape->takes_shortcuts(Run(b.device, b.precision).ctx, V); },
          py::arg("num_vectors"))
      .def(
          "at_precision",  // the same point, whose products multiply otherwise
          [](const BoundTape<T>& b, int precision) {
            auto other = std::make_shared<BoundTape<T>>(b);
            other->precision = static_cast<Precision>(precision);
            return other;
          },
          py::arg("precision"))
      .def(
          "workspace_bytes", [](const BoundTape<T>& b, int64_t V) { return b.tape->workspace_bytes(Run(b.device).ctx, V); }, py::arg("V"))
      .def(
          "tiling",
          [](const BoundTape<T>& b, int64_t V) {
            const Tiling t = b.tape->tiling(Run(b.device).ctx, V);
            return std::make_tuple(t.by_example, t.tile, t.num_threads);
          },
          py::arg("V"))
      .def("outputs",
           [](const BoundTape<T>& b) {
             const Run run(b.device);
             at::Tensor out = empty<T>({b.N(), b.C()}, b.device);
             copy<T>(run.ctx, out.numel(), b.tape->outputs(), out.mutable_data_ptr<T>());
             return out;
           })
      .def(
          "jvp",
          [](const BoundTape<T>& b, const at::Tensor& v) {
            const int64_t V = v.size(0);
            const T* from = data<T>(v, V * b.P(), b.device, "jvp");
            at::Tensor out = empty<T>({V, b.N(), b.C()}, b.device);
            T* to = out.mutable_data_ptr<T>();
            const Run run(b.device, b.precision);
            const Released released;
            if (V > 0) b.tape->jvp(run.ctx, V, from, to);
            return out;
          },
          py::arg("v"))
      .def(
          "vjp",
          [](const BoundTape<T>& b, const at::Tensor& g) {
            const int64_t V = g.size(0);
            const T* from = data<T>(g, V * b.N() * b.C(), b.device, "vjp");
            at::Tensor out = empty<T>({V, b.P()}, b.device);
            T* to = out.mutable_data_ptr<T>();
            const Run run(b.device, b.precision);
            const Released released;
            if (V > 0) b.tape->vjp(run.ctx, V, from, to);
            return out;
          },
          py::arg("g"))
      .def(
          "keep_cotangents",
          [](BoundTape<T>& b, const at::Tensor& g) {
            const T* from = data<T>(g, b.N() * b.C(), b.device, "keep_cotangents");
            const Run run(b.device);
            const Released released;
            b.tape->keep_cotangents(run.ctx, from);
          },
          py::arg("g"))
      .def("ggn", &product<T, &Tape<T>::ggn>, py::arg("v"), py::arg("shape"), py::arg("scale"), py::arg("state"), py::arg("weights"))
      .def("hvp", &product<T, &Tape<T>::hvp>, py::arg("v"), py::arg("shape"), py::arg("scale"), py::arg("state"), py::arg("weights"))
      .def(
          "factors", [](std::shared_ptr<BoundTape<T>> b, const at::Tensor& g) { return std::make_shared<BoundFactors<T>>(std::move(b), g); },
          py::arg("g"));

  py::class_<BoundFactors<T>, std::shared_ptr<BoundFactors<T>>>(m, ("Factors" + suffix).c_str())
      .def(
          "materialise",
          [](const BoundFactors<T>& f, const std::optional<at::Tensor>& out) {
            const int64_t V = f.gradients.num_vectors(), N = f.gradients.num_examples(), P = f.tape->P();
            at::Tensor result = out ? *out : empty<T>({V, N, P}, f.tape->device);
            data<T>(result, V * N * P, f.tape->device, "materialise");
            T* to = result.mutable_data_ptr<T>();
            const Run run(f.tape->device, f.tape->precision);
            const Released released;
            f.gradients.materialise(run.ctx, to);
            return result;
          },
          py::arg("out") = py::none())
      .def("square_norms",
           [](const BoundFactors<T>& f) {
             at::Tensor out = f.empty_norms();
             T* to = out.mutable_data_ptr<T>();
             const Run run(f.tape->device, f.tape->precision);
             const Released released;
             f.gradients.square_norms(run.ctx, to);
             return out;
           })
      .def(
          "dots",
          [](const BoundFactors<T>& f, const at::Tensor& u) {
            const int64_t V = f.gradients.num_vectors(), W = u.size(0);
            const T* from = data<T>(u, W * f.tape->P(), f.tape->device, "dots");
            at::Tensor out = empty<T>({V, W, f.gradients.num_examples()}, f.tape->device);
            T* to = out.mutable_data_ptr<T>();
            const Run run(f.tape->device, f.tape->precision);
            const Released released;
            if (V * W > 0) f.gradients.dots(run.ctx, W, from, to);
            return out;
          },
          py::arg("u"))
      .def("square_norms_by_region",  // where a region of the flat vector begins, never beyond one parameter -> [V, N]
           [](const BoundFactors<T>& f) {
             std::map<int64_t, at::Tensor> found;
             std::vector<T*> by_region;
             for (const int64_t begin : f.gradients.regions()) {
               at::Tensor out = f.empty_norms();
               by_region.push_back(out.mutable_data_ptr<T>());
               found.emplace(begin, std::move(out));
             }
             const Run run(f.tape->device, f.tape->precision);
             const Released released;
             f.gradients.square_norms(run.ctx, by_region);
             return found;
           })
      // offset of a slot -> (activations [N, t, .], cotangents [V, N, t, .]) of each node that reads it
      .def("outer_products",
           [](const BoundFactors<T>& f) {
             std::map<int64_t, std::vector<std::pair<at::Tensor, at::Tensor>>> found;
             const int64_t V = f.gradients.num_vectors(), N = f.gradients.num_examples();
             const Run run(f.tape->device, f.tape->precision);
             const auto side = [&](const T* from, at::IntArrayRef sizes) {
               at::Tensor out = empty<T>(sizes, f.tape->device);
               copy<T>(run.ctx, out.numel(), from, out.mutable_data_ptr<T>());
               return out;
             };
             f.gradients.outer_products(run.ctx, [&](const Factor<T>& factor) {
               const bool flipped = factor.col_has_v;
               const int64_t t = factor.positions, inputs = flipped ? factor.rows : factor.cols, outputs = flipped ? factor.cols : factor.rows;
               found[f.tape->tape->plan().slots()[factor.slot].offset].emplace_back(side(flipped ? factor.row : factor.col, {N, t, inputs}),
                                                                                    side(flipped ? factor.col : factor.row, {V, N, t, outputs}));
             });
             return found;
           })
      .def("square_sum",
           [](const BoundFactors<T>& f) {
             at::Tensor out = empty<T>({f.tape->P()}, f.tape->device);
             T* to = out.mutable_data_ptr<T>();
             const Run run(f.tape->device, f.tape->precision);
             const Released released;
             f.gradients.square_sum(run.ctx, to);
             return out;
           })
      .def(
          "gram",
          [](const BoundFactors<T>& f, const BoundFactors<T>& other) {
            const auto rows = [](const BoundFactors<T>& b) { return b.gradients.num_vectors() * b.gradients.num_examples(); };
            at::Tensor out = empty<T>({rows(f), rows(other)}, f.tape->device);
            T* to = out.mutable_data_ptr<T>();
            const Run run(f.tape->device, f.tape->precision);
            const Released released;
            f.gradients.gram(run.ctx, other.gradients, to);
            return out;
          },
          py::arg("other"));
}

// Calls `fn` with the type of z's elements.
template <class Fn>
void dispatch(const at::Tensor& z, const Fn& fn) {
  if (z.scalar_type() == at::kFloat) {
    fn(float{});
  } else {
    TORCH_CHECK(z.scalar_type() == at::kDouble, "expected float32 or float64, got ", z.scalar_type(), ".");
    fn(double{});
  }
}

CgColumn* cg_columns(const at::Tensor& state, int64_t V, at::Device device) {
  return reinterpret_cast<CgColumn*>(const_cast<double*>(data<double>(state, V * kCgScalars, device, "CG scalars")));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  note_main_thread();
  bind<float>(m, "32");
  bind<double>(m, "64");
  bind_ensemble<float>(m, "32");
  bind_ensemble<double>(m, "64");
  m.def("build_info", &build_info);
  m.def("cache_size", [] { return std::make_pair(cache_size().bytes, cache_size().limit); });  // kept, at most
  m.def("set_cache_limit", &set_cache_limit, py::arg("bytes"));
  m.def("empty_cache", &empty_cache);
  // Kernels of a device, run on the CPU by another library: for tests of their arithmetic where there is no GPU.
  m.def(
      "emulate_device",
      [](const std::optional<std::string>& library) {
        const DeviceLibrary device = library ? load_device_library(*library) : DeviceLibrary{};
        emulated_runtime = device.runtime;
        emulated_recorder = device.recorder;
      },
      py::arg("library"));
  m.def("emulates_device", [] { return emulated_runtime != nullptr; });
  bind_graphs(m);
  m.def("rules", &rule_names);
  m.def("losses", &loss_names);
  m.def(
      "all_finite",
      [](const at::Tensor& x) {
        bool finite = true;
        dispatch(x, [&](auto tag) {
          using T = decltype(tag);
          all_finite_stub<T>(cpu_context(), x.numel(), data<T>(x, x.numel(), at::kCPU, "all_finite"), &finite);
        });
        return finite;
      },
      py::arg("x"));
  // (the tensors one after another, whether every element is finite)
  m.def(
      "flatten_finite",
      [](const std::vector<at::Tensor>& tensors) {
        TORCH_CHECK(!tensors.empty(), "flatten_finite: expected at least one tensor, got none.");
        int64_t size = 0;
        for (const at::Tensor& t : tensors) size += t.numel();
        bool finite = true;
        at::Tensor flat;
        dispatch(tensors[0], [&](auto tag) {
          using T = decltype(tag);
          flat = empty<T>({size}, at::kCPU);
          T* to = flat.mutable_data_ptr<T>();
          for (const at::Tensor& t : tensors) {
            std::memcpy(to, data<T>(t, t.numel(), at::kCPU, "flatten_finite"), t.nbytes());
            to += t.numel();
          }
          all_finite_stub<T>(cpu_context(), size, flat.const_data_ptr<T>(), &finite);
        });
        return std::make_pair(flat, finite);
      },
      py::arg("tensors"));
  // (indices with -1 for what is ignored, flat position of the first that is out of [0, K) or -1)
  m.def(
      "class_indices",
      [](const at::Tensor& target, int64_t ignored, int64_t K) {
        TORCH_CHECK(target.device().is_cpu() && target.is_contiguous() && target.scalar_type() == at::kLong,
                    "class_indices: expected a contiguous CPU int64 tensor, got ", target.toString(), ".");
        at::Tensor out = at::empty_like(target);
        const int64_t outside = class_indices(target.numel(), target.const_data_ptr<int64_t>(), ignored, K, out.mutable_data_ptr<int64_t>());
        return std::make_pair(out, outside);
      },
      py::arg("target"), py::arg("ignored"), py::arg("K"));
  m.def(
      "loss_evaluate",
      [](const std::string& name, double s, double parameter, const at::Tensor& z, const at::Tensor& target, const OptionalTensor& weight,
         const OptionalTensor& z_s, const std::map<std::string, at::Tensor>& results) {
        dispatch(z, [&](auto tag) { loss_evaluate<decltype(tag)>(name, s, parameter, z, target, weight, z_s, results); });
      },
      py::arg("name"), py::arg("s"), py::arg("parameter"), py::arg("z"), py::arg("target"), py::arg("weight"), py::arg("z_s"), py::arg("results"));
  // u [V, N, C] in place; part: 0 product, 1 root, 2 root transposed.
  m.def(
      "output_hessian",
      [](int shape, double scale, const OptionalTensor& state, const OptionalTensor& weights, int part, const at::Tensor& u) {
        dispatch(u, [&](auto tag) {
          using T = decltype(tag);
          const OutputHessian<T> h = make_hessian<T>(shape, u.size(2), scale, u.size(1), state, weights, u.device());
          TORCH_CHECK(part >= 0 && part <= 2, "output_hessian: expected part 0, 1 or 2, got ", part, ".");
          output_hessian_stub<T>(Run(u.device()).ctx, h, static_cast<HessianPart>(part), u.size(0), u.size(1),
                                 writable<T>(u, u.numel(), u.device(), "cotangents"));
        });
      },
      py::arg("shape"), py::arg("scale"), py::arg("state"), py::arg("weights"), py::arg("part"), py::arg("u"));
  // A step of CG on [V, P] vectors; state [V, cg_scalars] float64 (math/krylov.h).
  m.attr("cg_scalars") = kCgScalars;
  m.def(
      "cg_direction",
      [](const at::Tensor& r, const OptionalTensor& z, const at::Tensor& p, const at::Tensor& state) {
        dispatch(r, [&](auto tag) {
          using T = decltype(tag);
          const int64_t V = r.size(0), P = r.size(1);
          const at::Device device = r.device();
          const Run run(device);
          cg_direction_stub<T>(run.ctx, V, P, data<T>(r, V * P, device, "CG residual"),
                               z ? data<T>(*z, V * P, device, "CG preconditioned residual") : nullptr, writable<T>(p, V * P, device, "CG direction"),
                               cg_columns(state, V, device));
        });
      },
      py::arg("r"), py::arg("z"), py::arg("p"), py::arg("state"));
  m.def(
      "cg_step",
      [](double lower, const at::Tensor& p, const at::Tensor& q, const at::Tensor& x, const at::Tensor& r, const at::Tensor& state) {
        dispatch(r, [&](auto tag) {
          using T = decltype(tag);
          const int64_t V = r.size(0), P = r.size(1);
          const at::Device device = r.device();
          const Run run(device);
          cg_step_stub<T>(run.ctx, V, P, lower, data<T>(p, V * P, device, "CG direction"), data<T>(q, V * P, device, "CG product"),
                          writable<T>(x, V * P, device, "CG solution"), writable<T>(r, V * P, device, "CG residual"), cg_columns(state, V, device));
        });
      },
      py::arg("lower"), py::arg("p"), py::arg("q"), py::arg("x"), py::arg("r"), py::arg("state"));
}
