// A long call given up by its caller, as Ctrl-C asks: between two pieces of work the thread that entered it asks whether to go on.
#pragma once

namespace infl {

// Throws what the call is to end with, if it is to end.
using InterruptionCheck = void (*)();

// While one lives, interruption_point() in the thread that made it may ask `check` (null: nobody). Other threads never ask: a parallel region ends by
// what its first thread throws.
class Interruptible {
 public:
  explicit Interruptible(InterruptionCheck check);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  InterruptionCheck check_before_;
  long long due_before_;
};

// Between pieces of work: asks the check, 50 ms after the first call of this function and then every 50 ms. Some nanoseconds otherwise.
void interruption_point();

}  // namespace infl
