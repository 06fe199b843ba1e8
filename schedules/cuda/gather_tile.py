"""The gather kernel's knobs: their legal values, and what they cost on chip."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvm_balanced.format.layout import BITMAP, PackedFormat


@dataclass(frozen=True)
class Tile:
    """The knobs of the schedule.

    Parameters
    ----------
    vector : int
        Rows of activations in one staged element, read by one shared-memory load.
    groups : int
        Such vectors in a tile.
    warps : int
        Warps of a thread block; each takes a share of K.
    unroll : int
        Vector loads of slots that a lane has in flight.
    chunk : int
        Blocks of the pattern staged at a time.
    splits : int
        Thread blocks that share K; with more than one a second kernel adds their sums.
    """

    vector: int
    groups: int
    warps: int
    unroll: int
    chunk: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Rows of activations in a tile."""
        return self.vector * self.groups


_LANES = 32
WINDOW = 16  # elements staged side by side, at least
_PARTIAL_BYTES = 4  # of a sum in float32
_REUSED = (
    16  # times a buffer's size, up to which TVM's storage rewriting lets it take another's place
)
STAGED_BYTES = 8  # of the widest staged element
_LOAD_BYTES = 16  # of the widest load
MAX_ROWS = 16  # of activations in a tile
MAX_WARPS = 16
MAX_UNROLL = 4
MAX_WHOLE_RUNS = 8  # vectors of slots that are unrolled so that they hold whole blocks
# warps that are always tried; others only where they pad less than one more, as with 1 or 3 loads
_EVEN_WARPS = (2, 4, 8, 12, 16)
# padding of slots that is accepted without looking for fewer
SPARE = 1.07
# and that a tuner may try
_TUNED_SPARE = 1.34
# a tuner may stage K in so many times the fewest chunks
_TUNED_CHUNKS = (1, 2, 4)
# slots of a row, the fewest that a thread block of its own is asked about for
_SPLIT_SLOTS = 1024


@dataclass(frozen=True)
class Knobs:
    """Those of :class:`tvm_balanced.schedules.cuda.gather_tile.Tile`, which see."""

    vector: int
    groups: int
    warps: int
    unroll: int
    chunk: int
    splits: int = 1


def staged_itemsize(dtype: str, rows: int) -> int:
    """Bytes of a staged activation: one or two rows are widened once, not at each of their uses."""
    return 4 if dtype == "float32" or rows <= 2 else 2


def window_blocks(fmt: PackedFormat) -> int:
    """Blocks staged one after the other; after each window of them one element is left out."""
    alone = WINDOW % fmt.pattern.block or fmt.layout.skew > 1
    return 1 if alone else WINDOW // fmt.pattern.block


def staged_at_once(fmt: PackedFormat, dtype: str) -> int:
    """Elements along K that a thread loads at once: 16 bytes, or what K and the window divide by."""
    width = _LOAD_BYTES // _itemsize(dtype)
    return math.gcd(width, fmt.pattern.block * window_blocks(fmt), fmt.in_features)


