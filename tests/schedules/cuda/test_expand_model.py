"""What the expand kernel is predicted to take, and where it is chosen."""

from dataclasses import replace

import pytest

from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.cuda import by_rows as cuda_by_rows
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda import expand_model, gather_model
from tvm_balanced.schedules.cuda import machine as cuda_machine
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.targets import gpus
from tvm_balanced.targets import resolve as targets

H100 = targets.resolve("h100")


def layer(pattern="4:16", n=8192, k=8192, rows=32, dtype="float16"):
    return cuda.preferred_format(BalancedPattern(pattern), n, k, rows, dtype, H100.target)


def chosen(fmt, rows, dtype="float16", spec=H100):
    return cuda_expand.choose(fmt, rows, dtype, spec.target)


@pytest.mark.parametrize("gpu", ["h100", "a100", "rtx-4090"])
def test_chosen_only_where_faster_than_the_gather(gpu):
    spec = targets.resolve(gpu)
    machine = cuda_machine.machine(gpus.gpu_of(spec.target))
    taken = 0
    for n, k in ((8192, 8192), (768, 3072), (50, 70)):
        for pattern in ("8:16", "2:16", "4:32"):
            for rows in (16, 33, 64, 256):
                fmt = layer(pattern, n, k, rows)
                knobs = gather_model.choose(fmt, rows, "float16", 48 << 10, machine)
                gather = gather_model.GatherModel(machine, fmt, rows, "float16").predict(knobs)
                got = chosen(fmt, rows, spec=spec)
                if got is not None:
                    taken += 1
                    assert got[1].total_us < gather.total_us
    assert taken


def test_few_rows_have_to_gain_a_tenth():
    machine = cuda_machine.machine(gpus.GPUS["h100"])
    taken = set()
    for n in (8192, 28672):
        for pattern in ("4:16", "1:16", "4:32"):
            for rows in (5, 8):
                fmt = layer(pattern, n, 8192, rows)
                knobs = gather_model.choose(fmt, rows, "float16", 48 << 10, machine)
                gather = gather_model.GatherModel(machine, fmt, rows, "float16").predict(knobs)
                _, said = EXPAND.best(fmt, rows, "float16", 227 << 10, machine)
                got = chosen(fmt, rows) is not None
                assert got == (said.total_us * 1.1 < gather.total_us)
                taken.add(got)
    assert taken == {True, False}


def test_plan_goes_by_the_kernel_that_is_chosen():
    fmt = layer()
    _, prediction = chosen(fmt, 32)
    said = cuda.predicted(fmt, 32, "float16", H100.target, H100.launch_us)
    assert said.shared_bytes == prediction.shared_bytes
    assert said.total_us - said.launch_us == pytest.approx(
        prediction.total_us - prediction.launch_us
    )


@pytest.mark.parametrize(
    ("pattern", "rows", "dtype"),
    [("4:16", 4, "float16"), ("4:16", None, "float16"), ("4:16", 32, "float32"),
     ("3:16", 32, "float16"), ("4:64", 32, "float16")],
)  # fmt: skip
def test_the_rest_is_the_gathers(pattern, rows, dtype):
    assert chosen(layer(pattern, rows=rows, dtype=dtype), rows, dtype) is None


def test_bitmaps_only_where_they_are_gathered():
    assert [layer("8:16", rows=rows).encoding for rows in (1, 16, 64, None)] == [
        "bitmap",
        "u4",
        "u4",
        "bitmap",
    ]
    # no pattern of the expand kernel: instructions are the limit at 8 rows, bytes below
    assert layer("5:16", 16384, 8192, rows=8).encoding == "u4"
    assert layer("5:16", 16384, 8192, rows=4).encoding == "bitmap"


def test_prediction_follows_work():
    """More activations, more weights and slower memory take longer; parts are bounds from below."""
    fmt = layer()
    machine = cuda_machine.machine(gpus.GPUS["h100"])

    def predict(fmt, rows, machine=machine):
        _, prediction = EXPAND.best(fmt, rows, "float16", 227 << 10, machine)
        return prediction

    base = predict(fmt, 32)
    assert predict(fmt, 64).total_us > base.total_us
    assert predict(layer(k=16384), 32).total_us > base.total_us
    slow = predict(fmt, 32, replace(machine, bandwidth_gbps=machine.bandwidth_gbps / 4))
    assert slow.bound == "memory"
    assert slow.total_us > base.total_us
    for part in ("memory", "l2", "issue", "arithmetic", "shared"):
        assert getattr(base, f"{part}_us") + base.launch_us <= base.total_us


@pytest.mark.parametrize(
    ("n", "k", "rows", "splits"),
    [
        (1024, 28672, 32, 16),
        (512, 16384, 16, 8),
        (8192, 8192, 32, 1),  # a thread block for nearly every multiprocessor
        (768, 3072, 16, 1),  # not worth the second launch
    ],
)
def test_thread_blocks_share_long_rows_of_small_layers(n, k, rows, splits):
    fmt, machine = layer(n=n, k=k), cuda_machine.machine(gpus.GPUS["h100"])
    tiles = EXPAND.candidates(fmt, rows, 227 << 10, machine.sm_count)
    tile, said = EXPAND.best(fmt, rows, "float16", 227 << 10, machine)
    assert tile.splits == splits
    assert EXPAND.is_legal(fmt, rows, 227 << 10, machine.sm_count, tile)
    whole = [
        EXPAND.predict(machine, fmt, rows, "float16", one).total_us
        for one in tiles
        if one.splits == 1
    ]
    assert said.total_us <= min(whole)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize("pattern", ["4:16", "1:16", "4:32"])
def test_kernels_of_a_symbolic_batch_take_over_where_they_are_faster(gpu, pattern):
    spec = targets.resolve(gpu)
    machine = cuda_machine.machine(gpus.gpu_of(spec.target))
    fmt = layer(pattern, 4096, 4096)
    tiles = expand_model.by_rows(fmt, "float16", 160 << 10, 48 << 10, machine)
    firsts = [first for first, _ in tiles]
    assert firsts == sorted(set(firsts)) and firsts[0] >= EXPAND.least_rows
    knobs = gather_model.choose(fmt, None, "float16", 48 << 10, machine)

    def predicted(serves, rows):
        if serves is None:
            return gather_model.GatherModel(machine, fmt, rows, "float16").predict(knobs).total_us
        return EXPAND.predict(machine, fmt, rows, "float16", serves).total_us

    before = None
    for first, tile in tiles:
        for rows in (first, first + 7, 100, 256, 512):
            if rows >= first:
                assert predicted(tile, rows) <= predicted(before, rows)
        before = tile


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("4:16", "float32"), ("3:16", "float16"), ("4:64", "float16")]
)
def test_a_symbolic_batch_of_other_formats_is_the_gathers(pattern, dtype):
    assert cuda_by_rows.kernels(layer(pattern, dtype=dtype), dtype, H100.target) == []


def test_a_symbolic_batch_times_known_rows_needs_no_kernel_for_fewer():
    every = cuda_by_rows.kernels(layer(), "float16", H100.target)
    assert [first for first, _ in every] == [1, 5, 17, 33]
    fewer = cuda_by_rows.kernels(layer(), "float16", H100.target, least=16)
    assert fewer == every[1:]
    assert cuda_by_rows.in_words(fewer).startswith(
        "cuda_expand, 16 rows a tile; from M = 17, 32 rows"
    )
