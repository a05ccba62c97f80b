// The contract of a rule: what one kind of node does forward, in tangent and cotangent direction, to second order, and per example.
//
// A tape at several parameter sets (plan/tape.h) hands all of them to a rule that takes_sets, in forward, vjp_input and vjp_params alone: V is 1,
// every array but shared inputs is [sets, n, width], and parameters are read where they lie, nothing being packed. Other rules see a set at a time.
//
// Axes: V right-hand sides first, n examples of a tile, then the node's width. All pointers stand at the tile's first example, all arrays
// are contiguous. A rule knows no device (it calls kernel stubs), no schedule and no data type. vjp is the transpose of jvp.
// To add one: copy identity.cpp, fill it in, add a row to capture/lowering/ and to tests/cases/layers.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/context.h"
#include "kernels/descent.h"
#include "layers/node.h"
#include "per_example/factor.h"

namespace infl {

// A node y = W x + b with the slots {W, b}: W[o, i] of `outputs` by `inputs` elements at o * out_stride + i * in_stride.
struct Dense {
  int64_t inputs = 0, outputs = 0;  // 0: the node is none
  int64_t out_stride = 0, in_stride = 0;
};

// What a rule wants kept between the forward pass and the products.
struct Storage {
  std::vector<bool> keeps_input;      // per input: is its value needed later?
  std::vector<int64_t> state_widths;  // arrays [N, width] of its own
  int64_t packed_size = 0;            // elements derived from θ alone (packed weights)
  int64_t tangent_packed_size = 0;    // elements derived from a parameter tangent, per right-hand side
  bool tangents_in_place = false;     // on a device parameter tangents are read where they lie: nothing is derived from them
  bool on_calling_thread = false;     // no other thread may run the node
  int derivative = -1;                // state array d if the node is elementwise with t_y = d ∘ t_x: such nodes can be fused into a neighbour
  Dense dense = {};                   // if it is: chains of such nodes can be one kernel (kernels/mlp.h)
  int64_t positions = 1;              // products of a cotangent and an input that an element of an example's gradient sums
  int64_t factor_size = 0;            // elements per_example allocates for one example's FactorForm::for_products
};

template <class T>
struct Tile {
  const Context& ctx;
  const Node& node;
  int64_t V = 1;
  int64_t n = 0;
  const T* const* x = nullptr;      // per input: its value [n, width], null unless kept (all present in forward)
  T* const* state = nullptr;        // per state array: [n, width]
  const T* const* theta = nullptr;  // per slot: parameter or constant, null if absent
  T* packed = nullptr;              // packed_size elements; null for several sets
  const T* prepared = nullptr;      // what prepare_input made of the first input, if anything
  bool first = false;               // of the tiles that vjp_params sums over: what the rule `writes` holds nothing yet

  int64_t sets = 1;                   // parameter sets at once, n examples each
  int64_t theta_stride = 0;           // between trained parameters of neighbouring sets; constants are shared
  const int64_t* x_stride = nullptr;  // per input, the same between inputs; 0: shared
};

template <class T>
struct ParameterTangents {
  const T* const* theta = nullptr;  // per slot: [V, size] with rows `stride` apart; null if not differentiated
  int64_t stride = 0;
  const T* packed = nullptr;  // [V, tangent_packed_size]
};

// What second_order reads of the sweeps, and where it adds.
template <class T>
struct SecondOrder {
  const T* g_y = nullptr;         // [n, width]: the cotangent at the point, the same for all right-hand sides
  const T* const* t_x = nullptr;  // per input: tangent [V, n, width of input], null: zero
  ParameterTangents<T> t_theta;
  T* const* g_x = nullptr;      // per input: [V, n, width of input], null if not wanted; two may be the same
  T* const* g_theta = nullptr;  // per slot: [V, size] rows `stride` apart, null if not wanted
  int64_t stride = 0;
};

template <class T>
class Rule {
 public:
  virtual ~Rule() = default;

  virtual Storage storage(const Node& node) const = 0;

