#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define PAUSE _mm_pause()
#else
#define PAUSE std::this_thread::yield()
#endif

namespace pool {
namespace {

constexpr int SPINS = 2000;
// How long a thread without work looks for more before it sleeps. What Python does between two calls of a step is
// shorter; waking up takes tens of microseconds in a virtual machine, a tenth of a small model's token.
constexpr std::chrono::microseconds PATIENCE(500);

enum State { IDLE, POSTED, RUNNING };

struct Job {
  size_t units = 0, chunk = 1, threads = 1;
  Call call = nullptr;
  const void* work = nullptr;
  std::atomic<size_t> next{0};

  // Large pieces first, of nearly a fair share of what is left: few trips to a line that all threads write and few
  // streams of memory that begin anew; small pieces at the end, so that none waits long for another.
  void drain() {
    size_t begin = next.load(std::memory_order_relaxed);
    while (begin < units) {
      const size_t end = std::min(begin + std::max(chunk, (units - begin) * 7 / (8 * threads)), units);
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      call(work, begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  }
};

class Worker {
 public:
  explicit Worker(Job& job) : job_(job) {
    std::thread([this] { loop(); }).detach();
  }

  void post() {
    state_.store(POSTED);
    if (asleep_.load()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_one();
    }
  }

  // The job is empty: a worker that has not begun need not begin.
  void finish() {
    int expected = POSTED;
    if (state_.compare_exchange_strong(expected, IDLE)) return;
    for (int i = 0; state_.load(std::memory_order_acquire) != IDLE; ++i) {
      if (i < SPINS)
        PAUSE;
      else
        std::this_thread::yield();
    }
  }

 private:
  bool comes_soon() const {
    for (int i = 0; i < SPINS && state_.load(std::memory_order_relaxed) != POSTED; ++i) PAUSE;
    return state_.load() == POSTED;
  }

  void loop() {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + PATIENCE;
      while (!comes_soon() && std::chrono::steady_clock::now() < until) {
        std::this_thread::yield();  // to the caller, where it has no core of its own
      }
      if (state_.load() != POSTED) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.store(true);
        wake_.wait(lock, [&] { return state_.load() == POSTED; });
        asleep_.store(false);
      }
      int expected = POSTED;
      if (!state_.compare_exchange_strong(expected, RUNNING)) continue;
      job_.drain();
      state_.store(IDLE, std::memory_order_release);
    }
  }

  Job& job_;
  std::atomic<int> state_{IDLE};
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Leaked on purpose: its threads may outlive static destructors when the process exits.
struct Pool {
  std::mutex callers;
  Job job;
  std::vector<std::unique_ptr<Worker>> workers;
};

}  // namespace

void run(size_t units, size_t chunk, size_t threads, Call call, const void* work) {
  chunk = std::max<size_t>(chunk, 1);
  threads = std::min(std::max<size_t>(threads, 1), (units + chunk - 1) / chunk);
  if (threads <= 1) {
    if (units) call(work, 0, units);
    return;
  }
  static Pool* pool = new Pool;
  const std::lock_guard<std::mutex> one_caller(pool->callers);
  Job& job = pool->job;
  job.units = units;
  job.chunk = chunk;
  job.threads = threads;
  job.call = call;
  job.work = work;
  job.next.store(0);
  while (pool->workers.size() < threads - 1) pool->workers.push_back(std::make_unique<Worker>(job));
  for (size_t i = 0; i + 1 < threads; ++i) pool->workers[i]->post();
  job.drain();
  for (size_t i = 0; i + 1 < threads; ++i) pool->workers[i]->finish();
}

}  // namespace pool
