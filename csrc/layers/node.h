// A node of the plan: one operator with its operands and attributes, as lowered from the exported graph.
#pragma once

#include <atomic>
#include <cstdint>
#include <forward_list>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/buffer.h"
#include "common/slot.h"

namespace infl {

// A node's lists where kernels read them, each made at its first use. Every tile asks for them, so what is there is found without a lock.
class ListsOnDevices {
 public:
  template <class Make>
  const int64_t* get(const Context& ctx, std::string_view key, const Make& make) {
    if (const Copy* copy = find(ctx.runtime, key)) return copy->list.data();
    const std::lock_guard<std::mutex> guard(mutex_);
    if (const Copy* copy = find(ctx.runtime, key)) return copy->list.data();  // made by whoever held the lock before
    copies_.push_front({ctx.runtime, std::string(key), upload(ctx, make()), newest_.load()});
    newest_.store(&copies_.front());
    return copies_.front().list.data();
  }

 private:
  struct Copy {
    DeviceRuntime* runtime;
    std::string key;
    Buffer<int64_t> list;
    const Copy* next;
  };
  const Copy* find(DeviceRuntime* runtime, std::string_view key) const {
    const Copy* copy = newest_.load();
    while (copy != nullptr && (copy->runtime != runtime || copy->key != key)) copy = copy->next;
    return copy;
  }

  std::mutex mutex_;
  std::forward_list<Copy> copies_;  // never moved nor taken away
  std::atomic<const Copy*> newest_{nullptr};
};

struct Node {
  std::string rule;
  std::string name;
  std::vector<int> inputs;  // value ids
  int output = -1;          // value id
  std::vector<int> slots;   // slot ids, −1 where absent
  std::map<std::string, int64_t> ints;
  std::map<std::string, double> floats;
  std::map<std::string, std::vector<int64_t>> lists;  // shapes, strides, index maps: of one example
  std::vector<Node> parts;                            // nodes that the plan made one, in order
  int64_t width = 0;                                  // elements per example of the output
  std::vector<int64_t> input_widths;
  std::vector<bool> needs_tangent;  // per input: does a differentiated parameter influence it?
  std::vector<bool> trainable;      // per entry of `slots`: is it differentiated?
  std::vector<int64_t> slot_sizes;  // per entry of `slots`: its elements, 0 where absent
  bool curved = false;              // is the plan for second-order products, and does the rule say is_curved?
  std::shared_ptr<ListsOnDevices> on_devices = std::make_shared<ListsOnDevices>();

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
  // A list for kernels to read, on the device they run on.
  const int64_t* list_on(const Context& ctx, const std::string& key) const {
    const std::vector<int64_t>& values = list(key);
    return ctx.runtime == nullptr ? values.data() : on_devices->get(ctx, key, [&] { return values; });
  }
  // A list that is made of others, likewise; `key` names it.
  template <class Make>
  const int64_t* derived_on(const Context& ctx, std::string_view key, const Make& make) const {
    return on_devices->get(ctx, key, make);
  }
  bool has_slot(size_t k) const { return k < slots.size() && slots[k] >= 0; }
  bool is_trainable(size_t k) const { return k < trainable.size() && trainable[k]; }
};

}  // namespace infl
