// A node of the plan: one operator with its operands and attributes, as lowered from the exported graph.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/slot.h"

namespace infl {

struct Node {
  std::string rule;
  std::string name;
  std::vector<int> inputs;  // value ids
  int output = -1;          // value id
  std::vector<int> slots;   // slot ids, −1 where absent
  std::map<std::string, int64_t> ints;
  std::map<std::string, double> floats;
  std::map<std::string, std::vector<int64_t>> lists;  // shapes, strides, index maps: of one example
  int64_t width = 0;                                  // elements per example of the output
  std::vector<int64_t> input_widths;
  std::vector<bool> needs_tangent;  // per input: does a differentiated parameter influence it?
  std::vector<bool> trainable;      // per entry of `slots`: is it differentiated?
  std::vector<int64_t> slot_sizes;  // per entry of `slots`: its elements, 0 where absent

  int64_t attribute(const std::string& key) const {
    const auto it = ints.find(key);
    if (it == ints.end()) throw std::invalid_argument(rule + " (" + name + "): expected an integer attribute '" + key + "', got none.");
    return it->second;
  }
  double number(const std::string& key) const {
    const auto it = floats.find(key);
    if (it == floats.end()) throw std::invalid_argument(rule + " (" + name + "): expected a number attribute '" + key + "', got none.");
    return it->second;
  }
  const std::vector<int64_t>& list(const std::string& key) const {
    const auto it = lists.find(key);
    if (it == lists.end()) throw std::invalid_argument(rule + " (" + name + "): expected a list attribute '" + key + "', got none.");
    return it->second;
  }
  bool has_slot(size_t k) const { return k < slots.size() && slots[k] >= 0; }
  bool is_trainable(size_t k) const { return k < trainable.size() && trainable[k]; }
};

}  // namespace infl
