"""Who does which share of the pairs: pure functions of numbers of tiles."""

from __future__ import annotations

import dataclasses
import functools

from supcon_kernels.triton_tiles import Tile, cdiv

# Tiles of pairs below which a program costs more than it brings.
MIN_SHARE = 4
# Pieces of a block, each written and read again, and how much longer than ideal that may take.
MAX_PIECES, MAX_SLOWDOWN = 4, 1.15
# How much longer than ideal whole blocks may take: all programs then read the same columns at a time.
WHOLE_SLOWDOWN = 1.05


@dataclasses.dataclass(frozen=True)
class Shares:
    """All pairs, as tiles in the order of row blocks, cut into equal runs, one for each program.

    A run goes on from one block of rows to the next of its group, so that every program has as
    much to do as any other. What several programs do of one block are its pieces, which are added
    in order. The runs of a group begin with its first block: a small group has few pieces.

    Attributes:
        num_blocks: of rows.
        num_tiles: of columns, in each block.
        group: blocks that are cut together.
        share: tiles of a program, fewer in the last of a group.
    """

    num_blocks: int
    num_tiles: int
    group: int
    share: int

    @staticmethod
    def of(num_rows: int, num_cols: int, tile: Tile, num_slots: int) -> Shares:
        """Whole blocks where these take little longer, else the fastest in ``MAX_PIECES``, or in more.

        Args:
            num_rows, num_cols: padded.
            tile: of the kernel.
            num_slots: programs that run at a time.
        """
        num_blocks, num_tiles = num_rows // tile.rows, num_cols // tile.cols

        def cut(group: int, most_runs: int) -> Shares:
            runs = min(max(num_slots * group // num_blocks, 1), most_runs)
            share = max(cdiv(group * num_tiles, runs), MIN_SHARE)
            return Shares(num_blocks, num_tiles, group, share)

        rounds = cdiv(num_blocks, num_slots)
        whole = Shares(num_blocks, num_tiles, num_blocks, rounds * num_tiles)
        if whole.slowdown(num_slots) <= WHOLE_SLOWDOWN:
            return whole
        # With 3 + 1/g runs a block, a group of g blocks has no block of more than four pieces.
        groups = {min(group, num_blocks) for group in (num_blocks, 1, 2, 3)}
        few = [cut(group, (MAX_PIECES - 1) * group + 1) for group in groups]
        best = min(few, key=lambda shares: (shares.slowdown(num_slots), shares.max_pieces))
        return best if best.slowdown(num_slots) <= MAX_SLOWDOWN else cut(num_blocks, num_slots)

    @staticmethod
    def of_pieces(num_pieces: int) -> Shares:
        """Those of blocks that are each in so many pieces."""
        return Shares(num_blocks=1, num_tiles=num_pieces, group=1, share=1)

    def in_tiles(self, times: int) -> Shares:
        """The same shares, in so many times as many tiles."""
        tiles, share = self.num_tiles * times, self.share * times
        return dataclasses.replace(self, num_tiles=tiles, share=share)

    @functools.cached_property
    def arguments(self) -> dict[str, int]:
        """What the kernels take of them."""
        return {
            "num_blocks": self.num_blocks,
            "num_tiles": self.num_tiles,
            "group": self.group,
            "share": self.share,
            "max_pieces": self.max_pieces,
        }

    @property
    def num_programs(self) -> int:
        """One for each share."""
        groups, rest = divmod(self.num_blocks, self.group)
        runs = cdiv(self.group * self.num_tiles, self.share)
        return groups * runs + cdiv(rest * self.num_tiles, self.share)

    @property
    def num_col_slots(self) -> int:
        """For sums of columns: a program has one of its own, or each block has."""
        return min(self.num_blocks, self.num_programs)

    def pieces_of(self, block: int) -> int:
        """Of one block, as the kernels count them."""
        before = block % self.group * self.num_tiles
        return (before + self.num_tiles - 1) // self.share - before // self.share + 1

    @functools.cached_property
    def max_pieces(self) -> int:
        """Of any block; after ``share`` blocks they are cut in the same places again."""
        return max(map(self.pieces_of, range(min(self.group, self.num_blocks, self.share))))

    def slowdown(self, num_slots: int, piece_tiles: float = 0.0) -> float:
        """Modelled time over that of all slots at work all the time and nothing written.

        Args:
            num_slots: programs that run at a time.
            piece_tiles: what writing a piece takes, in tiles; it goes on beside the products.
        """
        ideal = self.num_blocks * self.num_tiles / num_slots
        products = cdiv(self.num_programs, num_slots) * self.share
        num_pieces = sum(map(self.pieces_of, range(self.num_blocks))) if piece_tiles else 0
        return max(products, num_pieces / num_slots * piece_tiles) / ideal
