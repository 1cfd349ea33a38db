#include "pool.h"

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Pool {
 public:
  // Leaked on purpose: its threads may outlive static destructors when the process exits.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void run(size_t count, size_t grain, size_t threads, const std::function<void(size_t, size_t)>& work) {
    const std::lock_guard<std::mutex> one_caller(callers_);
    const size_t grains = (count + grain - 1) / grain;
    threads = std::min(std::max<size_t>(threads, 1), std::max<size_t>(grains, 1));
    const size_t share = (grains + threads - 1) / threads * grain;
    const auto part = [&](size_t i) { work(std::min(i * share, count), std::min((i + 1) * share, count)); };
    if (threads == 1) return part(0);
    while (workers_.size() < threads - 1) start(workers_.size() + 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      part_ = part;
      active_ = threads;
      left_ = threads - 1;
      ++round_;
    }
    begin_.notify_all();
    part(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  void start(size_t index) {
    workers_.emplace_back([this, index, seen = round_]() mutable {
      for (;;) {
        std::unique_lock<std::mutex> lock(mutex_);
        begin_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (index >= active_) continue;
        lock.unlock();
        part_(index);
        lock.lock();
        if (--left_ == 0) done_.notify_one();
      }
    });
    workers_.back().detach();
  }

  std::mutex callers_, mutex_;
  std::condition_variable begin_, done_;
  std::function<void(size_t)> part_;
  size_t active_ = 0, left_ = 0, round_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace

void parallel_for(size_t count, size_t grain, size_t threads, const std::function<void(size_t, size_t)>& work) {
  Pool::get().run(count, grain, threads, work);
}
