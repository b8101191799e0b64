// Threads that share one operation's items. They spin for a moment between operations and then sleep: whoever
// else needs the cores gets them.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    stopping_ = true;
    publish();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return 1 + static_cast<int>(workers_.size()); }

  // body(item) for every item below `items`, whichever thread is free; returns when all are done.
  template <class Body>
  void run(int64_t items, const Body& body) {
    std::lock_guard<std::mutex> one_at_a_time(mutex_);
    if (workers_.empty() || items < 2) {
      for (int64_t i = 0; i < items; i++) body(i);
      return;
    }
    context_ = &body;
    call_ = [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); };
    items_ = items;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    publish();
    take();
    for (int left; (left = busy_.load(std::memory_order_acquire)) != 0;) wait_for_change(busy_, left);
  }

 private:
  void publish() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

  void take() {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) call_(context_, item);
  }

  void work() {
    for (int seen = 0;;) {
      wait_for_change(epoch_, seen);
      if (stopping_) return;
      seen++;  // run() ends only after every worker took part, so no epoch is ever missed
      take();
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

  static void wait_for_change(const std::atomic<int>& value, int old) {
    for (int spin = 0; spin < kSpins; spin++) {
      if (value.load(std::memory_order_acquire) != old) return;
      __builtin_ia32_pause();
    }
    value.wait(old, std::memory_order_acquire);
  }

  static constexpr int kSpins = 2000;  // some tens of microseconds

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  int64_t items_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<int> epoch_{0};
  std::atomic<bool> stopping_{false};
};
