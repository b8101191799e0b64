// Threads that share one operation's items. They spin for a moment between operations and then sleep: whoever
// else needs the cores gets them. Nobody waits for a thread that has no item in hand, so one that is kept from
// its core costs no more than the work it could have taken.
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
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(items) << 32, std::memory_order_release);
    publish();
    take();
    for (int done; (done = done_.load(std::memory_order_acquire)) != items;) wait_for_change(done_, done);
  }

 private:
  void publish() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

  // Items until there are no more. A ticket is the number of items above, the next item below: whoever draws one
  // in time keeps the operation open until it is done, and whoever comes late touches nothing else.
  void take() {
    for (;;) {
      uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
      int items = static_cast<int>(ticket >> 32), item = static_cast<int>(ticket & 0xffffffffu);
      if (item >= items) return;
      call_(context_, item);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == items) done_.notify_one();
    }
  }

  void work() {
    for (int seen = 0;;) {
      wait_for_change(epoch_, seen);
      if (stopping_) return;
      seen = epoch_.load(std::memory_order_acquire);
      take();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  static void wait_for_change(const std::atomic<int>& value, int old) {
    for (int spin = 0; spin < kSpins; spin++) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
    value.wait(old, std::memory_order_acquire);
  }

  static constexpr int kSpins = 2000;  // some tens of microseconds

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> done_{0};
  std::atomic<int> epoch_{0};
  std::atomic<bool> stopping_{false};
};
