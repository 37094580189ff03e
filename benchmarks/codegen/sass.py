"""What a compiled kernel does in its loops: disassembly (SASS) read as loops, Triton's IR as tiles.

The main loop of a pair kernel is an innermost loop that holds both matrix instructions and base-2
exponentials, an inner loop over slices of D belonging to it; where no loop holds both, as in a
kernel with one tile a program, it is the whole kernel. Loops are natural loops of the control flow
graph, so a barrier's spin loop, which the compiler moves behind the kernel's end, is not mistaken
for one. How many pairs one trip works on follows from the matrix instructions: their
multiply-adds over those that the IR asks for a pair, so that unrolling does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

WARP = 32
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
TARGET = re.compile(r"(?:^|[ ,])0x([0-9a-f]+)\s*$")
MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
# To and from a thread's own memory.
SPILL = re.compile(r"LDL|STL")
GLOBAL_LOAD = re.compile(r"LDG|UTMALDG|UBLKCP")
# Atomics on shared memory are not meant: they hand out tensor memory on sm_100.
GLOBAL_ATOMIC = re.compile(r"(ATOM|ATOMG|RED|REDG|UBLKRED|UTMAREDG)(\.|$)")
# Adds to a 32-bit integer, and returns what it was: programs that count themselves.
COUNT = re.compile(r"ATOMG\.E\.ADD\.STRONG\.GPU$")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes; a call too, as ptxas leaves loops by calls that never return."""
        is_jump = self.opcode.startswith(("BRA", "CALL"))
        found = TARGET.search(self.operands) if is_jump else None
        return int(found.group(1), 16) if found else None

    @property
    def falls_through(self) -> bool:
        if self.predicate:
            return True
        if self.opcode.startswith("BRA"):  # a condition may also stand before the target
            return "," in self.operands
        return not self.opcode.startswith(("EXIT", "RET"))

    @property
    def warp_macs(self) -> int:
        """Multiply-adds of a warp's mma.sync, or of its quarter of a warpgroup's wgmma."""
        if found := re.match(r"HMMA\.16(8)(16|8|4)\.", self.opcode):
            return 16 * int(found.group(1)) * int(found.group(2))
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", self.opcode):
            return prod(map(int, found.groups())) // 4
        return 0


@dataclass
class Loop:
    """A natural loop, or the whole kernel; ``body`` is without what belongs to inner loops."""

    body: list[Instruction]
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        yield self
        for loop in self.inner:
            yield from loop.walk()

    def has(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.match(i.opcode) for loop in self.walk() for i in loop.body)


def parse(text: str) -> list[Instruction]:
    """The instructions in ``cuobjdump -sass`` of one kernel."""
    return [
        Instruction(int(address, 16), predicate or "", opcode, operands)
        for address, predicate, opcode, operands in INSTRUCTION.findall(text)
    ]


def loop_nest(instructions: list[Instruction]) -> Loop:
    """The kernel as a tree of natural loops; what cannot be reached (subroutines) is left out."""
    blocks = _basic_blocks(instructions)
    successors = {start: _successors(block, blocks) for start, block in blocks.items()}
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for header in successors[block]:
            if header in dominators[block]:
                loop = _natural_loop(header, block, successors, dominators)
                bodies[header] = bodies.get(header, set()) | loop
    nest = [set(dominators), *sorted(bodies.values(), key=len, reverse=True)]
    loops = [Loop([]) for _ in nest]
    for k, body in enumerate(nest[1:], 1):
        parent = max(j for j in range(k) if body <= nest[j])
        loops[parent].inner.append(loops[k])
    for start in sorted(dominators):
        owner = max(k for k, body in enumerate(nest) if start in body)
        loops[owner].body += blocks[start]
    return loops[0]


