#include "plan/ensemble.h"

#include <omp.h>

#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/drop.h"

namespace infl {

// The tape's sets, from `first` on.
template <class T>
void Ensemble<T>::take(const Context& ctx, Tape<T>& tape, const EnsembleStep<T>& step, int64_t first) const {
  const int64_t P = plan_->num_parameters(), C = plan_->output_width(), S = tape.num_sets(), at = first * P;
  std::vector<const T*> slots = step.constants;
  for (size_t s = 0; s < slots.size(); ++s) {
    if (slots[s] == nullptr) slots[s] = step.theta + at + plan_->slots()[s].offset;
  }
  tape.linearize(ctx, slots, /*borrow=*/true, P);
  Scratch<T> cotangent(ctx, S * N_ * C), values(ctx, S * N_);
  LossArguments<T> loss = step.arguments;
  loss.z = tape.outputs();
  loss.value = values.data();
  loss.gradient = cotangent.data();
  step.loss->evaluate(ctx, loss);
  drop_stub<T>(ctx, S, N_, C, step.kept + first * N_, values.data(), cotangent.data(), step.total + first);
  tape.descend(ctx, cotangent.data(), step.descent, {step.theta + at, step.first + at, step.second ? step.second + at : nullptr});
}

// What rules derive of the inputs alone, once for all sets.
template <class T>
std::vector<const T*> Ensemble<T>::prepare(const Context& ctx, const std::vector<const T*>& inputs) {
  std::vector<const T*> prepared(plan_->nodes().size());
  prepared_.resize(plan_->nodes().size());
  for (size_t i = 0; i < prepared.size(); ++i) {
    const Node& node = plan_->nodes()[i];
    const int first = node.inputs.empty() ? plan_->num_inputs() : plan_->canonical(node.inputs[0]);
    if (first >= plan_->num_inputs()) continue;
    const Rule<T>& rule = plan_->rule(static_cast<int>(i));
    const int64_t size = rule.prepared_size(node, N_);
    if (size == 0) continue;
    prepared_[i].resize(ctx, size);
    Tile<T> tile{ctx, node, 1, N_};
    tile.x = &inputs[first];
    rule.prepare_input(tile, prepared_[i].data());
    prepared[i] = prepared_[i].data();
  }
  return prepared;
}

template <class T>
void Ensemble<T>::step(const Context& ctx, const std::vector<const T*>& inputs, const EnsembleStep<T>& step) {
  const std::lock_guard<std::mutex> lock(stepping_);
  const int64_t at_once = sets_at_once(ctx, step.num_sets);
  const bool by_set = at_once == 1 && !plan_->on_calling_thread() && step.num_sets >= ctx.num_threads;
  const int threads = by_set ? ctx.num_threads : 1;
  if (!tapes_.empty() && tapes_[0]->num_sets() != at_once) tapes_.clear();
  while (static_cast<int>(tapes_.size()) < threads) tapes_.push_back(std::make_unique<Tape<T>>(ctx, plan_, N_, inputs, at_once));
  // A thread that has a set to itself takes the batch whole: for one right-hand side the gradient, written and read again for every tile, weighs more
  // than the activations.
  for (auto& tape : tapes_) tape->set_schedule(by_set ? ScheduleChoice::by_operator : ScheduleChoice::automatic);
  Context inner = ctx;
  if (by_set) inner.num_threads = 1;
  for (auto& tape : tapes_) tape->rebind(inputs);
  if (by_set && step.num_sets > 1 && tapes_[0]->is_whole(inner)) {
    const std::vector<const T*> prepared = prepare(ctx, inputs);
    for (auto& tape : tapes_) tape->set_prepared(prepared);
  }
  if (threads == 1) {
    for (int64_t first = 0; first < step.num_sets; first += at_once) take(inner, *tapes_[0], step, first);
    return;
  }
  RegionErrors errors;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t set = 0; set < step.num_sets; ++set) {
    try {
      take(inner, *tapes_[omp_get_thread_num()], step, set);
    } catch (...) {
      errors.keep();
    }
  }
  errors.rethrow();
}

template <class T>
int64_t Ensemble<T>::cached_bytes() const {
  int64_t bytes = 0;
  for (const auto& buffer : prepared_) bytes += buffer.bytes();
  for (const auto& tape : tapes_) bytes += tape->cached_bytes();
  return bytes;
}

template class Ensemble<float>;
template class Ensemble<double>;

}  // namespace infl
