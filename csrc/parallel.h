// What threads share: memory that is kept between calls, loops, and waiting for each other.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "supcon.h"

namespace supcon {

// Memory that calls hand on to each other: fresh pages cost a small batch as much as its kernels.
class Pool {
 public:
  static Pool& shared() {
    static Pool* const pool = new Pool;  // never destroyed: threads may outlive static destructors
    return *pool;
  }

  void* take(size_t* bytes) {
    // Never waited for: a child that was forked while another thread had the lock would for ever.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return ::operator new(*bytes, kAlignment);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->bytes >= *bytes && (best == free_.end() || block->bytes < best->bytes))
        best = block;
    if (best == free_.end() || best->bytes > 2 * *bytes + kPage)
      return ::operator new(*bytes, kAlignment);
    void* const data = best->data;
    *bytes = best->bytes;
    kept_ -= best->bytes;
    free_.erase(best);
    return data;
  }

  // The oldest blocks make room.
  void give(void* data, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || bytes > kKept) return ::operator delete(data, kAlignment);
    while (kept_ + bytes > kKept || free_.size() == kMaxBlocks) {
      kept_ -= free_.front().bytes;
      ::operator delete(free_.front().data, kAlignment);
      free_.erase(free_.begin());
    }
    free_.push_back({data, bytes});
    kept_ += bytes;
  }

 private:
  Pool() { free_.reserve(kMaxBlocks); }

  struct Block {
    void* data;
    size_t bytes;
  };
  static constexpr std::align_val_t kAlignment{64};
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kKept = 0;  // memory that is used again hides overruns
#else
  static constexpr size_t kKept = size_t{256} << 20;
#endif
  static constexpr size_t kPage = 4096, kMaxBlocks = 64;
  std::mutex mutex_;
  std::vector<Block> free_;
  size_t kept_ = 0;
};

// Uninitialised memory, aligned to cache lines.
template <typename T>
class Array {
 public:
  explicit Array(size_t size)
      : bytes_(size * sizeof(T)), data_(static_cast<T*>(Pool::shared().take(&bytes_))) {}
  ~Array() { Pool::shared().give(data_, bytes_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

// Memory for each thread of a team. It is there before they start: what an allocation throws in the
// middle of the tiles has nowhere to go.
template <typename T>
class PerThread {
 public:
  PerThread(const Team& team, size_t size)
      : size_(size), memory_(std::max(team.threads, 1) * size) {}
  T* claim() { return memory_.get() + next_.fetch_add(1, std::memory_order_relaxed) * size_; }

 private:
  const size_t size_;
  Array<T> memory_;
  std::atomic<size_t> next_{0};
};

// Runs body() on every thread of the team, and throws what one of them threw.
template <typename Body>
void on_all(const Team& team, Body body) {
  struct Shared {
    Body& body;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } shared{body, {false}, nullptr};
  const auto run = [](void* context) {
    Shared& s = *static_cast<Shared*>(context);
    try {
      s.body();
    } catch (...) {
      if (!s.failed.exchange(true)) s.error = std::current_exception();
    }
  };
  team.run(team.threads, run, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

// Runs body(k) for k in [0, count), each on some thread.
template <typename Body>
void parallel_for(const Team& team, int64_t count, Body body) {
  if (count <= 1 || team.threads <= 1) {
    for (int64_t k = 0; k < count; ++k) body(k);
    return;
  }
  std::atomic<int64_t> next{0};
  on_all(team, [&] {
    for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(k);
  });
}

constexpr int64_t kRange = 512;  // rows that a thread takes at a time where a row is little work

// Runs body(begin, end) for ranges of [0, count), which do not depend on the number of threads.
template <typename Body>
void parallel_ranges(const Team& team, int64_t count, int64_t length, Body body) {
  parallel_for(team, (count + length - 1) / length,
               [&](int64_t c) { body(c * length, std::min(count, (c + 1) * length)); });
}

template <typename Real>
void fill(const Team& team, Real* data, int64_t size, Real value) {
  parallel_ranges(team, size, 1 << 17,
                  [=](int64_t begin, int64_t end) { std::fill(data + begin, data + end, value); });
}

// A number that threads wait for, in a cache line of its own.
class alignas(64) Counter {
 public:
  bool is(int64_t count) const { return count_.load(std::memory_order_acquire) == count; }
  void increment() { count_.fetch_add(1, std::memory_order_release); }

 private:
  std::atomic<int64_t> count_{0};
};

// Waits a little longer each time: for what another thread is about to finish, and for one that
// has no processor.
class Patience {
 public:
  void pause() {
    if (++times_ < kSpins) return;
    if (times_ < kYields) return std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }

 private:
  static constexpr int kSpins = 256, kYields = 4096;
  int times_ = 0;
};

}  // namespace supcon
