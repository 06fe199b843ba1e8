"""What the CUDA target offers: its rules in order, and the packed format they like best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tvm

from tvm_balanced.format.layout import (
    BITMAP,
    BITMAP_BLOCKS,
    ENCODINGS,
    Layout,
    PackedFormat,
    ceil_div,
)
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import by_rows, expand, fallback, gather, gather_model, sparse_mma
from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.schedules.cuda.gather_tile import LANES, LOAD_BYTES, itemsize
from tvm_balanced.schedules.cuda.machine import Prediction, machine
from tvm_balanced.schedules.cuda.sparse_mma_model import SPARSE_MMA
from tvm_balanced.schedules.rules import Layer, Rule, TunableRule
from tvm_balanced.targets.gpus import gpu_of

# a symbolic M is the first one's; the next two take different patterns, and only what they are predicted
# faster for than the gather
BALANCED_RULES: Sequence[Rule] = (by_rows, sparse_mma, expand, gather, fallback)
TUNABLE_RULES: Sequence[TunableRule] = (sparse_mma, expand, gather)
# of one row of activations in a skewed group, 32 KiB for 16 rows; two or four times that where little else
# helps: tiles are then lower, and more of them read the stream
_SKEWED_BYTES = 2048
_FEW_SLOTS = 1 / 32  # of a block, too few to order
_WINDOW = 32  # blocks up to this many elements conflict at most twice as they are
_SPARE = 1.07  # share of blocks that may be padding
_BUSY_ROWS = 8  # of activations, from which on instructions can take longer than bytes


def preferred_format(layer: Layer, target: tvm.target.Target) -> PackedFormat:
    """Choose the packed format that the CUDA schedules like best, the same for every GPU.

    The 32 lanes of a warp own 32 rows side by side and each loads 16 bytes of values at a time, so
    the layout is ``r32v8`` for two-byte values and ``r32v4`` for float32, skewed where blocks are large
    (:func:`_skew`). Indices take the fewest bytes: more integer instructions per slot are free as long as
    memory is the limit. A bitmap, which takes most of them and which the expand kernel does not read, is
    chosen only where it is smaller, and for 8 rows and more only where instructions are not predicted to be
    the limit and no kernel is predicted faster without.
    """
    pattern, out_features, in_features, rows, dtype = layer
    vector = LOAD_BYTES // itemsize(dtype)
    layout = Layout(LANES, vector, _skew(pattern, in_features, itemsize(dtype)))
    # the three planes of u3 hold runs of eight slots
    fits = [e for e, bits in ENCODINGS.items() if pattern.block <= 1 << bits]
    encoding = min((e for e in fits if e != "u3" or vector == 8), key=ENCODINGS.__getitem__)
    fmt = PackedFormat(out_features, in_features, pattern, layout, encoding)
    if pattern.block not in BITMAP_BLOCKS:
        return fmt
    bitmap = dataclasses.replace(fmt, encoding=BITMAP)
    if bitmap.index_bits >= fmt.index_bits or not gather.takes_indices(bitmap):
        return fmt
    if rows is not None and rows >= _BUSY_ROWS:
        prediction = predicted(bitmap, rows, dtype, target)
        # fewer bytes gain nothing where instructions are the limit
        if prediction.bound == "issue":
            return fmt
        if predicted(fmt, rows, dtype, target).total_us < prediction.total_us:
            return fmt
    return bitmap


def predicted(
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    target: tvm.target.Target,
    launch_us: float | None = None,
    symbolic: bool = False,
) -> Prediction:
    """Predict a layer's time at M = ``rows``, with the kernel and the knobs that the compiler will choose.

    ``launch_us`` is what a launch costs, in place of the model's own figure; ``symbolic`` says that the
    compiler does not know M.
    """
    known = machine(gpu_of(target))
    gpu = known if launch_us is None else dataclasses.replace(known, launch_us=launch_us)
    if symbolic:
        tiles = [tile for first, tile in by_rows.kernels(fmt, dtype, target) if first <= rows]
        if tiles and tiles[-1] is not None:
            return EXPAND.predict(gpu, fmt, rows, dtype, tiles[-1])
    for rule, model in () if symbolic else ((sparse_mma, SPARSE_MMA), (expand, EXPAND)):
        chosen = rule.choose(fmt, rows, dtype, target)
        if chosen is not None:
            return model.predict(gpu, fmt, rows, dtype, chosen[0])
    limit = gather.shared_limit(target)
    gathered = gather_model.choose(fmt, None if symbolic else rows, dtype, limit, known)
    return gather_model.GatherModel(gpu, fmt, rows, dtype).predict(gathered)


def _skew(pattern: BalancedPattern, in_features: int, size: int) -> int:
    """Choose how many lanes work on different blocks at once, so that their gathers meet in fewer banks.

    With 16 they never conflict in elements of eight bytes, with 8 at most twice, which is more than packing
    reaches by ordering the slots of a block where there are several to choose from. A whole group of blocks
    has to be staged at a time, and K is padded to whole groups, neither of which may cost much.
    """
    block, nnz = pattern.block, pattern.nnz
    if block <= _WINDOW:
        return 1
    blocks = ceil_div(in_features, block)
    unit = LOAD_BYTES // size // math.gcd(LOAD_BYTES // size, nnz)
    few = pattern.density <= _FEW_SLOTS
    for skew in (16, 8) if few else (16,):
        room = _SKEWED_BYTES * (1 if not few else 2 if skew == 16 else 4)
        takes = block * skew * size <= room
        group = math.lcm(unit, skew)
        if takes and ceil_div(blocks, group) * group <= _SPARE * blocks:
            return skew
    return 1
