#include "plan/plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "layers/pooled_convolution.h"

namespace infl {

namespace {

// First-fit allocation of places in the workspace.
class Places {
 public:
  Place take(int64_t width) {
    Place place = 0;
    for (const auto& [begin, end] : used_) {
      if (begin - place >= width) break;
      place = end;
    }
    used_[place] = place + width;
    high_water_ = std::max(high_water_, place + width);
    return place;
  }
  void take_at(Place place, int64_t width) {
    used_[place] = place + width;
    high_water_ = std::max(high_water_, place + width);
  }
  void release(Place place) { used_.erase(place); }
  int64_t high_water() const { return high_water_; }

 private:
  std::map<Place, Place> used_;  // begin -> end, disjoint
  int64_t high_water_ = 0;
};

// Has the node's output a tangent, if of all values those have one that are `carried`?
bool has_tangent(const Node& node, const std::vector<bool>& carried, const std::vector<int>& canonical) {
  return std::find(node.trainable.begin(), node.trainable.end(), true) != node.trainable.end() ||
         std::any_of(node.inputs.begin(), node.inputs.end(), [&](int input) { return carried[canonical[input]]; });
}

}  // namespace

template <class T>
Plan<T>::Plan(std::vector<Node> nodes, std::vector<Slot> slots, std::vector<int64_t> input_widths, std::vector<int> aliases, int output,
              int64_t num_parameters, std::vector<std::shared_ptr<const Rule<T>>> own_rules, bool second_order, bool on_device)
    : nodes_(std::move(nodes)),
      slots_(std::move(slots)),
      input_widths_(std::move(input_widths)),
      canonical_(std::move(aliases)),
      output_(output),
      num_parameters_(num_parameters),
      own_rules_(std::move(own_rules)) {
  own_rules_.resize(nodes_.size());
  const int num_values = static_cast<int>(canonical_.size());
  if (output_ < 0 || output_ >= num_values)
    throw std::invalid_argument("Plan: expected the output to be a value id, got " + std::to_string(output_) + ".");
  for (int value = 0; value < num_values; ++value) {
    int root = value;
    while (canonical_[root] >= 0 && canonical_[root] != root) root = canonical_[root];
    canonical_[value] = root;
  }
  if (!on_device) merge_pools(second_order);
  widths_.assign(num_values, 0);
  needs_tangent_.assign(num_values, false);
  producer_.assign(num_values, -1);
  for (size_t i = 0; i < input_widths_.size(); ++i) widths_[i] = input_widths_[i];
  std::string unknown;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    Node& node = nodes_[i];
    const Rule<T>* rule = own_rules_[i] ? own_rules_[i].get() : find_rule<T>(node.rule);
    if (rule == nullptr) {
      unknown += (unknown.empty() ? "" : ", ") + node.name + " (" + node.rule + ")";
      continue;
    }
    // What a rule's storage may depend on.
    for (int input : node.inputs) {
      node.input_widths.push_back(widths_[canonical_[input]]);
      node.needs_tangent.push_back(needs_tangent_[canonical_[input]]);
    }
    for (int slot : node.slots) {
      node.trainable.push_back(slot >= 0 && slots_[slot].offset >= 0);
      node.slot_sizes.push_back(slot >= 0 ? slots_[slot].size : 0);
    }
    for (Node& part : node.parts) {
      if (!part.slots.empty()) {  // the one that has the merged node's operands
        part.input_widths = node.input_widths;
        part.needs_tangent = node.needs_tangent;
        part.trainable = node.trainable;
        part.slot_sizes = node.slot_sizes;
      }
    }
    const auto any = [](const std::vector<bool>& flags) { return std::find(flags.begin(), flags.end(), true) != flags.end(); };
    needs_tangent_[node.output] = any(node.trainable) || any(node.needs_tangent);
    widths_[node.output] = node.width;
    producer_[node.output] = static_cast<int>(i);
    rules_.push_back(rule);
    node.curved = second_order && needs_tangent_[node.output] && rule->is_curved(node);
    if (!node.parts.empty()) node.parts[0].curved = node.curved;
    storages_.push_back(rule->storage(node));
    if (on_device && storages_.back().tangents_in_place) storages_.back().tangent_packed_size = 0;
  }
  if (!unknown.empty()) throw std::invalid_argument("Plan: expected rules that exist, got " + unknown + ".");
  for (const Slot& slot : slots_) {
    if (slot.offset + slot.size > num_parameters_ && slot.offset >= 0) {
      throw std::invalid_argument("Plan: expected parameters within " + std::to_string(num_parameters_) + " elements, got one at " +
                                  std::to_string(slot.offset) + " of size " + std::to_string(slot.size) + ".");
    }
  }
  analyse();
  find_untransposed();
  compile_forward();
  compile_tangent(needs_tangent_, schedules_);
  compile_cotangent(needs_tangent_, schedules_);
  if (second_order) return;
  find_chain();
  find_shortcuts();
  if (shortcuts_.empty()) return;
  untransposed_ = -1;  // few outputs: not worth sweeps of either kind
  compile_tangent(carried(), shortened_);
  compile_cotangent(carried(), shortened_);
}