def stored_at_once(fmt: PackedFormat, dtype: str, vector: int, rows: int) -> int:
    """Staged elements of ``vector`` rows that a thread stores at once: 16 bytes, or what it has loaded."""
    element = vector * staged_itemsize(dtype, rows)
    return math.gcd(staged_at_once(fmt, dtype), max(1, _LOAD_BYTES // element))


def pitch(fmt: PackedFormat, dtype: str, vector: int, rows: int) -> int:
    """Staged elements from one window to the next: some are left out, so that stores meet in few banks."""
    length = fmt.pattern.block * window_blocks(fmt)
    if vector == 1 or fmt.layout.skew > 1:
        return length
    return length + (stored_at_once(fmt, dtype, vector, rows) - length) % WINDOW


def whole_runs(fmt: PackedFormat) -> int:
    """Fewest vectors of slots that begin with a block and end with one; 1 where blocks are larger."""
    vector, nnz = fmt.layout.vector, fmt.pattern.nnz
    runs = nnz // math.gcd(nnz, vector)
    if fmt.encoding == BITMAP:  # is read from its first bit on
        return runs
    return runs if nnz % vector and runs <= MAX_WHOLE_RUNS else 1


def chunk_unit(fmt: PackedFormat) -> int:
    """Fewest blocks whose slots fill whole vectors of values and indices, and whole windows."""
    unit = fmt.index_vector // math.gcd(fmt.index_vector, fmt.pattern.nnz)
    return math.lcm(unit, window_blocks(fmt), fmt.layout.skew)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def estimated_registers(knobs: Knobs) -> int:
    """Registers of a thread, as ptxas was seen to take them for sm_90: within 8 of its own figure."""
    rows = knobs.vector * knobs.groups
    needed = 30 + 5 * min(rows, 8) // 2 + max(0, rows - 8)
    return max(32, 8 * _ceil(needed, 8))


def estimated_shared_bytes(fmt: PackedFormat, dtype: str, knobs: Knobs) -> int:
    """Shared memory of a thread block: what is staged and the partial sums, which may take its place.

    TVM lets them where they fit and it is not larger by a factor of more than 16, or where both are float32.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    dtype : str
        Of the activations.
    knobs : Knobs
        Of the kernel.
    """
    rows = knobs.vector * knobs.groups
    itemsize = staged_itemsize(dtype, rows)
    windows, length = knobs.chunk // window_blocks(fmt), fmt.pattern.block * window_blocks(fmt)
    left_out = windows * (pitch(fmt, dtype, knobs.vector, rows) - length)
    staged = (knobs.chunk * fmt.pattern.block + left_out) * rows * itemsize
    partial = knobs.warps * rows * _LANES * _PARTIAL_BYTES
    fits = partial <= staged <= _REUSED * partial
    grows = itemsize == _PARTIAL_BYTES and staged <= partial <= _REUSED * staged
    return max(staged, partial) if fits or grows else staged + partial


def candidates(
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    shared_bytes: int,
    multiprocessors: int | None = None,
    split: bool = False,
) -> Iterator[Knobs]:
    """Every tile worth asking the model about, a few hundred at most.

    Rows of activations are cut into even tiles of up to 16; what is staged and the partial sums fit
    the shared memory; K is staged at once, in the fewest chunks that fit, or in twice as many; of the
    warps and loads in flight those are left out that add more than a little padding to the work. Thread
    blocks share K, if at all, where that gives work to multiprocessors that have none.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    rows : int
        M.
    dtype : str
        Of the activations.
    shared_bytes : int
        Shared memory that a thread block may take.
    multiprocessors : int, optional
        Lower tiles only where half of them would stand idle with taller ones; all heights when left out.
    split : bool
        Also with several thread blocks for K, as many as ``multiprocessors`` are left.
    """
    unit = chunk_unit(fmt)
    seen: set[tuple[int, int]] = set()
    thread_blocks = 0
    for tile_rows in _row_tiles(rows):
        if seen and multiprocessors is not None and 2 * thread_blocks > multiprocessors:
            return
        for vector in (1, 2, 4):
            groups = _ceil(tile_rows, vector)
            held = vector * groups
            if (vector, groups) in seen or not _is_row_shape(tile_rows, vector, dtype):
                continue
            most = _most_blocks(fmt, dtype, held, shared_bytes)
            if most < unit:
                continue
            seen.add((vector, groups))
            thread_blocks = fmt.padded_rows // _LANES * _ceil(rows, held)
            fewest = _ceil(fmt.blocks, most)
            spare = multiprocessors // thread_blocks if split and multiprocessors else 1
            for (chunk, splits), made_for in _chunks(fmt, unit, fewest, most, spare).items():
                runs = chunk * fmt.pattern.nnz // fmt.layout.vector
                for warps, unroll in _shares(runs, _max_warps(held), whole_runs(fmt)):
                    if made_for is not None and unroll not in made_for:
                        continue
                    knobs = Knobs(vector, groups, warps, unroll, chunk, splits)
                    # with elements left out after windows, what is staged can take a little more
                    if estimated_shared_bytes(fmt, dtype, knobs) <= shared_bytes:
                        yield knobs


def choices(
    fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, multiprocessors: int
) -> dict[str, tuple[int, ...]]:
    """Values of each knob for a tuner, which :func:`is_legal` allows together or not.

    All :func:`candidates` are among them, with and without thread blocks that share K, at every height of
    the tile, and with four times the fewest chunks.

    Parameters
    ----------
    fmt, rows, dtype, shared_bytes
        As for :func:`candidates`.
    multiprocessors : int
        Of the GPU.
    """
    shapes = row_shapes(rows, dtype)
    unit, whole = chunk_unit(fmt), whole_runs(fmt)
    chunks: set[tuple[int, int]] = set()
    for vector, groups in shapes:
        most = _most_blocks(fmt, dtype, vector * groups, shared_bytes)
        if most < unit:
            continue
        thread_blocks = fmt.padded_rows // _LANES * _ceil(rows, vector * groups)
        spare = multiprocessors // thread_blocks
        chunks.update(_chunks(fmt, unit, _ceil(fmt.blocks, most), most, spare, _TUNED_CHUNKS))
    return {
        "vector": tuple(sorted({vector for vector, _ in shapes})),
        "groups": tuple(sorted({groups for _, groups in shapes})),
        "warps": tuple(range(1, MAX_WARPS + 1)),
        "unroll": tuple(whole * units for units in range(1, max(1, MAX_UNROLL // whole) + 1)),
        "chunk": tuple(sorted({chunk for chunk, _ in chunks})),
        "splits": tuple(sorted({splits for _, splits in chunks})),
    }


def is_legal(fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, knobs: Knobs) -> bool:
    """Whether a kernel with these knobs is right, fits the shared memory, and leaves no part idle.

    Parameters
    ----------
    fmt, rows, dtype, shared_bytes
        As for :func:`candidates`.
    knobs : Knobs
        Of the kernel.
    """
    chunk, splits = knobs.chunk, knobs.splits
    held = knobs.vector * knobs.groups
    max_warps = _max_warps(held)
    if (knobs.vector, knobs.groups) not in row_shapes(rows, dtype) or knobs.warps > max_warps:
        return False
    if min(chunk, splits, knobs.unroll) < 1 or chunk % chunk_unit(fmt):
        return False
    if knobs.unroll % whole_runs(fmt) or estimated_shared_bytes(fmt, dtype, knobs) > shared_bytes:
        return False
    parts = _ceil(_ceil(fmt.blocks, chunk), splits)
    if (splits - 1) * parts * chunk >= fmt.blocks:
        return False
    runs = chunk * fmt.pattern.nnz // fmt.layout.vector
    padding = _padding(runs, max_warps, whole_runs(fmt))
    units = knobs.unroll // whole_runs(fmt)
    padded = padding.get((knobs.warps, units), math.inf)
    if padded > max(_TUNED_SPARE, min(padding.values())):
        return False
    return knobs.warps in _EVEN_WARPS or padded < padding[knobs.warps + 1, units]


def _chunks(
    fmt: PackedFormat,
    unit: int,
    fewest: int,
    most_blocks: int,
    spare: int,
    times: tuple[int, ...] = (1, 2),
) -> dict[tuple[int, int], set[int] | None]:
    """Blocks staged at a time, in ``times`` the fewest chunks, and thread blocks that share K.

    Of these there are powers of two up to ``spare``, and ``spare``. Blocks are even shares of K, for any
    loads in flight (None), and the next larger numbers that hold whole units of certain loads in flight: the
    ends of a unit are guarded once for all of its loads.
    """
    most = min(spare, fmt.slots // _SPLIT_SLOTS)
    counts = {1, *(1 << i for i in range(1, max(1, most).bit_length())), max(1, most)}
    vector, all_runs = fmt.layout.vector, fmt.slots // fmt.layout.vector
    whole = {
        unroll: math.lcm(unit, unroll * vector // math.gcd(unroll * vector, fmt.pattern.nnz))
        for unroll in range(2, MAX_UNROLL + 1)
        if all_runs % unroll == 0
    }
    found: dict[tuple[int, int], set[int] | None] = {}
    for splits in sorted(counts):
        for chunks in (count * fewest for count in times):
            share = _ceil(fmt.blocks, _ceil(chunks, splits) * splits)
            even = _ceil(share, unit) * unit
            for unroll, multiple in ((None, unit), *whole.items()):
                chunk = _ceil(share, multiple) * multiple
                # every one of them has work
                parts = _ceil(_ceil(fmt.blocks, chunk), splits)
                if chunk > most_blocks or (splits - 1) * parts * chunk >= fmt.blocks:
                    continue
                if unroll is None:
                    found[chunk, splits] = None
                elif chunk != even:
                    made_for = found.setdefault((chunk, splits), set())
                    if made_for is not None:
                        made_for.add(unroll)
    return found


def _row_tiles(rows: int) -> list[int]:
    """Heights of tiles of activations, tallest first: even shares of M.

    A lower tile executes more instructions for each non-zero and reads the stream again.
    """
    heights = [_ceil(rows, _ceil(rows, MAX_ROWS))]
    while heights[-1] > 1:
        heights.append(_ceil(heights[-1], 2))
    return heights


@functools.lru_cache(maxsize=1024)
def row_shapes(rows: int, dtype: str) -> tuple[tuple[int, int], ...]:
    """Rows of a staged element and such elements of a tile that are worth trying, for every height.

    Parameters
    ----------
    rows : int
        M.
    dtype : str
        Of the activations.
    """
    even = {_ceil(rows, tiles) for tiles in range(1, rows + 1)}
    heights = {h for h in even if h <= MAX_ROWS and _ceil(rows, h) * h <= SPARE * rows}
    shapes = {
        (vector, _ceil(height, vector))
        for height in heights | set(_row_tiles(rows))
        for vector in (1, 2, 4)
        if _is_row_shape(height, vector, dtype)
    }
    return tuple(sorted(shapes))


def _is_row_shape(height: int, vector: int, dtype: str) -> bool:
    """Whether a tile of so many rows may be staged in elements of ``vector`` of them."""
    groups = _ceil(height, vector)
    itemsize = staged_itemsize(dtype, vector * groups)
    if vector * itemsize > STAGED_BYTES or vector >= 2 * height:
        return False
    # a staged element narrower than it could be costs a load a row more
    return vector * groups <= MAX_ROWS and not (groups > 4 and itemsize * vector < STAGED_BYTES)


def _max_warps(held: int) -> int:
    return MAX_WARPS if held <= 8 else MAX_WARPS // 2


def _most_blocks(fmt: PackedFormat, dtype: str, held: int, shared_bytes: int) -> int:
    """Whole units of blocks that can be staged at a time."""
    room = shared_bytes - _max_warps(held) * held * _LANES * _PARTIAL_BYTES
    unit = chunk_unit(fmt)
    return room // (fmt.pattern.block * held * staged_itemsize(dtype, held)) // unit * unit


@functools.lru_cache(maxsize=1024)
def _padding(runs: int, max_warps: int, unit: int) -> dict[tuple[int, int], float]:
    """What warps and loads in flight, ``unit`` at a time, make of ``runs`` vectors of slots, as a factor."""
    return {
        (warps, units): _ceil(runs, warps * units * unit) * warps * units * unit / runs
        for units in range(max(1, MAX_UNROLL // unit), 0, -1)
        for warps in range(max_warps, 0, -1)
    }


@functools.lru_cache(maxsize=1024)
def _shares(runs: int, max_warps: int, unit: int) -> tuple[tuple[int, int], ...]:
    """Warps and loads in flight that share ``runs`` vectors of slots with little padding, most first.

    Loads are in flight ``unit`` at a time.
    """
    padding = _padding(runs, max_warps, unit)
    # shares that leave most lanes without work are the least of evils where there is little work
    least = max(SPARE, min(padding.values()))
    return tuple(
        (warps, units * unit)
        for (warps, units), padded in padding.items()
        if padded <= least
        and (warps in _EVEN_WARPS or padded < padding[warps + 1, units])
        and (units * unit in (2, 4) or padded < padding.get((warps, units + 1), math.inf))
    )
