// What is computed from the factors of per-example gradients. Each quantity is written once, for every rule.
//
// Factors are grouped by region first (common/slot.h): a parameter used more than once owns several, and its gradient is their sum, cross terms
// included; so have slices of it that overlap. A region with one factor at one position (a linear layer on vectors) takes the short way, without
// forming its gradients; so does a table whose rows are picked by index (row_scatter.h); any other is formed by parts: for a block of examples, or
// for the Gram matrix some rows of the weight, unless pairs of few positions cost less.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "common/context.h"
#include "common/slot.h"
#include "per_example/factor.h"
#include "per_example/outer_products.h"

namespace infl {

template <class T>
class FactorSet {
 public:
  // What the factors point into, and the slots, must outlive the set.
  FactorSet(int64_t V, int64_t N, int64_t num_parameters, const std::vector<Slot>& slots, const std::vector<Factor<T>>& factors);

  int64_t num_vectors() const { return V_; }
  int64_t num_examples() const { return N_; }
  // The factors of every slot whose region has nothing but outer products, all of the whole region.
  std::vector<Factor<T>> outer_products() const;
  // [V, N, P], examples and right-hand sides so far apart; `stream`: written past the caches.
  void materialise(const Context& ctx, T* out, int64_t stride, int64_t v_stride, bool stream) const;
  void square_norms(const Context& ctx, T* out) const;                  // [V, N]
  void square_norms(const Context& ctx, int64_t region, T* out) const;  // [V, N], of the one that begins there
  void add_square_sum(const Context& ctx, T* out) const;                // [P] += Σ over v and n of the squared entries
  void gram(const Context& ctx, const FactorSet& other, T* out) const;  // [V N, V' N'] inner products

 private:
  // A region's factors.
  struct Group {
    int64_t size = 0;
    bool whole = true;  // has every factor all of the region? Slices that overlap in it may have added nothing
    std::vector<Factor<T>> factors;
    bool is_alone() const { return whole && factors.size() == 1; }
    bool is_simple() const { return is_alone() && factors[0].positions == 1 && !factors[0].is_scatter(); }
    bool is_outer() const { return is_alone() && !factors[0].is_dense() && !factors[0].is_scatter(); }
    bool is_scatter() const { return is_alone() && factors[0].is_scatter(); }
  };
  int64_t place(const Factor<T>& f) const { return slots_[f.slot].offset - slots_[f.slot].region.begin; }  // in its region
  // Gradients of examples [n0, n0 + n) for right-hand side v, with respect to one region: out [n, size], examples `stride` apart.
  void form(const Context& ctx, const Group& group, int64_t v, int64_t n0, int64_t n, T* out, int64_t stride, bool stream = false) const;
  void add_square_norms(const Context& ctx, const Group& group, T* out) const;
  // Of groups of one region in both sets.
  void add_gram(const Context& ctx, const Group& mine, const FactorSet& other, const Group& theirs, T* out) const;
  // Of `count` elements, from the `first` of mine and the `other_first` of theirs on: blocks of formed gradients against each other.
  void add_formed_gram(const Context& ctx, const Group& mine, int64_t first, const FactorSet& other, const Group& theirs, int64_t other_first,
                       int64_t count, T* out) const;
  // Of simple groups with the same sides; `ones`: and of the dense ones with the same vectors.
  void add_simple_gram(const Context& ctx, const Factor<T>& mine, const FactorSet& other, const Factor<T>& theirs, bool ones, T* out) const;
  // Of groups that are outer products with the same sides, by inner products of all positions of one example with all of the other:
  // (row·row')(col·col'). One cotangent.
  void add_pair_gram(const Context& ctx, const Factor<T>& mine, const FactorSet& other, const Factor<T>& theirs, T* out) const;
  bool pairs_positions(const FactorSet& other, const Factor<T>& mine, const Factor<T>& theirs) const;
  // Of the same groups, by the gradients of all examples, formed `most` rows at a time.
  void add_outer_gram(const Context& ctx, const Factor<T>& mine, const FactorSet& other, const Factor<T>& theirs, int64_t most, T* out) const;
  int64_t rows_of_outer_gram(const FactorSet& other, const Factor<T>& mine, const Factor<T>& theirs) const;  // 0: a single one takes too much memory
  void form_rows(const Context& ctx, const std::vector<OuterProducts<T>>& each, int64_t first, int64_t rows, int64_t size, T* out) const;
  std::vector<OuterProducts<T>> outer_products(const Context& ctx, const Factor<T>& f) const;
  // The Gram matrix of a set with itself is computed above the diagonal alone, in blocks of so many rows; a device would rather have few launches.
  bool is_halved(const Context& ctx, const FactorSet& other) const { return this == &other && !ctx.on_device(); }
  int64_t rows_of_half() const;
  void mirror(const Context& ctx, T* out) const;
  // The dense parameters whose gradients are the vectors of an outer product (a layer's bias, of its weight), in both sets: region of the latter ->
  // region.
  std::map<int64_t, int64_t> dense_partners(const FactorSet& other) const;

  int64_t V_, N_, num_parameters_;
  const std::vector<Slot>& slots_;
  std::map<int64_t, Group> groups_;  // by where the region begins
};

extern template class FactorSet<float>;
extern template class FactorSet<double>;

}  // namespace infl