template <class T>
void Plan<T>::merge_pools(bool second_order) {
  std::vector<int> reads(canonical_.size(), 0), reader(canonical_.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    for (int input : nodes_[i].inputs) {
      ++reads[canonical_[input]];
      reader[canonical_[input]] = static_cast<int>(i);
    }
  }
  ++reads[output()];
  // The node that alone reads the result of node i.
  const auto next = [&](int i) { return reads[nodes_[i].output] == 1 ? reader[nodes_[i].output] : -1; };
  const auto is = [&](int i, const char* rule) { return i >= 0 && own_rules_[i] == nullptr && nodes_[i].rule == rule; };
  std::vector<bool> merged(nodes_.size(), false);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (!is(static_cast<int>(i), "convolution")) continue;
    const int behind = next(static_cast<int>(i));
    const bool activated = is(behind, "activation");
    const int pool = activated ? next(behind) : behind;
    if (!is(pool, "max_pool") || !pools_convolution<T>(nodes_[i], nodes_[pool])) continue;
    if (activated && second_order && find_rule<T>("activation")->is_curved(nodes_[behind])) continue;
    Node node = nodes_[i];
    node.rule = "pooled_convolution";
    node.parts = {nodes_[i]};
    if (activated) {
      nodes_[behind].input_widths = {nodes_[i].width};
      node.parts.push_back(nodes_[behind]);
      merged[behind] = true;
    }
    nodes_[pool].input_widths = {nodes_[i].width};
    node.parts.push_back(nodes_[pool]);
    merged[pool] = true;
    node.output = nodes_[pool].output;
    node.width = nodes_[pool].width;
    node.on_devices = std::make_shared<ListsOnDevices>();
    nodes_[i] = std::move(node);
  }
  size_t kept = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (merged[i]) continue;
    if (kept != i) {
      nodes_[kept] = std::move(nodes_[i]);
      own_rules_[kept] = std::move(own_rules_[i]);
    }
    ++kept;
  }
  nodes_.resize(kept);
  own_rules_.resize(kept);
}

template <class T>
bool Plan<T>::on_calling_thread() const {
  return std::any_of(storages_.begin(), storages_.end(), [](const Storage& s) { return s.on_calling_thread; });
}

template <class T>
int64_t Plan<T>::widest_activation() const {
  int64_t widest = 0;
  for (const Node& node : nodes_) widest = std::max(widest, node.width);
  return widest;
}

template <class T>
void Plan<T>::analyse() {
  kept_.assign(widths_.size(), false);
  first_curved_.assign(widths_.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      const int value = canonical_[node.inputs[k]];
      if (storages_[i].keeps_input[k] && producer_[value] >= 0) kept_[value] = true;
      if (node.curved && needs_tangent_[value] && first_curved_[value] < 0) first_curved_[value] = static_cast<int>(i);
    }
  }
  if (producer_[output()] >= 0) kept_[output()] = true;
  find_regions();
}

