// A chain of dense layers on a device: its products as one kernel (kernels/mlp.h).
#include "plan/tape.h"

namespace infl {

// Whether products run by example on a device.
template <class T>
bool Tape<T>::runs_as_chain(const Context& ctx, int64_t V) const {
  if (!ctx.on_device() || plan_->chain().empty() || sets_ > 1 || N_ == 0 || V == 0 || choice_ == ScheduleChoice::by_operator) return false;
  return choice_ == ScheduleChoice::by_example || mlp_pays<T>(plan_->chain_shape(), V, N_);
}

// `product` names V, operands and result; the layers are filled in here.
template <class T>
void Tape<T>::run_chain(const Context& ctx, Mlp<T> product) const {
  product.N = N_;
  product.P = plan_->num_parameters();
  int64_t written = 0;
  const auto offset = [&](const Node& node, size_t k) { return node.is_trainable(k) ? plan_->slots()[node.slots[k]].offset : -1; };
  for (const ChainLink& link : plan_->chain()) {
    const Node& node = plan_->nodes()[link.node];
    const Dense& dense = plan_->storage(link.node).dense;
    MlpLayer<T>& layer = product.layers[product.depth++];
    layer.inputs = static_cast<int>(dense.inputs);
    layer.outputs = static_cast<int>(dense.outputs);
    layer.weight = theta_at_[node.slots[0]];
    layer.out_stride = static_cast<int>(dense.out_stride);
    layer.in_stride = static_cast<int>(dense.in_stride);
    layer.weight_at = offset(node, 0);
    layer.bias_at = offset(node, 1);
    if (node.is_trainable(0)) layer.x = value(node.inputs[0], 0);
    if (link.scale_by >= 0) layer.scale = states_[link.scale_by][plan_->storage(link.scale_by).derivative].data();
    written += (layer.weight_at < 0 ? 0 : int64_t{layer.inputs} * layer.outputs) + (layer.bias_at < 0 ? 0 : layer.outputs);
  }
  if (product.out && written < product.P) fill_zero<T>(ctx, product.V * product.P, product.out);
  mlp_stub<T>(ctx, product);
}

template bool Tape<float>::runs_as_chain(const Context&, int64_t) const;
template bool Tape<double>::runs_as_chain(const Context&, int64_t) const;
template void Tape<float>::run_chain(const Context&, Mlp<float>) const;
template void Tape<double>::run_chain(const Context&, Mlp<double>) const;

}  // namespace infl
