// The order in which pairs of tiles are computed, and what they give is added up.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "supcon.h"

namespace supcon {

// Any thread computes a pair of tiles at any time; what the pair gives to a tile is added in its
// turn. Turns are numbered without a look at the threads, so that sums have the same bits from any
// number of them, and a tile is held for the time of an addition alone.
//
// Neighbouring tiles form groups of g, which meet in rounds. Where the sides are one, group I of G
// meets group (r - I) mod G in round r: every group is in one meeting of a round, and after G
// rounds every pair has met once. Else group S of the shorter side meets group (S + r) mod L of the
// longer one. A meeting has g steps: in step s, tile d of one group meets tile (s - d) mod g of the
// other. So a tile has one turn in every step. Few threads take whole meetings, whose tiles stay in
// the cache; many take single pairs, of which a step has one for every tile.
//
// Of a short side there may be copies to add to, which rounds take by turns: few tiles would keep
// many threads waiting.
class Schedule {
 public:
  Schedule(int64_t row_tiles, int64_t col_tiles, bool square)
      : square_(square),
        rows_are_shorter_(row_tiles <= col_tiles),
        group_(std::min(std::min(row_tiles, col_tiles) / kGroups + 1, kMaxGroup)),
        shorter_(std::min(row_tiles, col_tiles), group_),
        longer_(std::max(row_tiles, col_tiles), group_) {}

  // Copies of what is added to each side, with no more rows in all than the longer side has.
  int64_t copies_of_rows() const { return rows_are_shorter_ ? copies() : 1; }
  int64_t copies_of_cols() const { return rows_are_shorter_ ? 1 : copies(); }

  // Calls for every pair of tiles I and J, on all threads,
  //   worker.compute(I, J), then in the tiles' turns
  //   worker.add_to_rows(copy) and, if there is anything to add, worker.add_to_cols(copy)
  // none of which may throw. Each thread has a worker of its own, made by make_worker().
  template <typename MakeWorker>
  void run(const Team& team, bool with_copies, bool to_cols, MakeWorker make_worker) const {
    Turns turns(*this, with_copies ? copies() : 1, to_cols);
    const int64_t meetings = longer_.groups * shorter_.groups;
    const bool by_meeting = 2 * team.threads <= longer_.groups;
    const int64_t num_jobs = by_meeting ? meetings : meetings * group_ * group_;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      auto worker = make_worker();
      for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < num_jobs;) {
        if (!by_meeting) {
          const int64_t steps = k / (group_ * shorter_.groups);
          visit(worker, turns, steps / group_, k / group_ % shorter_.groups, steps % group_,
                k % group_);
          continue;
        }
        for (int64_t step = 0; step < group_; ++step)
          for (int64_t d = 0; d < group_; ++d)
            visit(worker, turns, k / shorter_.groups, k % shorter_.groups, step, d);
      }
    };
    if (meetings <= 1 || team.threads <= 1)
      work();
    else
      on_all(team, work);
  }

 private:
  struct Tiles {
    Tiles(int64_t tiles, int64_t group) : tiles(tiles), groups((tiles + group - 1) / group) {}

    const int64_t tiles, groups;
  };

  // Of every tile, and copy, how often it was added to.
  struct Turns {
    Turns(const Schedule& schedule, int64_t num_copies, bool to_cols)
        : num_copies(num_copies),
          to_cols(to_cols),
          of_shorter(schedule.shorter_.tiles * num_copies),
          of_longer(schedule.square_ ? 0 : schedule.longer_.tiles) {}

    const int64_t num_copies;
    const bool to_cols;
    std::vector<Counter> of_shorter, of_longer;
  };

  // What a pair adds to one of its tiles: where, in which turn.
  struct Addition {
    Counter* counter;  // null: there is no such tile, or nothing to add
    int64_t turn, copy;
  };

  // Tile d of a group of the shorter side and the tile that it meets in a step of a round.
  template <typename Worker>
  void visit(Worker& worker, Turns& turns, int64_t round, int64_t first, int64_t step,
             int64_t d) const {
    const int64_t second =
        (square_ ? round - first + longer_.groups : first + round) % longer_.groups;
    const int64_t a = first * group_ + d, b = second * group_ + (step - d + group_) % group_;
    if (square_ && a > b) return;
    const bool a_is_there = a < shorter_.tiles, b_is_there = b < longer_.tiles;
    const int64_t copy = round % turns.num_copies;
    Addition of_a = {nullptr, round / turns.num_copies * group_ + step, copy}, of_b = of_a;
    if (a_is_there) of_a.counter = &turns.of_shorter[copy * shorter_.tiles + a];
    if (square_) {
      if (b_is_there) of_b.counter = &turns.of_shorter[b];
    } else {
      of_b = {nullptr, earlier(first, second) * group_ + step, 0};
      if (b_is_there) of_b.counter = &turns.of_longer[b];
    }
    Addition& rows = rows_are_shorter_ ? of_a : of_b;
    Addition& cols = rows_are_shorter_ ? of_b : of_a;
    if (!turns.to_cols) cols.counter = nullptr;
    if (a_is_there && b_is_there) {
      worker.compute(rows_are_shorter_ ? a : b, rows_are_shorter_ ? b : a);
      add(worker, rows, cols);
    } else {
      struct Nothing {
        void add_to_rows(int64_t) {}
        void add_to_cols(int64_t) {}
      } nothing;
      add(nothing, rows, cols);
    }
  }

  // How many groups of the shorter side a group of the longer one has met before this one.
  int64_t earlier(int64_t shorter, int64_t longer) const {
    if (shorter <= longer) return std::min(longer, shorter_.groups - 1) - shorter;
    return longer + shorter_.groups - shorter;
  }

  // Adds to the two tiles, whichever's turn comes first.
  template <typename Worker>
  void add(Worker& worker, const Addition& rows, const Addition& cols) const {
    const bool is_one = rows.counter == cols.counter;  // a tile that meets itself
    bool rows_wait = rows.counter != nullptr, cols_wait = cols.counter != nullptr && !is_one;
    for (Patience patience; rows_wait || cols_wait;) {
      if (rows_wait && rows.counter->is(rows.turn)) {
        worker.add_to_rows(rows.copy);
        if (is_one) worker.add_to_cols(cols.copy);
        rows.counter->increment();
        rows_wait = false;
      } else if (cols_wait && cols.counter->is(cols.turn)) {
        worker.add_to_cols(cols.copy);
        cols.counter->increment();
        cols_wait = false;
      } else {
        patience.pause();
      }
    }
  }

  int64_t copies() const {
    if (square_ || shorter_.tiles == 0) return 1;
    const int64_t wanted = std::min(kHeld / shorter_.tiles, longer_.tiles / shorter_.tiles);
    return std::clamp<int64_t>(wanted, 1, kMaxCopies);
  }

  // Of a long side only: a short one has few groups as it is.
  static constexpr int64_t kGroups = 24, kMaxGroup = 8;
  // Tiles that are enough for many threads to add to at a time, and copies that are not too many to
  // add up in the end.
  static constexpr int64_t kHeld = 48, kMaxCopies = 8;
  const bool square_, rows_are_shorter_;
  const int64_t group_;  // tiles of a group
  const Tiles shorter_, longer_;
};

}  // namespace supcon
