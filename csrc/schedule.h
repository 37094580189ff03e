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
// number of them, and a tile is held for the time of an addition alone, or of what it begins with.
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
  int64_t copies() const {
    if (square_ || shorter_.tiles == 0) return 1;
    const int64_t wanted = std::min(kHeld / shorter_.tiles, longer_.tiles / shorter_.tiles);
    return std::clamp<int64_t>(wanted, 1, kMaxCopies);
  }

  // What a pair adds to one of its tiles: where, and in which turn.
  struct Addition {
    int64_t counter;  // of the tile, or of a copy of it; -1: there is no such tile
    int64_t turn, copy;
  };
  struct Pair {
    int64_t row, col;  // tiles
    Addition to_row, to_col;

    bool is_whole() const { return to_row.counter >= 0 && to_col.counter >= 0; }
  };

  // Calls visit(pair) for the pairs of every job, in order, where many threads or few take them.
  // Pairs with a tile beyond the end are among them: the other has its turn all the same.
  int64_t num_jobs(int threads) const {
    return longer_.groups * shorter_.groups * (takes_meetings(threads) ? 1 : group_ * group_);
  }
  template <typename Visit>
  void job(int64_t k, int threads, int64_t num_copies, Visit visit) const {
    const auto at = [&](int64_t round, int64_t first, int64_t step, int64_t d) {
      const Pair pair = pair_of(round, first, step, d, num_copies);
      if (pair.to_row.counter >= 0 || pair.to_col.counter >= 0) visit(pair);
    };
    const int64_t num_first = shorter_.groups;
    if (!takes_meetings(threads)) {
      const int64_t steps = k / (group_ * num_first);
      return at(steps / group_, k / group_ % num_first, steps % group_, k % group_);
    }
    for (int64_t step = 0; step < group_; ++step)
      for (int64_t d = 0; d < group_; ++d) at(k / num_first, k % num_first, step, d);
  }

  // Calls for every pair of tiles I and J, on all threads,
  //   worker.compute(I, J), then in the tiles' turns
  //   worker.add_to_rows(copy) and, if there is anything to add, worker.add_to_cols(copy)
  // and before anything is added to a tile, worker.begin_rows(I, copy) or worker.begin_cols(J,
  // copy), none of which may throw. Each thread has a worker of its own, made by make_worker().
  template <typename MakeWorker>
  void run(const Team& team, bool with_copies, bool to_cols, MakeWorker make_worker) const {
    const int64_t num_copies = with_copies ? copies() : 1, num_jobs = this->num_jobs(team.threads);
    std::vector<Counter> counters(shorter_.tiles * num_copies + (square_ ? 0 : longer_.tiles));
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      auto worker = make_worker();
      for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < num_jobs;)
        job(k, team.threads, num_copies, [&](const Pair& pair) {
          if (pair.is_whole()) worker.compute(pair.row, pair.col);
          add(worker, pair, to_cols, counters.data());
        });
    };
    if (num_jobs <= 1 || team.threads <= 1)
      work();
    else
      on_all(team, work);
  }

 private:
  struct Tiles {
    Tiles(int64_t tiles, int64_t group) : tiles(tiles), groups((tiles + group - 1) / group) {}

    const int64_t tiles, groups;
  };

  // Few threads take whole meetings, many take pairs.
  bool takes_meetings(int threads) const { return 2 * threads <= longer_.groups; }

  // Tile d of a group of the shorter side and the tile that it meets in a step of a round. No
  // counters: the pair comes up from its other tile.
  Pair pair_of(int64_t round, int64_t first, int64_t step, int64_t d, int64_t num_copies) const {
    const int64_t second =
        (square_ ? round - first + longer_.groups : first + round) % longer_.groups;
    const int64_t a = first * group_ + d, b = second * group_ + (step - d + group_) % group_;
    const int64_t copy = round % num_copies;
    Addition to_a = {-1, round / num_copies * group_ + step, copy}, to_b = to_a;
    if (!square_) to_b = {-1, earlier(first, second) * group_ + step, 0};
    if (!square_ || a <= b) {
      if (a < shorter_.tiles) to_a.counter = copy * shorter_.tiles + a;
      if (b < longer_.tiles) to_b.counter = square_ ? b : num_copies * shorter_.tiles + b;
    }
    return rows_are_shorter_ ? Pair{a, b, to_a, to_b} : Pair{b, a, to_b, to_a};
  }

  // How many groups of the shorter side a group of the longer one has met before this one.
  int64_t earlier(int64_t shorter, int64_t longer) const {
    if (shorter <= longer) return std::min(longer, shorter_.groups - 1) - shorter;
    return longer + shorter_.groups - shorter;
  }

  // Adds what a pair gives to its tiles, if it has both, to whichever's turn comes first.
  template <typename Worker>
  void add(Worker& worker, const Pair& pair, bool to_cols, Counter* counters) const {
    const Addition &rows = pair.to_row, &cols = pair.to_col;
    const bool is_one = rows.counter == cols.counter;  // a tile that meets itself
    bool rows_wait = rows.counter >= 0, cols_wait = to_cols && cols.counter >= 0 && !is_one;
    for (Patience patience; rows_wait || cols_wait;) {
      if (rows_wait && counters[rows.counter].is(rows.turn)) {
        if (rows.turn == 0) worker.begin_rows(pair.row, rows.copy);
        if (pair.is_whole()) worker.add_to_rows(rows.copy);
        if (is_one && to_cols) worker.add_to_cols(cols.copy);
        counters[rows.counter].increment();
        rows_wait = false;
      } else if (cols_wait && counters[cols.counter].is(cols.turn)) {
        if (cols.turn == 0) worker.begin_cols(pair.col, cols.copy);
        if (pair.is_whole()) worker.add_to_cols(cols.copy);
        counters[cols.counter].increment();
        cols_wait = false;
      } else {
        patience.pause();
      }
    }
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
