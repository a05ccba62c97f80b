// Plan: the structure of a network as a list of nodes, analysed once. Knows no parameters' values and no data.
//
// The analysis compiles three schedules, lists of steps over a workspace whose places are reused as soon as a value is no longer needed:
//   forward   every node; values that a later pass needs go to the tape, the others to the workspace
//   tangent   the nodes that a differentiated parameter influences, in order
//   cotangent the same nodes reversed; below the lowest trainable node nothing is done
// An elementwise node next to a linear one is fused into it: its derivative becomes the epilogue of the product, in either direction.
//
// A convolution that only a max pool reads, with an activation between them or without, is one node with it where that saves multiplications
// (layers/pooled_convolution.cpp). Its kernels are the CPU's, so in a plan for a device it stays a node of its own.
//
// Where all nodes that a differentiated parameter influences form one chain of dense and elementwise ones (an MLP), it is listed besides: a device
// can take tiles of examples through it in one kernel (kernels/mlp.h).
//
// Shortcuts: J_n is linear, so what a value u adds to it may come by any way, and where a dense layer of many outputs follows, the shortest is
// B_n = ∂z_n/∂u_n itself, [C, width] an example: t_z += B_n t_u and g_u = B_nᵀ g_z take C · width multiplications where the layer takes
// width · outputs. With a shortcut nothing else leads on from u. A second pair of sweeps is compiled for products that take them.
//
// Where the output is the transposition of a value [positions, classes], as losses over classes want it, sweeps of a product can end and begin at
// that value: the transposition is the last step of the tangent sweep and the first of the cotangent sweep, and both leave the value in one place,
// so a product whose loss Hessian takes classes innermost leaves these steps out.
//
// A plan for second-order products has curved nodes, too: the tangents that they read stay in the workspace until the cotangent sweep has passed
// them, and they are fused with nothing that would come between a product and its second-order term.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/mlp.h"
#include "layers/rule.h"

