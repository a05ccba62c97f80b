// Fibers for the threads of a block, memory and matrix products of the emulated device, and the table that the extension loads.
#include <charconv>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>

#include "common/device_library.h"
#include "common/out_of_memory.h"
#include "emulation/product.h"
#include "kernels/cuda/launch.h"

namespace infl::emulation {

namespace {

// swap_stacks(save, load): keeps the registers that a call must keep on the running stack, stores its top in *save, and goes on where `load` stood.
extern "C" void infl_swap_stacks(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.type infl_swap_stacks, @function
infl_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size infl_swap_stacks, . - infl_swap_stacks
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type infl_swap_stacks, @function
infl_swap_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size infl_swap_stacks, . - infl_swap_stacks
)");
#else
#error "the emulation switches stacks on x86-64 and AArch64 only"
#endif

constexpr size_t kStackBytes = 64 << 10;

enum class State { ready, at_cluster_barrier, at_block_barrier, at_warp_barrier, at_gather, done };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* top = nullptr;
  Place place;
  State state = State::ready;
  unsigned gathers = 0, arrivals = 0, waits = 0;  // the last two at the cluster's barrier
};

// The block in hand, or the cluster of them: block r has the fibers from r * stride on.
struct Block {
  dim3 shape, grid;
  std::vector<Fiber> fibers;
  int blocks = 1, count = 0, stride = 0;  // threads of a block, and whole warps of them
  int running = 0;
  void* scheduler = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::vector<uint64_t> exchanged;
  std::vector<Given> given[2];  // of gathers in turn
  const char* failure = nullptr;
  std::vector<std::vector<unsigned char>> shared;  // of each block
};

// Found through a pointer, which needs no check of initialisation at each of the many uses.
thread_local Block own_block;
constinit thread_local Block* running_block = nullptr;

Fiber& current(Block& block) { return block.fibers[block.running]; }

void leave(Block& block, State state) {
  Fiber& fiber = current(block);
  fiber.state = state;
  infl_swap_stacks(&fiber.top, block.scheduler);
}

void fiber_main() {
  for (;;) {
    (*running_block->kernel)();
    leave(*running_block, State::done);
  }
}

void prepare(Fiber& fiber) {
  // As if it had been left at the start of fiber_main.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  auto* frame = reinterpret_cast<void**>(top) - 2;  // where a call leaves the stack: 8 bytes off a multiple of 16
  *frame = reinterpret_cast<void*>(&fiber_main);
  fiber.top = frame - 6;
#else
  auto* frame = reinterpret_cast<void**>(top - 160);
  frame[11] = reinterpret_cast<void*>(&fiber_main);
  fiber.top = frame;
#endif
}

// What INFL_EMULATION_ORDER says: nothing, "reversed", or a seed.
struct Order {
  bool is_reversed = false, is_drawn = false;
  uint64_t seed = 0;
};

const Order& order() {
  static const Order said = [] {
    const char* given = std::getenv("INFL_EMULATION_ORDER");
    const std::string text(given == nullptr ? "" : given);
    Order order;
    if (text.empty()) return order;
    order.is_reversed = text == "reversed";
    order.is_drawn = !order.is_reversed;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), order.seed);
    if (order.is_drawn && (error != std::errc() || end != text.data() + text.size())) {
      throw std::invalid_argument("emulated device: expected INFL_EMULATION_ORDER to be 'reversed' or a seed below 2^64, got '" + text +
                                  "'; give one of these, or unset it.");
    }
    return order;
  }();
  return said;
}

// In which order `count` threads, warps or blocks take their turns: as they are numbered, the other way round, or at steps from a place that are
// drawn anew every time.
class Turns {
 public:
  explicit Turns(uint64_t count) : count_(count) {
    const Order& said = order();
    if (count < 2) return;
    if (said.is_reversed) at_ = step_ = count - 1;
    if (!said.is_drawn) return;
    thread_local std::mt19937_64 draw(said.seed);
    at_ = draw() % count;
    do step_ = draw() % count;
    while (std::gcd(step_, count) != 1);
  }
  uint64_t next() {
    const uint64_t at = at_;
    at_ += step_;
    if (at_ >= count_) at_ -= count_;
    return at;
  }

