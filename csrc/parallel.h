// What threads share: memory that is kept between calls, loops, and the order in which pairs of
// tiles are handed out.

#pragma once

#include <algorithm>
#include <atomic>
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
  static constexpr size_t kKept = size_t{32} << 20;
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

template <typename Real>
void fill(const Team& team, Real* data, int64_t size, Real value) {
  constexpr int64_t kChunk = 1 << 17;
  parallel_for(team, (size + kChunk - 1) / kChunk, [=](int64_t c) {
    std::fill(data + c * kChunk, data + std::min(size, (c + 1) * kChunk), value);
  });
}

// The pairs of tiles as numbered jobs in rounds. Neighbouring tiles form groups, so that a tile
// that is in the cache meets several others. In round r group I meets group (r - I) mod T of the
// same side, or (I + r) mod T of the other: every group is in one job of a round, and after T
// rounds every pair has met once. A job waits until both of its groups are through the earlier
// rounds, so that sums into a tile are made in the order of the rounds, whichever thread makes
// them. Sides of different length meet in a square whose jobs beyond either are empty.
class Schedule {
 public:
  Schedule(int64_t row_tiles, int64_t col_tiles, bool square)
      : row_tiles_(row_tiles),
        col_tiles_(col_tiles),
        row_group_(group_of(row_tiles)),
        col_group_(group_of(col_tiles)),
        size_(std::max((row_tiles + row_group_ - 1) / row_group_,
                       (col_tiles + col_group_ - 1) / col_group_)),
        square_(square) {}

  // Calls body(row tile, column tile, scratch), which must not throw, for every pair, on all
  // threads; each has scratch memory of its own, of the given size.
  template <typename T, typename Body>
  void run(const Team& team, size_t scratch_size, Body body) const {
    std::vector<std::atomic<int64_t>> row_rounds(size_), col_rounds(square_ ? 0 : size_);
    PerThread<T> scratches(team, scratch_size);
    std::atomic<int64_t> next{0};
    const int64_t num_jobs = square_ ? size_ * (size_ + 1) / 2 : size_ * size_;
    const auto work = [&] {
      T* const scratch = scratches.claim();
      for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < num_jobs;) {
        const Job job = square_ ? square_job(k) : rectangle_job(k);
        std::atomic<int64_t>& row_round = row_rounds[job.i];
        std::atomic<int64_t>& col_round = square_ ? row_rounds[job.j] : col_rounds[job.j];
        wait(row_round, job.round);
        wait(col_round, job.round);
        run_job(job, [&](int64_t i, int64_t j) { body(i, j, scratch); });
        row_round.store(job.round + 1, std::memory_order_release);
        col_round.store(job.round + 1, std::memory_order_release);
      }
    };
    if (num_jobs <= 1 || team.threads <= 1)
      work();
    else
      on_all(team, work);
  }

 private:
  struct Job {
    int64_t round, i, j;
  };

  template <typename Body>
  void run_job(const Job& job, Body body) const {
    const int64_t row_end = std::min(row_tiles_, (job.i + 1) * row_group_);
    const int64_t col_begin = job.j * col_group_;
    const int64_t col_end = std::min(col_tiles_, col_begin + col_group_);
    for (int64_t i = job.i * row_group_; i < row_end; ++i)
      for (int64_t j = square_ ? std::max(i, col_begin) : col_begin; j < col_end; ++j) body(i, j);
  }

  // Of a long side only: a short one has few groups as it is.
  static int64_t group_of(int64_t tiles) { return std::min(tiles / kGroups + 1, kMaxGroup); }

  static void wait(const std::atomic<int64_t>& rounds, int64_t round) {
    while (rounds.load(std::memory_order_acquire) < round) std::this_thread::yield();
  }

  // An odd number T of tiles has (T + 1) / 2 jobs in every round, one of them a tile with itself;
  // an even number T / 2 + 1 in even rounds, two of them such, and T / 2 in odd ones.
  Job square_job(int64_t k) const {
    const int64_t even = size_ / 2 + 1, both = size_ + 1;
    const int64_t round = k / both * 2 + (k % both >= even);
    const int64_t q = k % both - (k % both >= even ? even : 0);
    return size_ % 2 == 0 ? meeting(round, q)
                          : meeting(k / ((size_ + 1) / 2), k % ((size_ + 1) / 2));
  }

  Job meeting(int64_t round, int64_t q) const {
    const int64_t a = ((round + 1) / 2 + q) % size_;
    const int64_t b = (round - a + size_) % size_;
    return {round, std::min(a, b), std::max(a, b)};
  }

  Job rectangle_job(int64_t k) const {
    const int64_t round = k / size_, i = k % size_;
    return {round, i, (i + round) % size_};
  }

  static constexpr int64_t kGroups = 24, kMaxGroup = 8;
  const int64_t row_tiles_, col_tiles_;
  const int64_t row_group_, col_group_;  // tiles of a group
  const int64_t size_;                   // groups of the side that has more
  const bool square_;
};

}  // namespace supcon
