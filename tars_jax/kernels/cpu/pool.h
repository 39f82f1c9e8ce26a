// Sharing work with whoever has time: the caller claims tasks like everybody else, so a pool that is busy or empty delays nothing.
#pragma once
#if defined(__linux__) || defined(__APPLE__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace tars {

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;                          // the caller included
  virtual void schedule(std::shared_ptr<class Job> job) = 0;  // runs job->work() on another thread, some time
};

inline void pause_or_yield(int round) {
  // A partner that runs finishes within a microsecond; one that lost its core needs ours.
  if (round < 64) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    sched_yield();
  }
}

// Work in stages: the tasks of a stage run in any order and on any thread, when all tasks of the stages before it are done.
class Stages {
 public:
  using Task = std::function<void(int64_t)>;
  // Brings a small piece of what a task will read into the caches; false if there is none. Called, piece by piece, as long as the stage
  // before is not done.
  using Fetch = std::function<bool(int64_t task, int64_t piece)>;
  void add(int64_t tasks, Task run, Fetch fetch = nullptr) {
    if (tasks > 0) stages_.push_back({total(), total() + tasks, std::move(run), std::move(fetch)});
  }
  void reserve(size_t stages) { stages_.reserve(stages); }
  int64_t total() const { return stages_.empty() ? 0 : stages_.back().end; }

 private:
  friend class Job;
  struct Stage {
    int64_t begin, end;
    Task run;
    Fetch fetch;
  };
  std::vector<Stage> stages_;
};

// Tasks of all stages claimed in order from one counter.
class Job {
 public:
  explicit Job(Stages stages) : stages_(std::move(stages.stages_)), tasks_(stages_.empty() ? 0 : stages_.back().end) {}

  // A helper that comes late finds no task and touches nothing of the caller's, which may have returned.
  void work() {
    for (auto stage = stages_.begin();;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      while (task >= stage->end) ++stage;
      if (stage->fetch)
        for (int64_t piece = 0; finished_.load(std::memory_order_acquire) < stage->begin && stage->fetch(task - stage->begin, piece); ++piece) {
        }
      wait_for(stage->begin);
      stage->run(task - stage->begin);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }
  void wait() { wait_for(tasks_); }

 private:
  // Only claimed tasks are waited for, and those run on a thread that never waits for anything later: no deadlock.
  void wait_for(int64_t count) {
    for (int round = 0; finished_.load(std::memory_order_acquire) < count; ++round) pause_or_yield(round);
  }

  const std::vector<Stages::Stage> stages_;
  const int64_t tasks_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
};

// Runs all stages on up to `threads` threads of the pool, which are woken once.
inline void run_stages(Pool& pool, int threads, Stages stages) {
  if (stages.total() == 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, stages.total()));
  auto job = std::make_shared<Job>(std::move(stages));
  for (int i = 1; i < threads; ++i) pool.schedule(job);
  job->work();
  job->wait();
}

// Memory a thread keeps between calls.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) std::abort();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tars