// Regions of the slots that nodes read, in order of their places; one that begins before the last has ended belongs to it.
template <class T>
void Plan<T>::find_regions() {
  std::vector<int> readers(slots_.size(), 0);
  for (const Node& node : nodes_) {
    for (int slot : node.slots) {
      if (slot >= 0) ++readers[slot];
    }
  }
  std::vector<int> order;
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s].offset >= 0 && readers[s] > 0) order.push_back(static_cast<int>(s));
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return slots_[a].offset < slots_[b].offset; });
  read_once_.assign(slots_.size(), false);
  for (size_t first = 0, last; first < order.size(); first = last) {
    Slot::Region region{slots_[order[first]].offset, 0};
    int all = 0;
    for (last = first; last < order.size() && (last == first || slots_[order[last]].offset < region.begin + region.size); ++last) {
      const Slot& slot = slots_[order[last]];
      region.size = std::max(region.size, slot.offset + slot.size - region.begin);
      all += readers[order[last]];
    }
    for (size_t k = first; k < last; ++k) {
      slots_[order[k]].region = region;
      read_once_[order[k]] = all == 1;
    }
  }
}

template <class T>
void Plan<T>::find_untransposed() {
  const int i = producer_[output()];
  if (i < 0 || own_rules_[i] || nodes_[i].rule != "strided" || !nodes_[i].needs_tangent[0]) return;
  const auto has_tangent = [&](const Node& other) { return needs_tangent_[other.output]; };
  if (std::any_of(nodes_.begin() + i + 1, nodes_.end(), has_tangent)) return;  // the last step of the tangent sweep would be another's
  const Node& node = nodes_[i];
  const auto &shape = node.list("shape"), &strides = node.list("strides");
  const int value = canonical_[node.inputs[0]];
  const size_t classes = std::find_if(shape.begin(), shape.end(), [](int64_t size) { return size > 1; }) - shape.begin();
  if (node.attribute("offset") != 0 || classes == shape.size() || strides[classes] != 1 || widths_[value] != node.width) return;
  int64_t step = shape[classes];
  for (size_t axis = shape.size() - 1; axis > classes; step *= shape[axis--]) {
    if (strides[axis] != step && shape[axis] > 1) return;
  }
  const auto reads = [&](const Node& other) {
    return std::any_of(other.inputs.begin(), other.inputs.end(), [&](int input) { return canonical_[input] == value; });
  };
  if (shape[classes] == node.width || std::count_if(nodes_.begin(), nodes_.end(), reads) != 1) return;
  untransposed_ = value;
  untransposed_classes_ = shape[classes];
}

template <class T>
void Plan<T>::compile_forward() {
  std::vector<int> last_use(widths_.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    for (int input : nodes_[i].inputs) last_use[canonical_[input]] = static_cast<int>(i);
  }
  Places places;
  std::vector<Place> place(widths_.size(), kNowhere);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    ForwardStep step{static_cast<int>(i), {}, kNowhere};
    for (int input : node.inputs) step.inputs.push_back(place[canonical_[input]]);
    if (!kept_[node.output]) {
      place[node.output] = places.take(node.width);
      step.output = place[node.output];
    }
    for (int input : node.inputs) {
      const int value = canonical_[input];
      if (last_use[value] == static_cast<int>(i) && place[value] != kNowhere) {
        places.release(place[value]);
        place[value] = kNowhere;
      }
    }
    schedules_.forward.push_back(std::move(step));
  }
  schedules_.forward_width = places.high_water();
}