def _basic_blocks(instructions: list[Instruction]) -> dict[int, list[Instruction]]:
    starts = {i.target for i in instructions if i.target is not None}
    blocks: dict[int, list[Instruction]] = {}
    start = None
    for instruction in instructions:
        if start is None or instruction.address in starts:
            start = instruction.address
            blocks[start] = []
        blocks[start].append(instruction)
        if instruction.target is not None or not instruction.falls_through:
            start = None
    return blocks


def _successors(block: list[Instruction], blocks: dict[int, list[Instruction]]) -> list[int]:
    last = block[-1]
    following = [last.target] if last.target is not None else []
    after = next((start for start in blocks if start > last.address), None)
    if last.falls_through and after is not None:
        following.append(after)
    return following


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """Of every block that can be reached, the blocks that every way to it passes."""
    entry = next(iter(successors))
    reached, waiting = set(), [entry]
    while waiting:
        if (block := waiting.pop()) not in reached:
            reached.add(block)
            waiting += successors[block]
    dominators = {block: set(reached) for block in reached}
    dominators[entry] = {entry}
    predecessors = _predecessors(successors, reached)
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {entry}):
            new = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _predecessors(successors: dict[int, list[int]], reached: set[int]) -> dict[int, list[int]]:
    return {block: [p for p in reached if block in successors[p]] for block in reached}


def _natural_loop(
    header: int, last: int, successors: dict[int, list[int]], dominators: dict[int, set[int]]
) -> set[int]:
    """The blocks that reach the back edge without passing the header."""
    predecessors = _predecessors(successors, set(dominators))
    loop, waiting = {header}, [last]
    while waiting:
        if (block := waiting.pop()) not in loop:
            loop.add(block)
            waiting += predecessors[block]
    return loop


# --- Triton's IR


@dataclass
class TileLoop:
    """A loop of the IR, or the whole kernel: the products of one trip, and whether it has exponentials."""

    trips: int
    dots: list[Dot] = field(default_factory=list)
    has_exponential: bool = False
    inner: list[TileLoop] = field(default_factory=list)

    def all_dots(self) -> Iterator[tuple[Dot, int]]:
        """Each product under this loop, with how often one trip does it."""
        for loop in self.inner:
            yield from ((dot, loop.trips * times) for dot, times in loop.all_dots())
        yield from ((dot, 1) for dot in self.dots)

    @property
    def tile_pairs(self) -> int:
        """Pairs of one trip: the scores are what its first product makes."""
        first = next(self.all_dots())[0]
        return first.rows * first.cols

    @property
    def macs(self) -> int:
        return sum(times * dot.macs for dot, times in self.all_dots())

    @property
    def tcgen05_instructions(self) -> int:
        return sum(times * dot.tcgen05_instructions for dot, times in self.all_dots())