namespace infl {

// A place in the workspace, in elements per example; multiplied by V·n at run time.
using Place = int64_t;
inline constexpr Place kNowhere = -1;

struct ForwardStep {
  int node;
  std::vector<Place> inputs;  // workspace places of inputs that are neither plan inputs nor kept
  Place output = kNowhere;    // workspace place, if the output is not kept
};

struct TangentStep {
  int node;
  std::vector<Place> inputs;  // kNowhere: zero
  Place output;
  int scale_by = -1;  // node whose derivative is the epilogue
};

struct CotangentStep {
  int node;
  Place g_output;
  bool params = false;  // run vjp_params first
  int input = -1;       // then vjp_input for this input, if >= 0
  Place g_input = kNowhere;
  bool accumulate = false;
  int scale_by = -1;
  int second_order = -1;  // then, in a second-order product, this entry of Schedules::second_order: a curved node's last step
  bool writes = false;    // of the first tile, vjp_params writes what the rule can write: no other node adds to it
};

struct SecondOrderStep {
  int node;
  std::vector<Place> t_inputs, g_inputs;  // kNowhere: zero, not wanted
};

struct ChainLink {
  int node;           // dense
  int scale_by = -1;  // the elementwise node behind it, if there is one
};

// From the value past what follows it to the output.
struct Shortcut {
  int value;
  int64_t width;
  int64_t saved;           // multiplications an example and direction in the dense layer that the value reaches no more
  Place place = kNowhere;  // of its tangent, then of its cotangent, in Schedules of shortened sweeps
};

struct Schedules {
  std::vector<ForwardStep> forward;
  std::vector<TangentStep> tangent;
  std::vector<CotangentStep> cotangent;
  std::vector<SecondOrderStep> second_order;
  int64_t forward_width = 0;            // workspace elements per example
  int64_t sweep_width = 0;              // of tangent and cotangent sweep together, per example and right-hand side
  Place output = kNowhere;              // the output's tangent, and its cotangent
  Place untransposed = kNowhere;        // of the value that Plan::untransposed() names
  std::vector<int64_t> tangent_packed;  // per node: where its packed parameter tangents begin, in elements per right-hand side
  int64_t tangent_packed_size = 0;      // of all nodes
  int64_t most_tangent_packed = 0;      // of one node
  // What of a flat vector the cotangent sweep only adds to, from begin to end in rising order; the rest is what steps write.
  std::vector<std::pair<int64_t, int64_t>> added;
};

template <class T>
class Plan {
 public:
  // `aliases` maps a value to the value it re-reads (views), -1 for itself. Values 0..input_widths.size()-1 are the network's inputs.
  // `num_parameters`: length of the flat vectors; parameters that no node reads have a place there too.
  // `own_rules`: per node a rule that is not in the registry, or null. `second_order`: for second-order products, too. `on_device`: for tapes on a
  // device, else for tapes on the CPU.
  Plan(std::vector<Node> nodes, std::vector<Slot> slots, std::vector<int64_t> input_widths, std::vector<int> aliases, int output,
       int64_t num_parameters, std::vector<std::shared_ptr<const Rule<T>>> own_rules, bool second_order, bool on_device);

  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<Slot>& slots() const { return slots_; }
  const Rule<T>& rule(int node) const { return *rules_[node]; }
  const Storage& storage(int node) const { return storages_[node]; }
  const Schedules& schedules(bool shortened = false) const { return shortened ? shortened_ : schedules_; }
  const std::vector<Shortcut>& shortcuts() const { return shortcuts_; }   // in the order of the nodes
  int producer(int value) const { return producer_[canonical_[value]]; }  // node, or -1 for inputs
  // From the lowest trained node to the output; empty if that is no chain, or one that is too deep or too wide.
  const std::vector<ChainLink>& chain() const { return chain_; }
  const MlpShape& chain_shape() const { return chain_shape_; }
  int num_inputs() const { return static_cast<int>(input_widths_.size()); }
  const std::vector<int64_t>& input_widths() const { return input_widths_; }
  int num_values() const { return static_cast<int>(widths_.size()); }
  int canonical(int value) const { return canonical_[value]; }
  int64_t width(int value) const { return widths_[canonical_[value]]; }
  bool is_kept(int value) const { return kept_[canonical_[value]]; }
  bool needs_tangent(int value) const { return needs_tangent_[canonical_[value]]; }  // does a differentiated parameter influence it?
  int output() const { return canonical_[output_]; }
  int64_t output_width() const { return width(output_); }
  int64_t num_parameters() const { return num_parameters_; }
  // The value whose transposition the output is, where it is one that puts the innermost axis first and nothing else reads the value; or -1.
  int untransposed() const { return untransposed_; }
  // Its innermost axis, the outputs' first: they may since have been reshaped, and then their first axis is another. Zero if there is none.
  int64_t untransposed_classes() const { return untransposed_ < 0 ? 0 : untransposed_classes_; }
  bool output_depends_on_parameters() const { return needs_tangent_[output()]; }
  bool is_read_once(int slot) const { return read_once_[slot]; }  // by one node, of all that read its region
  bool on_calling_thread() const;                                 // does a node refuse other threads?
  int64_t widest_activation() const;

 private:
  void merge_pools(bool second_order);
  void analyse();
  void find_regions();
  void find_untransposed();
  void compile_forward();
  std::vector<bool> carried() const;
  void compile_tangent(const std::vector<bool>& carried, Schedules& to);
  void compile_cotangent(const std::vector<bool>& carried, Schedules& to);
  void find_written(Schedules& to) const;
  void find_chain();
  void find_shortcuts();
  bool is_elementwise(int node) const { return storages_[node].derivative >= 0; }

  std::vector<Node> nodes_;
  std::vector<Slot> slots_;
  std::vector<int64_t> input_widths_;
  std::vector<int> canonical_;
  int output_;
  int64_t num_parameters_;
  int untransposed_ = -1;
  int64_t untransposed_classes_ = 0;
  std::vector<std::shared_ptr<const Rule<T>>> own_rules_;
  std::vector<const Rule<T>*> rules_;
  std::vector<Storage> storages_;
  std::vector<int64_t> widths_;  // per canonical value
  std::vector<int> producer_;    // per canonical value: node, or -1 for inputs
  std::vector<bool> kept_, needs_tangent_;
  std::vector<bool> read_once_;       // per slot
  std::vector<int> first_curved_;     // per canonical value with a tangent: the first curved node that reads it, or -1
  std::vector<Place> tangent_place_;  // of such values and those with a shortcut: where the tangent stays
  Schedules schedules_, shortened_;
  std::vector<Shortcut> shortcuts_;
  std::vector<ChainLink> chain_;
  MlpShape chain_shape_;
};

extern template class Plan<float>;
extern template class Plan<double>;

}  // namespace infl