template <class T>
void Plan<T>::compile_tangent(const std::vector<bool>& carried, Schedules& to) {
  const auto runs = [&](const Node& node) { return has_tangent(node, carried, canonical_); };
  std::vector<int> num_uses(widths_.size(), 0), last_use(widths_.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (!runs(nodes_[i])) continue;
    for (int input : nodes_[i].inputs) {
      if (!carried[canonical_[input]]) continue;
      ++num_uses[canonical_[input]];
      last_use[canonical_[input]] = static_cast<int>(i);
    }
  }
  ++num_uses[output()];
  last_use[output()] = static_cast<int>(nodes_.size());

  Places places;
  std::vector<Place> place(widths_.size(), kNowhere);
  std::vector<int> step_of(widths_.size(), -1);
  tangent_place_.assign(widths_.size(), kNowhere);
  auto& steps = to.tangent;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (!runs(node)) continue;
    const int first = node.inputs.empty() ? -1 : canonical_[node.inputs[0]];
    if (is_elementwise(static_cast<int>(i)) && num_uses[first] == 1 && !node.curved) {
      // Sole reader of its input: same place; and if the step that wrote it can, it multiplies by the derivative on its way out.
      place[node.output] = place[first];
      TangentStep& producer = steps[step_of[first]];
      if (producer.node == producer_[first] && producer.scale_by < 0 && rules_[producer.node]->fuses_scale()) {
        producer.scale_by = static_cast<int>(i);
        step_of[node.output] = step_of[first];
        continue;
      }
      step_of[node.output] = static_cast<int>(steps.size());
      steps.push_back({static_cast<int>(i), {place[first]}, place[first], -1});
      continue;
    }
    TangentStep step{static_cast<int>(i), {}, kNowhere, -1};
    for (int input : node.inputs) {
      step.inputs.push_back(carried[canonical_[input]] ? place[canonical_[input]] : kNowhere);
      if (canonical_[input] == untransposed_) to.untransposed = step.inputs.back();
    }
    step.output = place[node.output] = places.take(node.width);
    step_of[node.output] = static_cast<int>(steps.size());
    for (int input : node.inputs) {
      const int value = canonical_[input];
      if (first_curved_[value] >= 0) tangent_place_[value] = place[value];
      if (last_use[value] == static_cast<int>(i) && place[value] != kNowhere && first_curved_[value] < 0) {
        places.release(place[value]);
        place[value] = kNowhere;
      }
    }
    steps.push_back(std::move(step));
  }
  for (Shortcut& shortcut : shortcuts_) tangent_place_[shortcut.value] = shortcut.place = place[shortcut.value];
  to.output = place[output()];
  to.sweep_width = places.high_water();
  to.tangent_packed.assign(nodes_.size(), 0);
  for (const TangentStep& step : steps) {
    to.tangent_packed[step.node] = to.tangent_packed_size;
    to.tangent_packed_size += storages_[step.node].tangent_packed_size;
    to.most_tangent_packed = std::max(to.most_tangent_packed, storages_[step.node].tangent_packed_size);
  }
}