@dataclass(frozen=True)
class Dot:
    """One ``tt.dot``; float32 in three passes of tf32 counts three times."""

    rows: int
    cols: int
    depth: int
    bits: int
    passes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.depth, self.cols

    @property
    def macs(self) -> int:
        return self.rows * self.cols * self.depth * self.passes

    @property
    def tcgen05_instructions(self) -> int:
        """An instruction takes up to 128 rows, 256 columns and 32 bytes of depth."""
        tiles = -(-self.rows // 128) * -(-self.cols // 256)
        return tiles * (self.depth * self.bits // 256) * self.passes


CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d+) : i32")
CHUNKS = re.compile(r"(%\w+) = arith\.divsi %padded_dim, (%\w+) : i32")
FOR = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
DOT = re.compile(
    r"tt\.dot .*?(?:inputPrecision = (\w+) )?"
    r": tensor<(\d+)x(\d+)x[a-z]+(\d+)> \* tensor<\d+x(\d+)x\w+> ->"
)
EXPONENTIAL = re.compile(r"(math\.exp2? %|ex2\.approx).*tensor<\d+x\d+x")


def tile_loops(ttir: str, padded_dim: int = 0) -> TileLoop:
    """The kernel's loops with their products; a bound that is no constant counts as one trip.

    Args:
        padded_dim: features of a padded row, where the kernel is told them when it is launched.
    """
    constants = {name: int(value) for name, value in CONSTANT.findall(ttir)}
    chunks = {name: padded_dim // constants[size] for name, size in CHUNKS.findall(ttir)}
    constants |= chunks
    root = TileLoop(1)
    regions: list[TileLoop] = []
    for line in ttir.splitlines():
        text = line.strip()
        if text.startswith("}"):
            regions.pop()
        inside = regions[-1] if regions else root
        if found := DOT.search(text):
            precision, rows, depth, bits, cols = found.groups()
            passes = 3 if precision == "tf32x3" and bits == "32" else 1
            inside.dots.append(Dot(int(rows), int(cols), int(depth), int(bits), passes))
        if EXPONENTIAL.search(text):
            inside.has_exponential = True
        if text.endswith("{"):
            if " scf.for " in f" {text}" or "scf.while" in text:
                loop = TileLoop(_trips(text, constants))
                inside.inner.append(loop)
                inside = loop
            regions.append(inside)
    return root


def _trips(text: str, constants: dict[str, int]) -> int:
    found = FOR.search(text)
    names = found.groups() if found else ()
    bounds = [constants[name] for name in names if name in constants]
    if len(bounds) < 3:
        return 1
    low, high, step = bounds
    return -(-(high - low) // step)


LAYOUT = re.compile(
    r"(#mma\d*) = #ttg\.nvidia_mma<\{.*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)"
)
PLACED_DOT = re.compile(
    r"(?:tt\.dot|warp_group_dot) .*?: (?:!ttg\.memdesc|tensor)<(\d+)x(\d+)x.*"
    r"-> tensor<\d+x(\d+)xf32, (#mma\d*)>"
)


def copies_of_products(ttgir: str) -> dict[tuple[int, int, int], int]:
    """How many warps do the same work, by shape of the product: more warps than the tile has rows for."""
    layouts = {name: tuple(map(int, numbers)) for name, *numbers in LAYOUT.findall(ttgir)}
    copies: dict[tuple[int, int, int], int] = {}
    for rows, depth, cols, layout in PLACED_DOT.findall(ttgir):
        shape = (int(rows), int(depth), int(cols))
        row_warps, col_warps, row_step, col_step = layouts[layout]
        reached = max(row_warps * row_step, shape[0]) * max(col_warps * col_step, shape[2])
        found = reached // (shape[0] * shape[2])
        if copies.setdefault(shape, found) != found:
            raise ValueError(
                f"products of shape {shape} in layouts of {copies[shape]} and {found} copies"
            )
    return copies


# --- both together


@dataclass(frozen=True)
class PairCost:
    """What one pair costs a thread in a main loop, matrix instructions aside.

    ``in_flight`` is the share of the exponentials that stand between the issue of a product and its
    wait; None where products are not asynchronous, or wait elsewhere.
    """

    macs: float
    instructions: float
    ex2: float
    rcp: float
    compares: float
    spills: float
    pairs_per_trip: float
    global_loads_per_trip: float
    in_flight: float | None


def main_loops(
    instructions: list[Instruction], ttir: str, ttgir: str, num_warps: int, padded_dim: int = 0
) -> list[PairCost]:
    """The cost of a pair in each main loop, cheapest first: peeled tiles come after it."""
    tiles = _main_tile_loops(tile_loops(ttir, padded_dim))
    loops = _main_sass_loops(loop_nest(instructions))
    if not tiles or not loops:
        return []
    # Loops that the compiler merged or copied are matched by what they do, if that is one thing.
    if len(tiles) != len(loops):
        kinds = {(t.tile_pairs, t.macs) for t in tiles}
        if len(kinds) != 1:
            raise ValueError(f"{len(loops)} loops for {len(tiles)} of different kinds in the IR")
        tiles = [tiles[0]] * len(loops)
    copies = copies_of_products(ttgir)
    costs = [_pair_cost(loop, tile, copies, num_warps) for loop, tile in zip(loops, tiles)]
    return sorted(costs, key=lambda cost: cost.instructions)


def _main_tile_loops(loop: TileLoop) -> list[TileLoop]:
    deeper = [main for inner in loop.inner for main in _main_tile_loops(inner)]
    if deeper:
        return deeper
    everything = [loop, *loop.inner]
    is_main = any(x.has_exponential for x in everything) and any(True for _ in loop.all_dots())
    return [loop] if is_main else []


def _main_sass_loops(loop: Loop) -> list[Loop]:
    deeper = [main for inner in loop.inner for main in _main_sass_loops(inner)]
    if deeper:
        return sorted(deeper, key=lambda x: x.body[0].address)
    return [loop] if loop.has(MATRIX) and loop.has(re.compile(r"MUFU\.EX2")) else []


def _pair_cost(
    loop: Loop, tile: TileLoop, copies: dict[tuple[int, int, int], int], num_warps: int
) -> PairCost:
    is_tcgen05 = any(i.opcode.startswith("UTC") and MATRIX.match(i.opcode) for i in _all(loop))
    if is_tcgen05:  # its shape is not in the mnemonic, and one warp issues for all
        asked = tile.tcgen05_instructions
    else:
        done = (times * dot.macs * copies.get(dot.shape, 1) for dot, times in tile.all_dots())
        asked = sum(done) // num_warps

    def work(instructions: list[Instruction]) -> int:
        matrix = (i for i in instructions if MATRIX.match(i.opcode))
        return sum(1 if is_tcgen05 else i.warp_macs for i in matrix)

    slices = [inner for inner in loop.inner if inner.has(MATRIX)]
    if slices:
        tiles_per_trip = 1.0
        trips = (asked - work(loop.body)) / sum(work(inner.body) for inner in slices)
    else:
        tiles_per_trip, trips = work(loop.body) / asked, 1.0
    if abs(tiles_per_trip - round(tiles_per_trip)) > 0.01 or abs(trips - round(trips)) > 0.01:
        raise ValueError(f"matrix work of {tiles_per_trip:g} tiles, {trips:g} slices a trip")

    def count(wanted: Callable[[Instruction], object]) -> float:
        inner = sum(1 for x in slices for i in x.body if wanted(i))
        others = (x for x in loop.inner if x not in slices)
        return sum(1 for x in (loop, *others) for i in x.body if wanted(i)) + trips * inner

    pairs = tiles_per_trip * tile.tile_pairs
    each = WARP * num_warps / pairs
    return PairCost(
        macs=tile.macs / tile.tile_pairs,
        instructions=each * count(lambda i: not MATRIX.match(i.opcode)),
        ex2=each * count(lambda i: i.opcode.startswith("MUFU.EX2")),
        rcp=each * count(lambda i: i.opcode.startswith("MUFU.RCP")),
        compares=each * count(lambda i: re.match(r"[IF]SETP", i.opcode)),
        spills=each * count(lambda i: SPILL.match(i.opcode)),
        pairs_per_trip=pairs,
        global_loads_per_trip=count(
            lambda i: GLOBAL_LOAD.match(i.opcode) and "DEPBAR" not in i.opcode
        ),
        in_flight=share_in_flight(loop.body),
    )


def share_in_flight(body: list[Instruction]) -> float | None:
    """The share of a loop's exponentials that are issued while a warpgroup's products run."""
    if not any(i.opcode.startswith("HGMMA") for i in body):
        return None
    running, beside, total = False, 0, 0
    for trip in range(2):  # the first ends as the second begins
        for i in body:
            if i.opcode.startswith("HGMMA"):
                running = True
            elif i.opcode.startswith("WARPGROUP.DEPBAR"):
                running = not i.operands.rstrip().endswith(" 0x0")
            elif trip and i.opcode.startswith("MUFU.EX2"):
                total += 1
                beside += running
    return beside / total if total else None


def _all(loop: Loop) -> Iterator[Instruction]:
    for each in loop.walk():
        yield from each.body
