// The sizes of a sweep: which schedule it takes, how many examples and right-hand sides at once, and the memory of that.
#include <unistd.h>

#include <algorithm>

#include "plan/tape.h"

namespace infl {

namespace {

// What a tile may take, a core's second-level cache up to 1 MB, as most servers have it: a smaller one would leave room for the accumulator there,
// but gradients sum over its examples, and sums of few terms take as long to add up as to make. Then the size below which an accumulator per thread
// nearly stays in a cache of 1 MB.
constexpr int64_t kLeastTileBytes = 256 << 10, kMostTileBytes = 1 << 20;
constexpr int64_t kAccumulatorBytes = 1 << 20;
constexpr int64_t kSmallestTile = 8, kLargestTile = 256;
// Right-hand sides of one sweep: more share little that fewer do not, so beyond this many they must leave room for one another in the cache.
constexpr int64_t kSharedSides = 8, kSidesBytes = 128 << 10;
constexpr int64_t kWholeWorkspaceBytes = 64 << 20;           // by operator: workspace of one tile; by example: accumulators of all threads
constexpr int64_t kDeviceWorkspaceBytes = int64_t{2} << 30;  // few, large launches
// Shortcuts: what their Jacobians may take, and what an element of them costs, in multiplications of a matrix product: one, at a fraction of its
// rate, and its way from a shared cache or from memory, for all right-hand sides of a sweep.
constexpr int64_t kJacobianBytes = 256 << 20, kNearBytes = 8 << 20;
constexpr int64_t kJacobianMultiplication = 3, kNearLoad = 10, kFarLoad = 25;
constexpr int64_t kPaysBackWithin = 8;  // vectors: the Jacobians themselves take a cotangent sweep for each output

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tile_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (cache > 0) return std::clamp(cache, kLeastTileBytes, kMostTileBytes);
#endif
    return kMostTileBytes;  // not known
  }();
  return bytes;
}

}  // namespace

template <class T>
Tiling Tape<T>::tiling(const Context& ctx, int64_t V) const {
  if (runs_as_chain(ctx, V))
    return {.by_example = true, .tile = mlp_tiling<T>(V, N_, plan_->chain_shape().width).rows, .num_threads = ctx.num_threads};
  const int64_t together = sides(ctx, V);
  return tiling(ctx, together, together, takes_shortcuts(ctx, V));
}

// Of a sweep for V right-hand sides that adds to `sums` vectors [P].
template <class T>
Tiling Tape<T>::tiling(const Context& ctx, int64_t V, int64_t sums, bool shortened) const {
  const int num_threads = ctx.num_threads;
  const bool on_device = ctx.on_device();
  const Schedules& s = plan_->schedules(shortened);
  int64_t kept = 0;  // tape elements per example that a sweep reads
  for (size_t i = 0; i < plan_->nodes().size(); ++i) {
    for (int64_t width : plan_->storage(static_cast<int>(i)).state_widths) kept += width;
    if (plan_->nodes()[i].curved) kept += plan_->nodes()[i].width;
  }
  for (int id = 0; id < plan_->num_values(); ++id) {
    if (plan_->canonical(id) == id && (plan_->is_kept(id) || id < plan_->num_inputs())) kept += plan_->width(id);
  }
  for (const Shortcut& shortcut : plan_->shortcuts()) kept += shortened ? plan_->output_width() * shortcut.width : 0;
  const int64_t sweep_bytes = std::max<int64_t>(1, std::max(s.sweep_width * V, s.forward_width)) * sizeof(T);
  const int64_t accumulator = sums * plan_->num_parameters() * static_cast<int64_t>(sizeof(T));
  const int64_t example_bytes = sweep_bytes + kept * static_cast<int64_t>(sizeof(T));
  const int64_t cached_tile = std::clamp(tile_bytes() / example_bytes, kSmallestTile, kLargestTile);
  // By example pays where accumulators stay in the cache, or where moving them for every tile costs less than writing and reading the activations.
  const int64_t accumulator_traffic = ceil_div(N_, cached_tile) * 2 * accumulator;
  bool by_example = accumulator <= kAccumulatorBytes ||
                    (accumulator_traffic < 2 * N_ * example_bytes && num_threads * accumulator <= kWholeWorkspaceBytes && N_ >= 2 * num_threads);
  if (choice_ != ScheduleChoice::automatic) by_example = choice_ == ScheduleChoice::by_example;
  if (plan_->on_calling_thread() || on_device || sets_ > 1) by_example = false;
  Tiling tiling;
  tiling.num_threads = num_threads;
  tiling.by_example = by_example;
  if (by_example) {
    tiling.tile = cached_tile;
    // Equal shares: a multiple of the number of threads, tiles of nearly equal size.
    const int64_t tiles = ceil_div(ceil_div(std::max<int64_t>(N_, 1), tiling.tile), num_threads) * num_threads;
    tiling.tile = std::max<int64_t>(1, ceil_div(N_, tiles));
  } else {
    const int64_t budget = on_device ? kDeviceWorkspaceBytes : kWholeWorkspaceBytes;
    tiling.tile = std::clamp<int64_t>(budget / sweep_bytes, std::min<int64_t>(64, std::max<int64_t>(N_, 1)), on_device ? N_ + 1 : 2048);
    const int64_t tiles = ceil_div(std::max<int64_t>(N_, 1), tiling.tile);
    tiling.tile = std::max<int64_t>(1, ceil_div(N_, tiles));
  }
  if (sets_ > 1) tiling.tile = std::max<int64_t>(1, N_);  // a node's examples of all sets follow one another
  return tiling;
}