template <class T>
void Plan<T>::compile_cotangent(const std::vector<bool>& carried, Schedules& to) {
  // Number of contributions to each value's cotangent.
  std::vector<int> num_writes(widths_.size(), 0);
  for (const Node& node : nodes_) {
    if (!has_tangent(node, carried, canonical_)) continue;
    for (int input : node.inputs) {
      if (carried[canonical_[input]]) ++num_writes[canonical_[input]];
    }
  }
  if (!needs_tangent_[output()]) return find_written(to);
  ++num_writes[output()];

  Places places;
  for (size_t value = 0; value < widths_.size(); ++value) {
    if (tangent_place_[value] != kNowhere) places.take_at(tangent_place_[value], widths_[value]);
  }
  std::vector<Place> place(widths_.size(), kNowhere);
  std::vector<bool> written(widths_.size(), false);
  std::vector<int> step_of(widths_.size(), -1);  // the step that wrote the cotangent, if it was one alone
  place[output()] = to.output;
  places.take_at(to.output, output_width());
  if (to.untransposed != kNowhere) places.take_at(to.untransposed, output_width());
  written[output()] = true;
  for (const Shortcut& shortcut : shortcuts_) {
    place[shortcut.value] = shortcut.place;
    written[shortcut.value] = true;
  }
  auto& steps = to.cotangent;
  // Ends the steps of a curved node: its second-order term, after which tangents that no earlier node reads have had their use.
  const auto second_order = [&](int i) {
    if (!nodes_[i].curved) return;
    SecondOrderStep step{i, {}, {}};
    for (int input : nodes_[i].inputs) {
      const int value = canonical_[input];
      step.t_inputs.push_back(tangent_place_[value]);
      step.g_inputs.push_back(needs_tangent_[value] ? place[value] : kNowhere);
    }
    for (int input : nodes_[i].inputs) {
      const int value = canonical_[input];
      if (first_curved_[value] != i || tangent_place_[value] == kNowhere || tangent_place_[value] == to.output) continue;
      places.release(tangent_place_[value]);
      tangent_place_[value] = kNowhere;
    }
    steps.back().second_order = static_cast<int>(to.second_order.size());
    to.second_order.push_back(std::move(step));
  };
  for (int i = static_cast<int>(nodes_.size()) - 1; i >= 0; --i) {
    const Node& node = nodes_[i];
    if (!written[node.output]) continue;
    const Place g_output = place[node.output];
    const int first = node.inputs.empty() ? -1 : canonical_[node.inputs[0]];
    if (is_elementwise(i) && num_writes[first] == 1 && carried[first]) {
      // Sole contribution to its input's cotangent: in place, or as the epilogue of the step before.
      place[first] = g_output;
      written[first] = true;
      const int before = step_of[node.output];
      const bool plain = before >= 0 && !node.curved && !nodes_[steps[before].node].curved;
      if (plain && num_writes[node.output] == 1 && steps[before].scale_by < 0 && rules_[steps[before].node]->fuses_scale()) {
        steps[before].scale_by = i;
        step_of[first] = -1;  // one epilogue a step
        continue;
      }
      step_of[first] = static_cast<int>(steps.size());
      steps.push_back({i, g_output, false, 0, g_output, false, -1});
      second_order(i);
      continue;
    }
    const bool params = std::find(node.trainable.begin(), node.trainable.end(), true) != node.trainable.end();
    bool params_done = false;
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      const int value = canonical_[node.inputs[k]];
      if (!carried[value]) continue;
      CotangentStep step{i, g_output, params && !params_done, static_cast<int>(k), kNowhere, written[value], -1};
      params_done = true;
      if (!written[value]) {
        place[value] = value == untransposed_ ? to.untransposed : places.take(widths_[value]);
        written[value] = true;
        step_of[value] = static_cast<int>(steps.size());
      }
      step.g_input = place[value];
      steps.push_back(step);
    }
    if (params && !params_done) steps.push_back({i, g_output, true, -1, kNowhere, false, -1});
    second_order(i);
    places.release(g_output);
  }
  to.sweep_width = std::max(to.sweep_width, places.high_water());
  find_written(to);
}

template <class T>
void Plan<T>::find_written(Schedules& to) const {
  std::vector<std::pair<int64_t, int64_t>> written;
  for (CotangentStep& step : to.cotangent) {
    const Node& node = nodes_[step.node];
    std::vector<int> slots;
    for (size_t k = 0; step.params && k < node.slots.size(); ++k) {
      if (node.is_trainable(k) && rules_[step.node]->writes(node, k)) slots.push_back(node.slots[k]);
    }
    step.writes = !slots.empty() && std::all_of(slots.begin(), slots.end(), [&](int slot) { return is_read_once(slot); });
    for (size_t k = 0; step.writes && k < slots.size(); ++k)
      written.emplace_back(slots_[slots[k]].offset, slots_[slots[k]].offset + slots_[slots[k]].size);
  }
  std::sort(written.begin(), written.end());
  written.emplace_back(num_parameters_, num_parameters_);
  int64_t at = 0;
  for (const auto& [begin, end] : written) {
    if (begin > at) to.added.emplace_back(at, begin);
    at = std::max(at, end);
  }
}

