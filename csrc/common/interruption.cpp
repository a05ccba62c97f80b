#include "common/interruption.h"

#include <ctime>

namespace infl {

namespace {

constexpr long long kInterval = 50;  // milliseconds

#ifdef CLOCK_MONOTONIC_COARSE
constexpr clockid_t kClock = CLOCK_MONOTONIC_COARSE;  // of a few milliseconds, read in a quarter of the time
#else
constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif

long long now() {
  timespec t{};
  clock_gettime(kClock, &t);
  return static_cast<long long>(t.tv_sec) * 1000 + t.tv_nsec / 1'000'000;
}

struct Caller {
  InterruptionCheck check = nullptr;
  long long due = 0;  // when it is asked next; 0: the clock was not looked at yet
};

thread_local Caller caller;

}  // namespace

Interruptible::Interruptible(InterruptionCheck check) : check_before_(caller.check), due_before_(caller.due) { caller = {check, 0}; }

Interruptible::~Interruptible() { caller = {check_before_, due_before_}; }

void interruption_point() {
  if (caller.check == nullptr) return;
  const long long time = now();
  if (caller.due == 0) {
    caller.due = time + kInterval;
  } else if (time >= caller.due) {
    caller.check();
    caller.due = now() + kInterval;
  }
}

}  // namespace infl