template <class T>
int64_t Tape<T>::sides(const Context& ctx, int64_t V) const {
  if (V <= 0 || plan_->on_calling_thread() || ctx.on_device()) return std::max<int64_t>(V, 1);  // calls and launches cost more than the cache saves
  const int64_t bytes = std::max<int64_t>(1, plan_->num_parameters()) * static_cast<int64_t>(sizeof(T));
  return ceil_div(V, ceil_div(V, std::max(kSharedSides, kSidesBytes / bytes)));
}

template <class T>
int64_t Tape<T>::cached_bytes() const {
  int64_t bytes = 0;
  for (const auto& b : values_) bytes += b.bytes();
  for (const auto& node : states_) {
    for (const auto& b : node) bytes += b.bytes();
  }
  for (const auto& b : packed_) bytes += b.bytes();
  for (size_t s = 0; s < theta_.size(); ++s) {
    const bool borrowed = theta_at_[s] != nullptr && theta_at_[s] != theta_[s].data();
    if (!borrowed) bytes += plan_->slots()[s].size * static_cast<int64_t>(sizeof(T));  // those of a tape that is still to be linearised, too
  }
  for (const auto& b : cotangents_) bytes += b.bytes();
  for (const auto& b : jacobians_) bytes += b.bytes();
  return bytes;
}

template <class T>
int64_t Tape<T>::workspace_bytes(const Context& ctx, int64_t V) const {
  if (runs_as_chain(ctx, V)) return mlp_workspace<T>(V, N_, plan_->num_parameters(), plan_->chain_shape().width);
  const int64_t together = sides(ctx, V);
  const bool shortened = takes_shortcuts(ctx, V);
  const Tiling t = tiling(ctx, together, together, shortened);
  const int64_t sweep = std::max(plan_->schedules(shortened).sweep_width * together, plan_->schedules().forward_width) * t.tile;
  const int64_t own_sums = (ctx.num_threads - 1) * together * plan_->num_parameters();  // the first thread's are the result
  const int64_t of_threads = t.by_example ? ctx.num_threads * sweep + own_sums : sweep;
  const Schedules& s = plan_->schedules(shortened);
  const int64_t packed = packs_ahead(ctx, together, shortened) ? s.tangent_packed_size : s.most_tangent_packed;
  return (of_threads + together * packed) * static_cast<int64_t>(sizeof(T));
}

template <class T>
bool Tape<T>::packs_ahead(const Context& ctx, int64_t V, bool shortened) const {
  const auto is_curved = [](const Node& node) { return node.curved; };  // its second-order term reads what was packed
  if (ctx.on_device() || std::any_of(plan_->nodes().begin(), plan_->nodes().end(), is_curved)) return true;
  return tiling(ctx, V, V, shortened).tile < N_;
}

template <class T>
bool Tape<T>::takes_shortcuts(const Context& ctx, int64_t V) const {
  if (!shortcuts_allowed_ || ctx.on_device() || sets_ > 1 || V == 0) return false;
  int64_t saved = 0, elements = 0;
  for (const Shortcut& shortcut : plan_->shortcuts()) {
    saved += shortcut.saved;
    elements += plan_->output_width() * shortcut.width;
  }
  const int64_t bytes = N_ * elements * static_cast<int64_t>(sizeof(T));
  const int64_t spent = elements * (kJacobianMultiplication + (bytes > kNearBytes ? kFarLoad : kNearLoad) / sides(ctx, V));
  return bytes <= kJacobianBytes && plan_->output_width() * saved < kPaysBackWithin * 2 * (saved - spent);
}

#define INFL_TILING(T)                                                           \
  template Tiling Tape<T>::tiling(const Context&, int64_t) const;                \
  template Tiling Tape<T>::tiling(const Context&, int64_t, int64_t, bool) const; \
  template bool Tape<T>::takes_shortcuts(const Context&, int64_t) const;         \
  template bool Tape<T>::packs_ahead(const Context&, int64_t, bool) const;       \
  template int64_t Tape<T>::sides(const Context&, int64_t) const;                \
  template int64_t Tape<T>::cached_bytes() const;                                \
  template int64_t Tape<T>::workspace_bytes(const Context&, int64_t) const;
INFL_TILING(float)
INFL_TILING(double)

}  // namespace infl