 private:
  uint64_t count_, at_ = 0, step_ = 1;
};

void resume(Block& block, int index) {
  block.running = index;
  infl_swap_stacks(&block.scheduler, current(block).top);
}

[[noreturn]] void stuck(const char* who, const std::string& what) {
  running_block->fibers.clear();  // those that wait would go on in the next launch
  throw std::runtime_error(std::string(who) + ": " + what + ".");
}

// Runs the lanes of one warp until all have ended or wait for the block.
void run_warp(Block& block, const char* who, int begin, int end) {
  for (;;) {
    Turns turns(static_cast<uint64_t>(end - begin));
    for (int k = begin; k < end; ++k) {
      const int i = begin + static_cast<int>(turns.next());
      if (block.fibers[i].state == State::ready) resume(block, i);
    }
    if (block.failure != nullptr) stuck(who, block.failure);
    int at_warp = 0, at_wider = 0, at_gather = 0;
    for (int i = begin; i < end; ++i) {
      at_warp += block.fibers[i].state == State::at_warp_barrier;
      at_wider += block.fibers[i].state == State::at_block_barrier || block.fibers[i].state == State::at_cluster_barrier;
      at_gather += block.fibers[i].state == State::at_gather;
    }
    if (at_gather != 0 && at_gather != 32) stuck(who, "expected all 32 lanes at a warp's instruction, got " + std::to_string(at_gather));
    if (at_warp + at_gather == 0) return;
    if (at_wider > 0) stuck(who, "lanes of one warp wait at a warp's and at the block's or cluster's barrier");
    for (int i = begin; i < end; ++i) {
      const State state = block.fibers[i].state;
      if (state == State::at_warp_barrier || state == State::at_gather) block.fibers[i].state = State::ready;
    }
  }
}

// Runs the threads from `first` on, those of a block, until all have ended or wait for the cluster.
void run_block(Block& block, const char* who, int first) {
  const int warps = block.stride / 32, end = first + block.count;
  for (;;) {
    Turns turns(static_cast<uint64_t>(warps));
    for (int k = 0; k < warps; ++k) {
      const int w = static_cast<int>(turns.next());
      run_warp(block, who, first + w * 32, std::min(end, first + w * 32 + 32));
    }
    bool waits = false, waits_for_cluster = false;
    for (int i = first; i < end; ++i) {
      waits = waits || block.fibers[i].state == State::at_block_barrier;
      waits_for_cluster = waits_for_cluster || block.fibers[i].state == State::at_cluster_barrier;
    }
    if (!waits) return;
    if (waits_for_cluster) stuck(who, "threads of one block wait at the block's and at the cluster's barrier");
    for (int i = first; i < end; ++i) {
      if (block.fibers[i].state == State::at_block_barrier) block.fibers[i].state = State::ready;
    }
  }
}

void run_cluster(Block& block, const char* who) {
  const auto each_fiber = [&](const auto& body) {
    for (int r = 0; r < block.blocks; ++r) {
      for (int i = 0; i < block.count; ++i) body(block.fibers[r * block.stride + i]);
    }
  };
  each_fiber([](Fiber& fiber) {
    fiber.state = State::ready;
    fiber.gathers = fiber.arrivals = fiber.waits = 0;
  });
  for (;;) {
    bool waits = false;
    unsigned fewest = ~0u, most = 0;  // arrivals
    Turns turns(static_cast<uint64_t>(block.blocks));
    for (int k = 0; k < block.blocks; ++k) {
      const int r = static_cast<int>(turns.next());
      run_block(block, who, r * block.stride);
      bool ended = true;
      for (int i = r * block.stride; i < r * block.stride + block.count; ++i) {
        const Fiber& fiber = block.fibers[i];
        if (fiber.state == State::done) continue;
        ended = false;
        fewest = std::min(fewest, fiber.arrivals);
        most = std::max(most, fiber.arrivals);
      }
      waits = waits || !ended;
      if (ended) std::fill(block.shared[r].begin(), block.shared[r].end(), 0xff);  // gone with its block
    }
    if (!waits) return;
    if (fewest != most) stuck(who, "a cluster's barrier at which not all threads arrive");
    each_fiber([](Fiber& fiber) {
      if (fiber.state == State::at_cluster_barrier) fiber.state = State::ready;
    });
  }
}

