// Long calls of the core leave Python's other threads running, and Ctrl-C its effect.
#pragma once

#include <pthread.h>
#include <torch/extension.h>

#include "common/interruption.h"

namespace infl {

namespace py = pybind11;

// The thread that Python runs signal handlers in; in a forked process the one that forked.
inline pthread_t main_thread;

inline void note_main_thread() {
  const auto ident = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  main_thread = (pthread_t)ident;
  pthread_atfork(nullptr, nullptr, [] { main_thread = pthread_self(); });
}

// Handlers of signals that arrived run here, as between two lines of Python; what they raise ends the call.
inline void run_signal_handlers() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// The interpreter left to other threads for the length of a block, which the main thread's signals may end.
class Released {
 public:
  Released() : interruptible_(pthread_equal(pthread_self(), main_thread) ? &run_signal_handlers : nullptr) {}

 private:
  Interruptible interruptible_;
  py::gil_scoped_release release_;
};

}  // namespace infl
