// What was enqueued on a device once, to be enqueued again by one call. The core knows nothing of it: the bindings record what it enqueues.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace infl {

// Launches in their order, with the arguments they were given: pointers have to mean the same memory at a replay.
class LaunchGraph {
 public:
  virtual ~LaunchGraph() = default;

  // Enqueues all of it; on the stream that it was recorded for, where replays follow one another.
  virtual void replay(void* stream) = 0;
  virtual int64_t num_launches() const = 0;
};

class LaunchRecorder {
 public:
  virtual ~LaunchRecorder() = default;

  // Whether what is enqueued on the stream is being recorded, by this or by anyone else.
  virtual bool is_recording(void* stream) = 0;

  // What `body` enqueues on the stream that is current inside it; none of it runs. Memory that is allocated inside belongs to the graph. Throws what
  // body throws, and std::runtime_error where something was tried that cannot be recorded: copies from or to the host, waiting.
  virtual std::unique_ptr<LaunchGraph> record(void* stream, const std::function<void()>& body) = 0;
};

}  // namespace infl