// What was asked of the device so far: launches of kernels, the vendor's products, copies to and from the host.
struct Traffic {
  int64_t launches = 0, products = 0, copies = 0;
  int64_t bytes = 0, most_bytes = 0;  // of memory now, and at most since it was asked
} traffic;

// What has been enqueued while it was recorded, and the memory that was allocated meanwhile. Freed memory serves later allocations of the recording,
// as torch's allocator has it, and nobody else as long as the graph lives.
struct Recording {
  std::vector<std::function<void()>> launches;
  std::map<void*, size_t> held, spare;
  bool is_valid = true;

  void invalidate(const char* what) {
    is_valid = false;
    throw std::runtime_error(std::string("emulated device: expected launches alone while they are recorded, got ") + what + ".");
  }
};

// A thread's own: another may go on as before.
thread_local std::shared_ptr<Recording> recording;

// The device has as much memory as the host, or the bytes that INFL_EMULATION_MEMORY says.
void* fresh(size_t bytes) {
  const char* limit = std::getenv("INFL_EMULATION_MEMORY");
  const int64_t wanted = static_cast<int64_t>(bytes), left = limit == nullptr ? wanted : std::max<int64_t>(0, std::atoll(limit) - traffic.bytes);
  void* p = wanted > left ? nullptr : std::aligned_alloc(256, bytes);
  if (p == nullptr) throw OutOfMemory(wanted, "on the emulated device", limit == nullptr ? -1 : left);
  std::memset(p, 0xff, bytes);  // NaN
  return p;
}

// Memory of the device. What is freed holds NaN and is kept back for a while, so that a launch that still reads it shows.
class Memory {
 public:
  void* allocate(int64_t wanted) {
    const auto bytes = static_cast<size_t>((wanted + 255) / 256 * 256);
    const std::lock_guard<std::mutex> guard(mutex_);
    if (recording == nullptr) {
      void* p = fresh(bytes);
      sizes_[p] = bytes;
      count(bytes);
      return p;
    }
    for (auto it = recording->spare.begin(); it != recording->spare.end(); ++it) {
      if (it->second < bytes) continue;
      void* p = it->first;
      recording->spare.erase(it);
      return p;
    }
    void* p = fresh(bytes);
    recording->held[p] = bytes;
    owners_[p] = recording;
    count(bytes);
    return p;
  }
  void release(void* p) noexcept {
    if (p == nullptr) return;
    const std::lock_guard<std::mutex> guard(mutex_);
    if (const auto it = owners_.find(p); it != owners_.end()) {
      if (const auto owner = it->second.lock()) owner->spare[p] = owner->held[p];
      return;
    }
    const auto it = sizes_.find(p);
    if (it == sizes_.end()) return;  // of a graph that is gone
    keep_back(p, it->second);
    sizes_.erase(it);
  }
  void release(const Recording& graph) noexcept {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const auto& [p, bytes] : graph.held) {
      owners_.erase(p);
      keep_back(p, bytes);
    }
  }

 private:
  static constexpr size_t kKeptBack = 256 << 20;
  static void count(size_t bytes) {
    traffic.bytes += static_cast<int64_t>(bytes);
    traffic.most_bytes = std::max(traffic.most_bytes, traffic.bytes);
  }
  void keep_back(void* p, size_t bytes) {
    traffic.bytes -= static_cast<int64_t>(bytes);
    std::memset(p, 0xff, bytes);
    freed_.emplace_back(p, bytes);
    freed_bytes_ += bytes;
    while (freed_bytes_ > kKeptBack) {
      freed_bytes_ -= freed_.front().second;
      std::free(freed_.front().first);
      freed_.pop_front();
    }
  }

  std::mutex mutex_;
  std::map<void*, size_t> sizes_;
  std::map<void*, std::weak_ptr<Recording>> owners_;  // of what was allocated in a recording
  std::deque<std::pair<void*, size_t>> freed_;
  size_t freed_bytes_ = 0;
};

Memory& memory() {
  static auto* all = new Memory;  // outlives every tape, whatever order a process ends in
  return *all;
}

