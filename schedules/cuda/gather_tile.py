"""The gather kernel's knobs: their legal values, and what they cost on chip."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvm_balanced.format.layout import BITMAP, PackedFormat, ceil_div


@dataclass(frozen=True)
class GatherTile:
    """The knobs of the gather kernel."""

    vector: int  # rows of activations in one staged element, read by one shared-memory load
    groups: int  # such vectors in a tile
    warps: int  # warps of a thread block; each takes a share of K
    unroll: int  # vector loads of slots that a lane has in flight
    chunk: int  # blocks of the pattern staged at a time
    # thread blocks that share K; with more than one a second kernel adds their sums
    splits: int = 1

    @property
    def rows(self) -> int:
        """Rows of activations in a tile."""
        return self.vector * self.groups


LANES = 32
LOAD_BYTES = 16  # of the widest load
WINDOW = 16  # elements staged side by side, at least
PARTIAL_BYTES = 4  # of a sum in float32
MAX_UNROLL = 4
MAX_WHOLE_RUNS = 8  # vectors of slots that are unrolled so that they hold whole blocks
_STAGED_BYTES = 8  # of the widest staged element
_MAX_ROWS = 16  # of activations in a tile
_MAX_WARPS = 16
# times a buffer's size, up to which TVM's storage rewriting lets it take another's place
_REUSED = 16
# warps that are always tried; others only where they pad less than one more, as with 1 or 3 loads
_EVEN_WARPS = (2, 4, 8, 12, 16)
# padding of slots that is accepted without looking for fewer, and that a tuner may try
_SPARE, _TUNED_SPARE = 1.07, 1.34
# a tuner may stage K in so many times the fewest chunks
_TUNED_CHUNKS = (1, 2, 4)
# slots of a row, the fewest that a thread block of its own is asked about for
_SPLIT_SLOTS = 1024


def itemsize(dtype: str) -> int:
    """Return the bytes of a value or an activation."""
    return 4 if dtype == "float32" else 2


def staged_itemsize(dtype: str, rows: int) -> int:
    """Bytes of a staged activation: one or two rows are widened once, not at each of their uses."""
    return 4 if dtype == "float32" or rows <= 2 else 2


def window_blocks(fmt: PackedFormat) -> int:
    """Blocks staged one after the other; after each window of them one element is left out."""
    alone = WINDOW % fmt.pattern.block or fmt.layout.skew > 1
    return 1 if alone else WINDOW // fmt.pattern.block


def staged_at_once(fmt: PackedFormat, dtype: str) -> int:
    """Elements along K that a thread loads at once: 16 bytes, or what K and the window divide by."""
    width = LOAD_BYTES // itemsize(dtype)
    return math.gcd(width, fmt.pattern.block * window_blocks(fmt), fmt.in_features)


def stored_at_once(fmt: PackedFormat, dtype: str, tile: GatherTile) -> int:
    """Count the staged elements that a thread stores at once: 16 bytes, or what it has loaded."""
    element = tile.vector * staged_itemsize(dtype, tile.rows)
    return math.gcd(staged_at_once(fmt, dtype), max(1, LOAD_BYTES // element))


def pitch(fmt: PackedFormat, dtype: str, tile: GatherTile) -> int:
    """Staged elements from one window to the next: some are left out, so that stores meet in few banks."""
    length = fmt.pattern.block * window_blocks(fmt)
    if tile.vector == 1 or fmt.layout.skew > 1:
        return length
    return length + (stored_at_once(fmt, dtype, tile) - length) % WINDOW


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


def estimated_registers(tile: GatherTile) -> int:
    """Estimate the registers of a thread: within 8 of what ptxas was seen to take for sm_90."""
    needed = 30 + 5 * min(tile.rows, 8) // 2 + max(0, tile.rows - 8)
    return max(32, 8 * ceil_div(needed, 8))


def estimated_shared_bytes(fmt: PackedFormat, dtype: str, tile: GatherTile) -> int:
    """Shared memory of a thread block: what is staged and the partial sums, which may take its place.

    TVM lets them where they fit and it is not larger by a factor of more than 16, or where both are float32.
    """
    size = staged_itemsize(dtype, tile.rows)
    windows, length = tile.chunk // window_blocks(fmt), fmt.pattern.block * window_blocks(fmt)
    left_out = windows * (pitch(fmt, dtype, tile) - length)
    staged = (tile.chunk * fmt.pattern.block + left_out) * tile.rows * size
    partial = tile.warps * tile.rows * LANES * PARTIAL_BYTES
    fits = partial <= staged <= _REUSED * partial
    grows = size == PARTIAL_BYTES and staged <= partial <= _REUSED * staged
    return max(staged, partial) if fits or grows else staged + partial


def candidates(
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    shared_bytes: int,
    multiprocessors: int | None = None,
    split: bool = False,
) -> Iterator[GatherTile]:
    """List every tile worth asking the model about, a few hundred at most.

    Rows of activations are cut into even tiles of up to 16; what is staged and the partial sums fit
    the shared memory; K is staged at once, in the fewest chunks that fit, or in twice as many; of the
    warps and loads in flight those are left out that add more than a little padding to the work. Where
    ``multiprocessors`` are given, lower tiles come only where half of them would stand idle with taller ones,
    and with ``split`` thread blocks share K where that gives work to some that have none.
    """
    unit = chunk_unit(fmt)
    seen: set[tuple[int, int]] = set()
    thread_blocks = 0
    for tile_rows in _row_tiles(rows):
        if seen and multiprocessors is not None and 2 * thread_blocks > multiprocessors:
            return
        for vector in (1, 2, 4):
            groups = ceil_div(tile_rows, vector)
            held = vector * groups
            if (vector, groups) in seen or not _is_row_shape(tile_rows, vector, dtype):
                continue
            most = _most_blocks(fmt, dtype, held, shared_bytes)
            if most < unit:
                continue
            seen.add((vector, groups))
            thread_blocks = fmt.padded_rows // LANES * ceil_div(rows, held)
            fewest = ceil_div(fmt.blocks, most)
            spare = multiprocessors // thread_blocks if split and multiprocessors else 1
            for (chunk, splits), made_for in _chunks(fmt, unit, fewest, most, spare).items():
                runs = chunk * fmt.pattern.nnz // fmt.layout.vector
                for warps, unroll in _shares(runs, _max_warps(held), whole_runs(fmt)):
                    if made_for is not None and unroll not in made_for:
                        continue
                    tile = GatherTile(vector, groups, warps, unroll, chunk, splits)
                    # with elements left out after windows, what is staged can take a little more
                    if estimated_shared_bytes(fmt, dtype, tile) <= shared_bytes:
                        yield tile


def choices(
    fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, multiprocessors: int
) -> dict[str, tuple[int, ...]]:
    """List the values of each knob for a tuner, which :func:`is_legal` allows together or not.

    All :func:`candidates` are among them, with and without thread blocks that share K, at every height of
    the tile, and with four times the fewest chunks.
    """
    shapes = row_shapes(rows, dtype)
    unit, whole = chunk_unit(fmt), whole_runs(fmt)
    chunks: set[tuple[int, int]] = set()
    for vector, groups in shapes:
        most = _most_blocks(fmt, dtype, vector * groups, shared_bytes)
        if most < unit:
            continue
        thread_blocks = fmt.padded_rows // LANES * ceil_div(rows, vector * groups)
        spare = multiprocessors // thread_blocks
        chunks.update(_chunks(fmt, unit, ceil_div(fmt.blocks, most), most, spare, _TUNED_CHUNKS))
    return {
        "vector": tuple(sorted({vector for vector, _ in shapes})),
        "groups": tuple(sorted({groups for _, groups in shapes})),
        "warps": tuple(range(1, _MAX_WARPS + 1)),
        "unroll": tuple(whole * units for units in range(1, max(1, MAX_UNROLL // whole) + 1)),
        "chunk": tuple(sorted({chunk for chunk, _ in chunks})),
        "splits": tuple(sorted({splits for _, splits in chunks})),
    }


def is_legal(fmt: PackedFormat, rows: int, dtype: str, shared_bytes: int, tile: GatherTile) -> bool:
    """Whether a kernel with this tile is right, fits the shared memory, and leaves no part idle."""
    chunk, splits, whole = tile.chunk, tile.splits, whole_runs(fmt)
    max_warps = _max_warps(tile.rows)
    if (tile.vector, tile.groups) not in row_shapes(rows, dtype) or tile.warps > max_warps:
        return False
    if min(chunk, splits, tile.unroll) < 1 or chunk % chunk_unit(fmt) or tile.unroll % whole:
        return False
    if estimated_shared_bytes(fmt, dtype, tile) > shared_bytes:
        return False
    parts = ceil_div(ceil_div(fmt.blocks, chunk), splits)
    if (splits - 1) * parts * chunk >= fmt.blocks:
        return False
    runs = chunk * fmt.pattern.nnz // fmt.layout.vector
    padding = _padding(runs, max_warps, whole)
    units = tile.unroll // whole
    padded = padding.get((tile.warps, units), math.inf)
    if padded > max(_TUNED_SPARE, min(padding.values())):
        return False
    return tile.warps in _EVEN_WARPS or padded < padding[tile.warps + 1, units]


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
    made: dict[tuple[int, int], set[int] | None] = {}
    for splits in sorted(counts):
        for chunks in (count * fewest for count in times):
            share = ceil_div(fmt.blocks, ceil_div(chunks, splits) * splits)
            even = ceil_div(share, unit) * unit
            for unroll, multiple in ((None, unit), *whole.items()):
                chunk = ceil_div(share, multiple) * multiple
                # every one of them has work
                parts = ceil_div(ceil_div(fmt.blocks, chunk), splits)
                if chunk > most_blocks or (splits - 1) * parts * chunk >= fmt.blocks:
                    continue
                if unroll is None:
                    made[chunk, splits] = None
                elif chunk != even:
                    made_for = made.setdefault((chunk, splits), set())
                    if made_for is not None:
                        made_for.add(unroll)
    return made


def _row_tiles(rows: int) -> list[int]:
    """Heights of tiles of activations, tallest first: even shares of M.

    A lower tile executes more instructions for each non-zero and reads the stream again.
    """
    heights = [ceil_div(rows, ceil_div(rows, _MAX_ROWS))]
    while heights[-1] > 1:
        heights.append(ceil_div(heights[-1], 2))
    return heights


@functools.lru_cache(maxsize=1024)
def row_shapes(rows: int, dtype: str) -> tuple[tuple[int, int], ...]:
    """List rows of a staged element, and such elements of a tile, that are worth trying at every height."""
    even = {ceil_div(rows, tiles) for tiles in range(1, rows + 1)}
    heights = {h for h in even if h <= _MAX_ROWS and ceil_div(rows, h) * h <= _SPARE * rows}
    shapes = {
        (vector, ceil_div(height, vector))
        for height in heights | set(_row_tiles(rows))
        for vector in (1, 2, 4)
        if _is_row_shape(height, vector, dtype)
    }
    return tuple(sorted(shapes))


def _is_row_shape(height: int, vector: int, dtype: str) -> bool:
    """Whether a tile of so many rows may be staged in elements of ``vector`` of them."""
    groups = ceil_div(height, vector)
    size = staged_itemsize(dtype, vector * groups)
    if vector * size > _STAGED_BYTES or vector >= 2 * height:
        return False
    # a staged element narrower than it could be costs a load a row more
    return vector * groups <= _MAX_ROWS and not (groups > 4 and size * vector < _STAGED_BYTES)


def _max_warps(held: int) -> int:
    return _MAX_WARPS if held <= 8 else _MAX_WARPS // 2


def _most_blocks(fmt: PackedFormat, dtype: str, held: int, shared_bytes: int) -> int:
    """Whole units of blocks that can be staged at a time."""
    room = shared_bytes - _max_warps(held) * held * LANES * PARTIAL_BYTES
    unit = chunk_unit(fmt)
    return room // (fmt.pattern.block * held * staged_itemsize(dtype, held)) // unit * unit


@functools.lru_cache(maxsize=1024)
def _padding(runs: int, max_warps: int, unit: int) -> dict[tuple[int, int], float]:
    """Work out by what factor warps and loads in flight (``unit`` at a time) pad ``runs`` of slots."""
    return {
        (warps, units): ceil_div(runs, warps * units * unit) * warps * units * unit / runs
        for units in range(max(1, MAX_UNROLL // unit), 0, -1)
        for warps in range(max_warps, 0, -1)
    }


@functools.lru_cache(maxsize=1024)
def _shares(runs: int, max_warps: int, unit: int) -> tuple[tuple[int, int], ...]:
    """Warps and loads in flight (in units) that share ``runs`` with little padding, most first."""
    padding = _padding(runs, max_warps, unit)
    # shares that leave most lanes without work are the least of evils where there is little work
    least = max(_SPARE, min(padding.values()))
    return tuple(
        (warps, units * unit)
        for (warps, units), padded in padding.items()
        if padded <= least
        and (warps in _EVEN_WARPS or padded < padding[warps + 1, units])
        and (units * unit in (2, 4) or padded < padding.get((warps, units + 1), math.inf))
    )
