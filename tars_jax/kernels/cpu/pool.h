// Sharing work with whoever has time: the caller claims tasks like everybody else, so a pool that is busy or empty delays nothing.
#pragma once
#if defined(__linux__) || defined(__APPLE__)
#include <sched.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

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

// Where the stages of a job after the first begin: their tasks start when all before them are done.
struct Barriers {
  static constexpr int kMost = 8;
  int64_t at[kMost];
  int count = 0;
  void add(int64_t task) { at[count++] = task; }
};

// Tasks 0..tasks-1 claimed in order from one counter.
class Job {
 public:
  using Run = void (*)(void* context, int64_t task);
  Job(Run run, void* context, int64_t tasks, const Barriers& barriers) : run_(run), context_(context), tasks_(tasks), barriers_(barriers) {}

  // A helper that comes late finds no task and touches nothing of the caller's, which may have returned.
  void work() {
    for (int stage = 0;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      for (; stage < barriers_.count && task >= barriers_.at[stage]; ++stage) wait_for(barriers_.at[stage]);
      run_(context_, task);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }
  void wait() { wait_for(tasks_); }

 private:
  // Only claimed tasks are waited for, and those run on a thread that never waits for anything later: no deadlock.
  void wait_for(int64_t count) {
    for (int round = 0; finished_.load(std::memory_order_acquire) < count; ++round) pause_or_yield(round);
  }

  const Run run_;
  void* const context_;
  const int64_t tasks_;
  const Barriers barriers_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
};

// Runs function(task) for every task, on up to `threads` threads of the pool.
template <class F>
void parallel(Pool& pool, int threads, int64_t tasks, const Barriers& barriers, F&& function) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) function(i);
    return;
  }
  auto run = [](void* context, int64_t task) { (*static_cast<std::remove_reference_t<F>*>(context))(task); };
  auto job = std::make_shared<Job>(run, &function, tasks, barriers);
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
