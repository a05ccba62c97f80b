// Training steps of many parameter sets (influence_ext/ensemble.py).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bindings_losses.h"
#include "plan/ensemble.h"

namespace infl {

namespace py = pybind11;

// `times` copies, one after another.
inline at::Tensor repeated(const at::Tensor& rows, int64_t times) {
  if (times == 1) return rows;
  std::vector<int64_t> by_axis(rows.dim(), 1);
  by_axis[0] = times;
  return rows.repeat(by_axis);
}

// A batch of training steps, one for each parameter set.
template <class T>
at::Tensor ensemble_step(Ensemble<T>& ensemble, const std::vector<at::Tensor>& inputs, const std::vector<OptionalTensor>& constants,
                         const at::Tensor& theta, const std::vector<at::Tensor>& moments, const std::map<std::string, double>& descent,
                         const OptionalTensor& anchor, const std::string& loss, double loss_scale, double loss_parameter,
                         std::vector<int64_t> output_shape, const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& kept) {
  const Plan<T>& plan = ensemble.plan();
  const int64_t N = ensemble.num_examples(), S = theta.size(0), P = plan.num_parameters();
  const at::Device device = theta.device();
  const Run run(device);
  EnsembleStep<T> step;
  step.num_sets = S;
  TORCH_CHECK(constants.size() == plan.slots().size() && static_cast<int>(inputs.size()) == plan.num_inputs(), "Ensemble: expected ",
              plan.slots().size(), " slots and ", plan.num_inputs(), " inputs.");
  TORCH_CHECK(kept.device() == device && kept.is_contiguous() && kept.scalar_type() == at::kBool && kept.numel() == S * N,
              "Ensemble: expected contiguous booleans [", S, ", ", N, "] on ", device, " that say which examples count.");
  for (size_t s = 0; s < constants.size(); ++s) {
    TORCH_CHECK(constants[s] || plan.slots()[s].offset >= 0, "Ensemble: expected a value for slot ", s, ", got none.");
    step.constants.push_back(constants[s] ? data<T>(*constants[s], plan.slots()[s].size, device, "Ensemble constant") : nullptr);
  }
  std::vector<const T*> rows;
  for (size_t i = 0; i < inputs.size(); ++i) rows.push_back(data<T>(inputs[i], N * plan.input_widths()[i], device, "Ensemble input"));
  const bool adam = descent.count("beta2") > 0;
  TORCH_CHECK(moments.size() == (adam ? 2u : 1u), "Ensemble: expected the moments of the method, got ", moments.size(), ".");
  step.theta = writable<T>(theta, S * P, device, "Ensemble parameters");
  step.first = writable<T>(moments[0], S * P, device, "Ensemble moments");
  if (adam) step.second = writable<T>(moments[1], S * P, device, "Ensemble moments");
  const auto number = [&](const char* key) {
    const auto it = descent.find(key);
    return it == descent.end() ? T(0) : static_cast<T>(it->second);
  };
  step.descent = {.method = adam ? Method::adam : Method::sgd,
                  .lr = number("lr"),
                  .momentum = number("momentum"),
                  .one_minus_beta1 = number("one_minus_beta1"),
                  .beta2 = number("beta2"),
                  .one_minus_beta2 = number("one_minus_beta2"),
                  .root_correction = number("root_correction"),
                  .eps = number("eps"),
                  .decay = number("decay"),
                  .damping = number("damping"),
                  .anchor = anchor ? data<T>(*anchor, P, device, "Ensemble anchor") : nullptr};
  TORCH_CHECK(step.descent.damping == 0 || anchor, "Ensemble: expected an anchor with damping, got none.");
  step.loss = &native_loss<T>(loss);
  const int64_t at_once = Ensemble<T>::sets_at_once(run.ctx, S);
  const at::Tensor targets = repeated(target, at_once);
  const bool by_example = weight && weight->dim() == 2;
  const OptionalTensor weights = by_example ? repeated(*weight, at_once) : weight;
  output_shape[0] *= at_once;
  step.arguments = loss_arguments<T>(*step.loss, loss_scale, loss_parameter, output_shape, targets, weights, device, /*is_checked=*/true);
  TORCH_CHECK(step.arguments.N == at_once * N && step.arguments.C == plan.output_width(), "Ensemble: expected outputs [", N, ", ",
              plan.output_width(), "].");
  step.kept = kept.const_data_ptr<bool>();
  at::Tensor total = empty<T>({S}, device);
  step.total = total.mutable_data_ptr<T>();
  py::gil_scoped_release release;
  if (S > 0) ensemble.step(run.ctx, rows, step);
  return total;
}

template <class T>
void bind_ensemble(py::module_& m, const std::string& suffix) {
  py::class_<Ensemble<T>>(m, ("Ensemble" + suffix).c_str())
      .def(py::init<std::shared_ptr<Plan<T>>, int64_t>(), py::arg("plan"), py::arg("num_examples"))
      .def_property_readonly("cached_bytes", &Ensemble<T>::cached_bytes)
      .def_static(
          "sets_at_once", [](const at::Tensor& t) { return Ensemble<T>::sets_at_once(Run(t.device()).ctx, t.size(0)); }, py::arg("theta"))
      .def("step", &ensemble_step<T>, py::arg("inputs"), py::arg("constants"), py::arg("theta"), py::arg("moments"), py::arg("descent"),
           py::arg("anchor"), py::arg("loss"), py::arg("loss_scale"), py::arg("loss_parameter"), py::arg("output_shape"), py::arg("target"),
           py::arg("weight"), py::arg("kept"));
}

}  // namespace infl
