// Losses of outputs: tensors in, the results that are wanted out.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "bindings_tensors.h"
#include "losses/loss.h"

namespace infl {

using OptionalTensor = std::optional<at::Tensor>;

template <class T>
T* writable(const OptionalTensor& t, int64_t size, at::Device device, const char* what) {
  return t ? const_cast<T*>(data<T>(*t, size, device, what)) : nullptr;
}

// What a loss is of, without outputs and results, for outputs [N, *shape] = [N, C] or [N, K, positions]; weight by element, by example and element,
// or by class. `is_checked`: class indices were looked at before; looking would wait for a device.
template <class T>
LossArguments<T> loss_arguments(const Loss<T>& loss, double s, double parameter, at::IntArrayRef shape, const at::Tensor& target,
                                const OptionalTensor& weight, at::Device device, bool is_checked = false) {
  LossArguments<T> a;
  const bool by_class = loss.hessian_shape() == HessianShape::softmax;
  a.N = shape[0];
  a.positions = shape.size() == 3 ? shape[2] : 1;
  a.C = shape[1] * a.positions;
  a.s = static_cast<T>(s);
  a.a = static_cast<T>(parameter);
  if (by_class && target.scalar_type() == at::kLong) {
    TORCH_CHECK(target.is_contiguous() && target.numel() == a.N * a.positions && target.device() == device,
                "loss: expected int64 targets [N, positions] on ", device, ".");
    a.index = target.const_data_ptr<int64_t>();
    if (target.numel() > 0 && !is_checked) {
      const auto [lowest, highest] = at::aminmax(target);
      TORCH_CHECK(lowest.item<int64_t>() >= -1 && highest.item<int64_t>() < shape[1], "loss: expected class indices in [-1, ", shape[1], "), got ",
                  lowest.item<int64_t>(), " to ", highest.item<int64_t>(), ".");
    }
  } else {
    a.target = data<T>(target, a.N * a.C, device, "loss target");
  }
  if (weight) {
    a.weight_per_example = !by_class && weight->dim() == 2;
    a.weight = data<T>(*weight, by_class ? shape[1] : a.weight_per_example ? a.N * a.C : a.C, device, "loss weight");
  }
  return a;
}

template <class T>
const Loss<T>& native_loss(const std::string& name) {
  const Loss<T>* loss = find_loss<T>(name);
  TORCH_CHECK(loss != nullptr, "loss: expected one of the native losses, got '", name, "'.");
  return *loss;
}

// Fills the results that are given. z [N, C] or [N, K, positions].
template <class T>
void loss_evaluate(const std::string& name, double s, double parameter, const at::Tensor& z, const at::Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& z_s, const std::map<std::string, at::Tensor>& results) {
  const Loss<T>& loss = native_loss<T>(name);
  const at::Device device = z.device();
  LossArguments<T> a = loss_arguments<T>(loss, s, parameter, z.sizes(), target, weight, device);
  a.z = data<T>(z, a.N * a.C, device, "loss output");
  if (z_s) a.z_s = data<T>(*z_s, a.N * a.C, device, "reference output");
  const auto result = [&](const char* key, int64_t size) {
    const auto it = results.find(key);
    return it == results.end() ? nullptr : const_cast<T*>(data<T>(it->second, size, device, key));
  };
  a.value = result("value", a.N);
  a.gradient = result("gradient", a.N * a.C);
  a.state = result("state", a.N * a.C);
  a.mass = result("mass", a.N * a.positions);
  a.bregman = result("bregman", a.N);
  TORCH_CHECK((a.bregman == nullptr) == (a.z_s == nullptr), "loss_evaluate: expected reference outputs with a divergence, and only then.");
  loss.evaluate(Run(device).ctx, a);
}

}  // namespace infl