  // Has the node second derivatives by the inputs that have a tangent and the slots that are trained? Piecewise linear is not curved.
  virtual bool is_curved(const Node& node) const = 0;

  // y [n, width] from tile.x; fills tile.state.
  virtual void forward(const Tile<T>& tile, T* y) const = 0;

  // t_y [V, n, width] from the tangents of the inputs (null: zero, costs nothing) and parameters.
  // `scale` [n, width], given only if fuses_scale(): t_y is to be multiplied by it.
  virtual void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* scale, T* t_y) const = 0;

  // g_x [V, n, width of input i] from g_y [V, n, width]; added to g_x with `accumulate`.
  // `scale` [n, width of input i], given only if fuses_scale(): g_x is to be multiplied by it.
  virtual void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* scale, T* g_x, bool accumulate) const = 0;

  // Derives what jvp and vjp_input want of θ, into tile.packed (tile.n is 0).
  virtual void pack(const Tile<T>&) const {}

  // How many elements prepare_input writes for n examples; 0: the rule has no use for it.
  virtual int64_t prepared_size(const Node&, int64_t /*n*/) const { return 0; }

  // Derives what forward, vjp_params and descend want of the first input alone, for many parameter sets to share, from tile.x. Given to the tile of
  // all n examples, it takes the place of what pack would derive for forward.
  virtual void prepare_input(const Tile<T>&, T* /*prepared*/) const {}

  // Derives what jvp wants of V parameter tangents, into `packed` [V, tangent_packed_size].
  virtual void pack_tangents(const Tile<T>&, const ParameterTangents<T>&, T* /*packed*/) const {}

  // g_theta [per slot: [V, size] rows `stride` apart; null if not wanted] += the sum over the tile's examples.
  virtual void vjp_params(const Tile<T>&, const T* /*g_y*/, T* const* /*g_theta*/, int64_t /*stride*/) const {}

  // Whether vjp_params writes slot k's gradient where tile.first, instead of adding to zeros.
  virtual bool writes(const Node&, size_t /*k*/) const { return false; }

  // Whether descend moves the parameter of slot k.
  virtual bool descends(const Node&, size_t /*k*/) const { return false; }

  // The step of slot k's parameter, which lies from `begin` on in what is moved, by the gradient that vjp_params would add, part after part while
  // that is in the cache. vjp_input comes after it and must not read the slot.
  virtual void descend(const Tile<T>&, size_t /*k*/, const T* /*g_y*/, const Descent<T>&, const Moved<T>&, int64_t /*begin*/) const {}

  // Adds to g_x and g_theta what vjp changes by along (t_x, t_theta) at a fixed g_y: the second derivative of g_yᵀ f contracted with the tangent,
  //   S = ∂²(g_yᵀ f)/∂(x, θ)² · (t_x, t_θ), summed over the examples for parameters. Called where node.curved.
  virtual void second_order(const Tile<T>&, const SecondOrder<T>&) const {}

  // Adds the factors of each example's own gradient. They may point at tile.x, at g_y and at what `factors` allocates.
  virtual void per_example(const Tile<T>&, const T* /*g_y*/, FactorSink<T>& /*factors*/) const {}

  virtual bool fuses_scale() const { return false; }

  virtual bool takes_sets(const Node&) const { return false; }
};

// Registry: name -> rule. A rule registers itself with INFL_REGISTER_RULE in its own file.
template <class T>
const Rule<T>* find_rule(const std::string& name);

template <class T>
void register_rule(const std::string& name, std::unique_ptr<Rule<T>> rule);

std::vector<std::string> rule_names();

#define INFL_REGISTER_RULE(name, Type)                                     \
  [[maybe_unused]] static const bool Type##_is_registered = [] {           \
    ::infl::register_rule<float>(name, std::make_unique<Type<float>>());   \
    ::infl::register_rule<double>(name, std::make_unique<Type<double>>()); \
    return true;                                                           \
  }();

}  // namespace infl