// Backwards from the output, along nodes of one input each: what else reads the values on the way does not reach the output.
template <class T>
void Plan<T>::find_chain() {
  std::vector<ChainLink> chain;
  std::vector<int64_t> regions;  // of trained slots; in shared ones gradients would have to meet
  int scale_by = -1;
  for (int value = output(); needs_tangent_[value];) {
    const int i = producer_[value];
    const Dense& dense = storages_[i].dense;
    if (is_elementwise(i) && scale_by < 0) {
      scale_by = i;
    } else if (dense.inputs > 0) {
      if (dense.outputs > kMaxMlpWidth || dense.inputs * dense.outputs > INT32_MAX) return;
      for (size_t k = 0; k < nodes_[i].slots.size(); ++k) {
        if (nodes_[i].trainable[k]) regions.push_back(slots_[nodes_[i].slots[k]].region.begin);
      }
      chain.push_back({i, scale_by});
      scale_by = -1;
    } else {
      return;
    }
    value = canonical_[nodes_[i].inputs[0]];
  }
  std::sort(regions.begin(), regions.end());
  const bool tied = std::adjacent_find(regions.begin(), regions.end()) != regions.end();
  if (chain.size() > kMaxMlpDepth || tied) return;
  chain_.assign(chain.rbegin(), chain.rend());
  for (const ChainLink& link : chain_) {
    const Dense& dense = storages_[link.node].dense;
    chain_shape_.width = std::max(chain_shape_.width, static_cast<int>(dense.outputs));
    chain_shape_.weights += dense.inputs * dense.outputs;
    chain_shape_.activations += dense.inputs + dense.outputs;
    chain_shape_.depth += 1;
  }
}

// Of every dense layer with many more outputs than the network has: the value before it, below elementwise nodes.
template <class T>
void Plan<T>::find_shortcuts() {
  constexpr int64_t kFewOutputs = 32;  // a sweep for each makes the Jacobians
  const int64_t C = output_width();
  if (C > kFewOutputs || !needs_tangent_[output()]) return;
  std::vector<int> readers(widths_.size(), 0);
  ++readers[output()];
  for (const Node& node : nodes_) {
    for (int input : node.inputs) ++readers[canonical_[input]];
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Dense& dense = storages_[i].dense;
    if (dense.inputs == 0 || dense.outputs <= 2 * C) continue;
    int value = canonical_[nodes_[i].inputs[0]];
    while (readers[value] == 1 && needs_tangent_[value] && is_elementwise(producer_[value])) value = canonical_[nodes_[producer_[value]].inputs[0]];
    if (readers[value] != 1 || !needs_tangent_[value] || !has_tangent(nodes_[producer_[value]], carried(), canonical_)) continue;
    shortcuts_.push_back({value, widths_[value], dense.inputs * dense.outputs});
  }
  std::sort(shortcuts_.begin(), shortcuts_.end(), [this](const Shortcut& a, const Shortcut& b) { return producer_[a.value] < producer_[b.value]; });
  if (!has_tangent(nodes_[producer_[output()]], carried(), canonical_)) shortcuts_.clear();  // nothing would write the output's tangent
}

// The values whose tangent leads on in shortened sweeps.
template <class T>
std::vector<bool> Plan<T>::carried() const {
  std::vector<bool> carried(widths_.size(), false);
  for (const Node& node : nodes_) {
    const auto of_output = [&](const Shortcut& shortcut) { return shortcut.value == node.output; };
    carried[node.output] = has_tangent(node, carried, canonical_) && std::none_of(shortcuts_.begin(), shortcuts_.end(), of_output);
  }
  return carried;
}

template class Plan<float>;
template class Plan<double>;

}  // namespace infl
