#include "plan/example_gradients.h"

#include <fstream>
#include <set>

#include "common/scratch.h"

namespace infl {

namespace {

// Results larger than this leave the caches before they are read: three quarters of the last level, where the system tells its size.
int64_t largest_cached_result() {
  static const int64_t size = [] {
    std::ifstream last_level("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
    int64_t kibibytes = 0;
    return last_level >> kibibytes ? (kibibytes << 10) / 4 * 3 : int64_t{8} << 20;
  }();
  return size;
}

}  // namespace

template <class T>
void ExampleGradients<T>::materialise(const Context& ctx, T* out) const {
  const Plan<T>& plan = tape_.plan();
  const int64_t N = num_examples(), P = plan.num_parameters();
  const bool stream = V_ * N * P * static_cast<int64_t>(sizeof(T)) > largest_cached_result();
  tape_.each_tile_of_factors(ctx, V_, g_, nullptr, [&](const Context& inner, int64_t n0, int64_t n, const std::vector<Factor<T>>& factors, T*) {
    FactorSet<T>(V_, n, P, plan.slots(), factors).materialise(inner, out + n0 * P, P, N * P, stream);
  });
}

template <class T>
void ExampleGradients<T>::square_norms(const Context& ctx, T* out) const {
  const Plan<T>& plan = tape_.plan();
  const int64_t N = num_examples();
  tape_.each_tile_of_factors(ctx, V_, g_, nullptr, [&](const Context& inner, int64_t n0, int64_t n, const std::vector<Factor<T>>& factors, T*) {
    Scratch<T> found(inner, V_ * n);
    FactorSet<T>(V_, n, plan.num_parameters(), plan.slots(), factors).square_norms(inner, found.data());
    copy_rows_stub<T>(inner, V_, n, found.data(), n, out + n0, N, false);
  });
}

template <class T>
void ExampleGradients<T>::dots(const Context& ctx, int64_t W, const T* u, T* out) const {
  tape_.dots(ctx, V_, g_, W, u, out);
}

template <class T>
std::vector<int64_t> ExampleGradients<T>::regions() const {
  std::set<int64_t> found;
  for (const CotangentStep& step : tape_.plan().schedules().cotangent) {
    if (!step.params) continue;
    for (const int slot : tape_.plan().nodes()[step.node].slots) {
      if (slot >= 0 && tape_.plan().slots()[slot].offset >= 0) found.insert(tape_.plan().slots()[slot].region.begin);
    }
  }
  return {found.begin(), found.end()};
}

template <class T>
void ExampleGradients<T>::square_norms(const Context& ctx, const std::vector<T*>& by_region) const {
  const Plan<T>& plan = tape_.plan();
  const int64_t N = num_examples();
  const std::vector<int64_t> wanted = regions();
  tape_.each_tile_of_factors(ctx, V_, g_, nullptr, [&](const Context& inner, int64_t n0, int64_t n, const std::vector<Factor<T>>& factors, T*) {
    const FactorSet<T> set(V_, n, plan.num_parameters(), plan.slots(), factors);
    Scratch<T> found(inner, V_ * n);
    for (size_t i = 0; i < wanted.size(); ++i) {
      set.square_norms(inner, wanted[i], found.data());
      copy_rows_stub<T>(inner, V_, n, found.data(), n, by_region[i] + n0, N, false);
    }
  });
}

template <class T>
void ExampleGradients<T>::square_sum(const Context& ctx, T* out) const {
  const Plan<T>& plan = tape_.plan();
  tape_.each_tile_of_factors(ctx, V_, g_, out, [&](const Context& inner, int64_t, int64_t n, const std::vector<Factor<T>>& factors, T* sum) {
    FactorSet<T>(V_, n, plan.num_parameters(), plan.slots(), factors).add_square_sum(inner, sum);
  });
}

template <class T>
struct ExampleGradients<T>::Whole {
  Whole(const Context& ctx, const ExampleGradients& of, FactorForm form)
      : workspace(ctx, of.tape_.factor_workspace(of.V_, of.num_examples())),
        storage(ctx),
        set(of.V_, of.num_examples(), of.tape_.plan().num_parameters(), of.tape_.plan().slots(),
            of.tape_.factors(ctx, of.V_, of.g_, 0, of.num_examples(), workspace.data(), storage, form)) {}

  Scratch<T> workspace;
  Arena<T> storage;
  FactorSet<T> set;
};

template <class T>
void ExampleGradients<T>::gram(const Context& ctx, const ExampleGradients& other, T* out) const {
  const Whole mine(ctx, *this, FactorForm::for_products);
  if (&other == this) return mine.set.gram(ctx, mine.set, out);
  mine.set.gram(ctx, Whole(ctx, other, FactorForm::for_products).set, out);
}

template <class T>
void ExampleGradients<T>::outer_products(const Context& ctx, const std::function<void(const Factor<T>&)>& body) const {
  const Whole mine(ctx, *this, FactorForm::outer);
  for (const Factor<T>& factor : mine.set.outer_products()) body(factor);
}

template class ExampleGradients<float>;
template class ExampleGradients<double>;

}  // namespace infl