void run(const std::function<void()>& work) {
  if (recording != nullptr) {
    recording->launches.push_back(work);
  } else {
    work();
  }
}

class RecordedLaunches final : public LaunchGraph {
 public:
  explicit RecordedLaunches(std::shared_ptr<Recording> recorded) : recorded_(std::move(recorded)) {}
  ~RecordedLaunches() override { memory().release(*recorded_); }

  // Nothing that an earlier replay left in the graph's own memory may be read.
  void replay(void*) override {
    if (recording == nullptr) {
      for (const auto& [p, bytes] : recorded_->held) std::memset(p, 0xff, bytes);
    }
    for (const auto& launch : recorded_->launches) run(launch);
  }
  int64_t num_launches() const override { return static_cast<int64_t>(recorded_->launches.size()); }

 private:
  std::shared_ptr<Recording> recorded_;
};

class Recorder final : public LaunchRecorder {
 public:
  bool is_recording(void*) override { return recording != nullptr; }
  std::unique_ptr<LaunchGraph> record(void*, const std::function<void()>& body) override {
    if (recording != nullptr) recording->invalidate("another recording");
    recording = std::make_shared<Recording>();
    struct End {
      ~End() { recording.reset(); }
    } end;
    auto graph = std::make_unique<RecordedLaunches>(recording);
    body();
    if (!recording->is_valid) throw std::runtime_error("emulated device: expected a recording that nothing has broken, got one that something has.");
    return graph;
  }
};

class HostRuntime final : public DeviceRuntime {
 public:
  void* allocate(int64_t bytes, void*) override { return memory().allocate(bytes); }
  void release(void* p) noexcept override { memory().release(p); }
  void upload(void* to, const void* from, int64_t bytes, void*) override {
    if (recording != nullptr) recording->invalidate("a copy from the host");
    copy(to, from, bytes);
  }
  void download(void* to, const void* from, int64_t bytes, void*) override {
    if (recording != nullptr) recording->invalidate("a copy to the host");
    copy(to, from, bytes);
  }
  void multiply(const MatrixProduct<float>& p, Precision, void*) override {
    check(p);
    run([p] {
      ++traffic.products;
      emulation::multiply(p);
    });
  }
  void multiply(const MatrixProduct<double>& p, Precision, void*) override {
    check(p);
    run([p] {
      ++traffic.products;
      emulation::multiply(p);
    });
  }

 private:
  static void copy(void* to, const void* from, int64_t bytes) {
    ++traffic.copies;
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
};

}  // namespace

const Place& here() { return current(*running_block).place; }
const dim3& block_shape() { return running_block->shape; }
const dim3& grid_shape() { return running_block->grid; }
void* dynamic_shared_of(int rank) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(running_block->shared[rank].data()) + 15) & ~uintptr_t{15});
}
void* dynamic_shared() { return dynamic_shared_of(running_block->running / running_block->stride); }
const void* of_block(const void* own, int rank) {
  if (rank < 0 || rank >= running_block->blocks) fail("a block that the cluster does not have");
  return static_cast<const char*>(dynamic_shared_of(rank)) + (static_cast<const char*>(own) - static_cast<const char*>(dynamic_shared()));
}
Limits limits() {
  const char* architecture = std::getenv("INFL_EMULATION_ARCHITECTURE");
  const bool is_ampere = architecture != nullptr && std::string(architecture) == "80";
  return {static_cast<size_t>(is_ampere ? 163 : 227) << 10, static_cast<size_t>(is_ampere ? 164 : 228) << 10, !is_ampere};
}
void cluster_arrival() {
  Fiber& fiber = current(*running_block);
  if (++fiber.arrivals > fiber.waits + 1) fail("a second arrival at a cluster's barrier before the wait for the first");
}
void cluster_barrier() {
  Fiber& fiber = current(*running_block);
  if (++fiber.waits > fiber.arrivals) fail("a wait at a cluster's barrier without an arrival before it");
  leave(*running_block, State::at_cluster_barrier);
}
void block_barrier() { leave(*running_block, State::at_block_barrier); }
void warp_barrier() { leave(*running_block, State::at_warp_barrier); }
const Given* gather(const void* own, size_t size) {
  Block& block = *running_block;
  std::vector<Given>& given = block.given[current(block).gathers++ % 2];
  std::memcpy(given[block.running].bytes, own, size);
  const Given* warp = &given[block.running / 32 * 32];
  leave(block, State::at_gather);
  return warp;
}
void fail(const char* what) {
  running_block->failure = what;
  leave(*running_block, State::done);
}
uint64_t& exchange(int lane) { return running_block->exchanged[running_block->running / 32 * 32 + lane]; }
int lane() { return running_block->running % 32; }
bool is_alive(int lane) {
  const Block& block = *running_block;
  const int i = block.running / 32 * 32 + lane;
  return i % block.stride < block.count && block.fibers[i].state != State::done;
}

