"""What the CUDA target offers: its rules in order, and the packed format they like best."""

from __future__ import annotations

import dataclasses
import math

import tvm

from tvm_balanced.format.layout import BITMAP, BITMAP_BLOCKS, ENCODINGS, Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import by_rows as cuda_by_rows
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda import expand_model, machine, sparse_mma_model
from tvm_balanced.schedules.cuda import fallback as cuda_fallback
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model as kernel_model
from tvm_balanced.schedules.cuda import sparse_mma as cuda_sparse_mma
from tvm_balanced.targets.gpus import gpu_figures

# a symbolic M is the first one's; the next two take different patterns, and only what they are predicted
# faster for than the gather
BALANCED_RULES = (cuda_by_rows, cuda_sparse_mma, cuda_expand, cuda_gather, cuda_fallback)
_LANES = 32
_LOAD_BYTES = 16
# of one row of activations in a skewed group, 32 KiB for 16 rows; two or four times that where little else
# helps: tiles are then lower, and more of them read the stream
_SKEWED_BYTES = 2048
_FEW_SLOTS = 1 / 32  # of a block, too few to order
_WINDOW = 32  # blocks up to this many elements conflict at most twice as they are
_SPARE = 1.07  # share of blocks that may be padding
_BUSY_ROWS = 8  # of activations, from which on instructions can take longer than bytes


def preferred_format(
    pattern: BalancedPattern,
    out_features: int,
    in_features: int,
    batch: int | None,
    dtype: str,
    target: tvm.target.Target,
) -> PackedFormat:
    """The packed format that the CUDA schedules like best.

    The 32 lanes of a warp own 32 rows side by side and each loads 16 bytes of values at a time, so
    the layout is ``r32v8`` for two-byte values and ``r32v4`` for float32, skewed where blocks are large
    (:func:`_skew`). Indices take the fewest bytes: more integer instructions per slot are free as long as
    memory is the limit. A bitmap, which takes most of them and which the expand kernel does not read, is
    chosen only where it is smaller, and for 8 rows and more only where instructions are not predicted to be
    the limit and no kernel is predicted faster without.

    Parameters
    ----------
    pattern : BalancedPattern
        Kept as it is.
    out_features, in_features : int
        N and K.
    batch : int or None
        Rows of activations, None when symbolic.
    dtype : str
        Of the values.
    target : tvm.target.Target
        A CUDA target; the format is the same for all of them.
    """
    itemsize = 4 if dtype == "float32" else 2
    vector = _LOAD_BYTES // itemsize
    layout = Layout(_LANES, vector, _skew(pattern, in_features, itemsize))
    # the three planes of u3 hold runs of eight slots
    fits = [e for e, bits in ENCODINGS.items() if pattern.block <= 1 << bits]
    encoding = min((e for e in fits if e != "u3" or vector == 8), key=ENCODINGS.__getitem__)
    fmt = PackedFormat(out_features, in_features, pattern, layout, encoding)
    if pattern.block in BITMAP_BLOCKS:
        bitmap = dataclasses.replace(fmt, encoding=BITMAP)
        if bitmap.index_bits < fmt.index_bits and cuda_gather.takes_indices(bitmap):
            if batch is not None and batch >= _BUSY_ROWS:
                told = predicted(bitmap, batch, dtype, target)
                # fewer bytes gain nothing where instructions are the limit
                if told.bound == "issue":
                    return fmt
                if predicted(fmt, batch, dtype, target).total_us < told.total_us:
                    return fmt
            return bitmap
    return fmt


def predicted(
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    target: tvm.target.Target,
    launch_us: float | None = None,
) -> machine.Prediction:
    """The prediction for a layer, with the kernel and the knobs that the compiler will choose.

    Parameters
    ----------
    fmt : PackedFormat
        Layout ``r32vV``.
    rows : int
        M.
    dtype : str
        Of values and activations.
    target : tvm.target.Target
        A CUDA target.
    launch_us : float, optional
        What a launch costs, in place of the model's own figure.
    """
    gpu = machine.machine(gpu_figures(target))
    launched = gpu if launch_us is None else dataclasses.replace(gpu, launch_us=launch_us)
    multiplies = cuda_sparse_mma.choose(fmt, rows, dtype, target)
    if multiplies is not None:
        return sparse_mma_model.predict(launched, fmt, rows, dtype, multiplies[0])
    expands = cuda_expand.choose(fmt, rows, dtype, target)
    if expands is not None:
        return expand_model.predict(launched, fmt, rows, dtype, expands[0])
    knobs = kernel_model.choose(fmt, rows, dtype, cuda_gather.shared_limit(target), gpu)
    return kernel_model.Model(launched, fmt, rows, dtype).predict(knobs)


def predicted_symbolic(
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    target: tvm.target.Target,
    launch_us: float | None = None,
) -> machine.Prediction:
    """The prediction for a layer whose number of rows is symbolic, when it is called with ``rows``.

    Parameters
    ----------
    fmt, rows, dtype, target, launch_us
        As for :func:`predicted`.
    """
    gpu = machine.machine(gpu_figures(target))
    launched = gpu if launch_us is None else dataclasses.replace(gpu, launch_us=launch_us)
    tile = None
    for first, serves in cuda_by_rows.kernels(fmt, dtype, target):
        tile = serves if first <= rows else tile
    if tile is not None:
        return expand_model.predict(launched, fmt, rows, dtype, tile)
    knobs = kernel_model.choose(fmt, None, dtype, cuda_gather.shared_limit(target), gpu)
    return kernel_model.Model(launched, fmt, rows, dtype).predict(knobs)


def _skew(pattern: BalancedPattern, in_features: int, itemsize: int) -> int:
    """How many lanes work on different blocks at once, so that their gathers meet in fewer banks.

    With 16 they never conflict in elements of eight bytes, with 8 at most twice, which is more than packing
    reaches by ordering the slots of a block where there are several to choose from. A whole group of blocks
    has to be staged at a time, and K is padded to whole groups, neither of which may cost much.
    """
    block, nnz = pattern.block, pattern.nnz
    if block <= _WINDOW:
        return 1
    blocks = -(-in_features // block)
    unit = _LOAD_BYTES // itemsize // math.gcd(_LOAD_BYTES // itemsize, nnz)
    few = pattern.density <= _FEW_SLOTS
    for skew in (16, 8) if few else (16,):
        room = _SKEWED_BYTES * (1 if not few else 2 if skew == 16 else 4)
        takes = block * skew * itemsize <= room
        group = math.lcm(unit, skew)
        if takes and -(-blocks // group) * group <= _SPARE * blocks:
            return skew
    return 1
