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

}  // namespace

template <class T>
Plan<T>::Plan(std::vector<Node> nodes, std::vector<Slot> slots, std::vector<int64_t> input_widths, std::vector<int> aliases, int output,
              int64_t num_parameters, std::vector<std::shared_ptr<const Rule<T>>> own_rules, bool second_order)
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
  merge_pools(second_order);
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
  }
  if (!unknown.empty()) throw std::invalid_argument("Plan: expected rules that exist, got " + unknown + ".");
  for (const Slot& slot : slots_) {
    if (slot.offset + slot.size > num_parameters_ && slot.offset >= 0) {
      throw std::invalid_argument("Plan: expected parameters within " + std::to_string(num_parameters_) + " elements, got one at " +
                                  std::to_string(slot.offset) + " of size " + std::to_string(slot.size) + ".");
    }
  }
  analyse();
  compile_forward();
  compile_tangent();
  compile_cotangent();
  if (!second_order) find_chain();
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
  std::vector<int> readers(slots_.size(), 0);
  for (const Node& node : nodes_) {
    for (int slot : node.slots) {
      if (slot >= 0) ++readers[slot];
    }
  }
  const auto meet = [](const Slot& a, const Slot& b) {
    return a.offset >= 0 && b.offset >= 0 && a.offset < b.offset + b.size && b.offset < a.offset + a.size;
  };
  for (size_t s = 0; s < slots_.size(); ++s) {
    int all = readers[s];
    for (size_t other = 0; other < slots_.size(); ++other) {
      if (other != s && meet(slots_[s], slots_[other])) all += readers[other];
    }
    read_once_.push_back(all == 1);
  }
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
void Plan<T>::compile_tangent() {
  std::vector<int> num_uses(widths_.size(), 0), last_use(widths_.size(), -1);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (!needs_tangent_[nodes_[i].output]) continue;
    for (int input : nodes_[i].inputs) {
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
  auto& steps = schedules_.tangent;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (!needs_tangent_[node.output]) continue;
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
    for (int input : node.inputs) step.inputs.push_back(place[canonical_[input]]);
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
  schedules_.output = place[output()];
  schedules_.sweep_width = places.high_water();
  schedules_.tangent_packed.assign(nodes_.size(), 0);
  for (const TangentStep& step : steps) {
    schedules_.tangent_packed[step.node] = schedules_.tangent_packed_size;
    schedules_.tangent_packed_size += storages_[step.node].tangent_packed_size;
  }
}

template <class T>
void Plan<T>::compile_cotangent() {
  // Number of contributions to each value's cotangent.
  std::vector<int> num_writes(widths_.size(), 0);
  for (const Node& node : nodes_) {
    if (!needs_tangent_[node.output]) continue;
    for (int input : node.inputs) {
      if (needs_tangent_[canonical_[input]]) ++num_writes[canonical_[input]];
    }
  }
  if (!needs_tangent_[output()]) return;
  ++num_writes[output()];

  Places places;
  for (size_t value = 0; value < widths_.size(); ++value) {
    if (tangent_place_[value] != kNowhere) places.take_at(tangent_place_[value], widths_[value]);
  }
  std::vector<Place> place(widths_.size(), kNowhere);
  std::vector<bool> written(widths_.size(), false);
  std::vector<int> step_of(widths_.size(), -1);  // the step that wrote the cotangent, if it was one alone
  place[output()] = schedules_.output;
  places.take_at(schedules_.output, output_width());
  written[output()] = true;
  auto& steps = schedules_.cotangent;
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
      if (first_curved_[value] != i || tangent_place_[value] == kNowhere || tangent_place_[value] == schedules_.output) continue;
      places.release(tangent_place_[value]);
      tangent_place_[value] = kNowhere;
    }
    steps.back().second_order = static_cast<int>(schedules_.second_order.size());
    schedules_.second_order.push_back(std::move(step));
  };
  for (int i = static_cast<int>(nodes_.size()) - 1; i >= 0; --i) {
    const Node& node = nodes_[i];
    if (!written[node.output]) continue;
    const Place g_output = place[node.output];
    const int first = node.inputs.empty() ? -1 : canonical_[node.inputs[0]];
    if (is_elementwise(i) && num_writes[first] == 1 && needs_tangent_[first]) {
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
      if (!needs_tangent_[value]) continue;
      CotangentStep step{i, g_output, params && !params_done, static_cast<int>(k), kNowhere, written[value], -1};
      params_done = true;
      if (!written[value]) {
        place[value] = places.take(widths_[value]);
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
  schedules_.sweep_width = std::max(schedules_.sweep_width, places.high_water());
}

// Backwards from the output, along nodes of one input each: what else reads the values on the way does not reach the output.
template <class T>
void Plan<T>::find_chain() {
  std::vector<ChainLink> chain;
  std::vector<int> slots;  // that are trained; of tied ones the gradients would have to meet
  int scale_by = -1;
  for (int value = output(); needs_tangent_[value];) {
    const int i = producer_[value];
    const Dense& dense = storages_[i].dense;
    if (is_elementwise(i) && scale_by < 0) {
      scale_by = i;
    } else if (dense.inputs > 0) {
      if (dense.outputs > kMaxMlpWidth || dense.inputs * dense.outputs > INT32_MAX) return;
      for (size_t k = 0; k < nodes_[i].slots.size(); ++k) {
        if (nodes_[i].trainable[k]) slots.push_back(nodes_[i].slots[k]);
      }
      chain.push_back({i, scale_by});
      scale_by = -1;
    } else {
      return;
    }
    value = canonical_[nodes_[i].inputs[0]];
  }
  std::sort(slots.begin(), slots.end());
  const bool tied = std::adjacent_find(slots.begin(), slots.end()) != slots.end();
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

template class Plan<float>;
template class Plan<double>;

}  // namespace infl