void launch(const char* who, int cluster, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel) {
  if (recording != nullptr) {
    recording->launches.push_back([=] { launch(who, cluster, blocks, threads, shared, kernel); });
    return;
  }
  ++traffic.launches;
  Block& block = own_block;
  running_block = &block;
  block.count = static_cast<int>(threads.x * threads.y * threads.z);
  block.stride = (block.count + 31) / 32 * 32;
  block.blocks = cluster;
  if (block.count < 1 || block.count > 1024) stuck(who, "expected 1 to 1024 threads a block, got " + std::to_string(block.count));
  if (shared > limits().shared_bytes) {
    stuck(who, "expected at most " + std::to_string(limits().shared_bytes) + " bytes of shared memory, got " + std::to_string(shared));
  }
  if (blocks.x < 1 || blocks.y < 1 || blocks.z < 1 || blocks.y > 65535 || blocks.z > 65535) stuck(who, "grid out of range");
  if (cluster > 1 && !limits().has_clusters) stuck(who, "expected a device that runs clusters of blocks");
  if (cluster < 1 || cluster > 8 || blocks.x % static_cast<unsigned>(cluster) != 0) {
    stuck(who, "expected clusters of 1 to 8 blocks that divide the grid, got " + std::to_string(cluster));
  }
  block.shape = threads;
  block.grid = blocks;
  block.kernel = &kernel;
  block.exchanged.resize(static_cast<size_t>(cluster) * block.stride);
  for (auto& given : block.given) given.resize(block.exchanged.size());
  block.failure = nullptr;
  while (block.fibers.size() < block.exchanged.size()) {
    block.fibers.emplace_back();
    prepare(block.fibers.back());
  }
  block.shared.resize(std::max<size_t>(block.shared.size(), cluster));
  const uint64_t total = uint64_t{blocks.x} * blocks.y * blocks.z, clusters = total / static_cast<uint64_t>(cluster);
  Turns turns(clusters);
  for (uint64_t k = 0; k < clusters; ++k) {
    const uint64_t first = turns.next() * static_cast<uint64_t>(cluster);
    for (int r = 0; r < cluster; ++r) {
      const uint64_t b = first + static_cast<uint64_t>(r);
      block.shared[r].assign(shared + 16, 0xff);
      for (int i = 0; i < block.count; ++i) {
        Place& place = block.fibers[r * block.stride + i].place;
        place.block = {static_cast<unsigned>(b % blocks.x), static_cast<unsigned>(b / blocks.x % blocks.y),
                       static_cast<unsigned>(b / blocks.x / blocks.y)};
        place.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
      }
    }
    run_cluster(block, who);
  }
}

std::vector<DeviceKernel>& kernels() {
  static std::vector<DeviceKernel> all;
  return all;
}

}  // namespace infl::emulation

extern "C" __attribute__((visibility("default"))) infl::DeviceLibrary influence_ext_device_library() {
  infl::emulation::order();  // says at once what is wrong with it
  static infl::emulation::HostRuntime runtime;
  static infl::emulation::Recorder recorder;
  return {&runtime, &recorder, infl::emulation::kernels().data(), static_cast<int64_t>(infl::emulation::kernels().size())};
}

// launches, products, copies, and the most bytes of memory since the last call
extern "C" __attribute__((visibility("default"))) void influence_ext_device_traffic(int64_t* counts) {
  auto& traffic = infl::emulation::traffic;
  counts[0] = traffic.launches;
  counts[1] = traffic.products;
  counts[2] = traffic.copies;
  counts[3] = std::exchange(traffic.most_bytes, traffic.bytes);
}
