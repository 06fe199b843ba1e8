"""The analytic model of the gather kernel: cases computed by hand, monotonicity, and what it chooses."""

from dataclasses import replace
from itertools import pairwise

import pytest
from tvm.target import Target

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.planning import cost
from tvm_balanced.schedules.cuda import gather_model, gather_tile
from tvm_balanced.schedules.cuda import machine as cuda_machine
from tvm_balanced.schedules.cuda.gather_model import GatherModel
from tvm_balanced.schedules.cuda.gather_tile import GatherTile
from tvm_balanced.targets import driver, gpus
from tvm_balanced.targets import resolve as targets

H100 = cuda_machine.machine(gpus.GPUS["h100"])
ROOM = 48 << 10

# LLM layers, MiniLM's, the LSTM's and the paper's own
SHAPES = [
    *((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672)),
    *((384, 384), (1536, 384), (384, 1536), (6000, 1500), (16384, 8196)),
]


def layer(n, k, pattern="4:16", dtype="float16"):
    parsed = BalancedPattern(pattern)
    vector = 4 if dtype == "float32" else 8
    encoding = "u4" if parsed.block <= 16 else "u8"
    return PackedFormat(n, k, parsed, Layout(32, vector), encoding)


def predict(fmt, rows, knobs, gpu=H100, dtype="float16"):
    return GatherModel(gpu, fmt, rows, dtype).predict(GatherTile(*knobs))


def fastest(fmt, rows, gpu=H100, dtype="float16"):
    model = GatherModel(gpu, fmt, rows, dtype)
    return min(model.predict(k).total_us for k in gather_tile.candidates(fmt, rows, dtype, ROOM))


def test_bytes_and_memory_time_by_hand():
    said = predict(layer(4096, 4096), 1, (1, 1, 16, 4, 256))
    # 1024 slots a row, two bytes of value and half a byte of index
    assert said.stream_bytes == 4096 * 1024 * 5 // 2
    # 128 thread blocks stage 4096 activations of two bytes
    assert said.staged_bytes == 128 * 4096 * 2
    moved = said.stream_bytes + 2 * 4096 + 2 * 4096
    assert said.memory_us == pytest.approx(moved / (3350e3 * 0.92))


def test_thread_blocks_and_occupancy_by_hand():
    said = predict(layer(11008, 4096), 8, (4, 2, 16, 4, 128))
    assert said.thread_blocks == 11008 // 32
    # 128 windows of 16 elements and two that are left out, of 8 rows of two bytes; partial sums take less
    assert said.shared_bytes == 128 * 18 * 8 * 2
    # 56 registers: 9 warps in each quarter of an SM, two times 16 in all
    assert (said.registers, said.resident) == (56, 2)
    assert said.waves == pytest.approx(344 / (2 * 132))
    # 344 thread blocks on 132 multiprocessors: the busiest have three
    assert said.idle_share == pytest.approx(1 - 344 / 396)


def test_little_asks_for_18_kilobytes_on_an_h100():
    said = predict(layer(4096, 4096), 1, (1, 1, 16, 4, 256))
    assert said.needed_bytes_in_flight == pytest.approx(18e3 * 0.92, rel=0.02)
    # 16 warps with two loads each of 16 bytes of values and 4 of indices in every lane
    assert said.bytes_in_flight == 16 * 2 * 32 * 20


@pytest.mark.parametrize(
    ("dtype", "knobs", "counted"),
    [
        ("float16", (1, 1, 8, 4, 256), 6.1),
        ("float16", (2, 1, 8, 4, 256), 7.1),
        ("float16", (4, 1, 8, 4, 256), 13.2),
        ("float16", (4, 2, 8, 4, 128), 22.2),
        ("float16", (4, 3, 8, 4, 64), 33.0),
        ("float16", (4, 4, 8, 1, 64), 41.6),
        ("float32", (1, 1, 8, 4, 256), 6.1),
        ("float32", (2, 4, 8, 4, 64), 16.1),
        ("bfloat16", (1, 1, 8, 4, 256), 6.1),
        ("bfloat16", (4, 2, 8, 4, 128), 22.2),
        ("bfloat16", (4, 4, 8, 4, 64), 41.8),
    ],
)
def test_instructions_are_those_of_the_machine_code(dtype, knobs, counted):
    """Against the loop of the kernel for sm_90, N = K = 4096 at 4:16, counted by static_report."""
    rows = knobs[0] * knobs[1]
    said = predict(layer(4096, 4096, dtype=dtype), rows, knobs, dtype=dtype)
    assert said.instructions_per_slot == pytest.approx(counted, rel=0.12)


def test_wavefronts_of_gathers_by_hand():
    # eight bytes a lane are two wavefronts, and a tile of 8 rows has two such elements
    said = predict(layer(4096, 4096), 8, (4, 2, 16, 4, 128))
    assert said.wavefronts_per_slot == 4
    # a window of 64 elements of eight bytes is four times the banks
    assert predict(layer(4096, 4096, "4:64"), 8, (4, 2, 16, 4, 32)).wavefronts_per_slot > 6


def test_a_kernel_that_fits_nowhere_takes_forever():
    knobs = GatherTile(4, 4, 16, 4, 4096)
    assert GatherModel(H100, layer(4096, 65536), 16, "float16").predict(knobs).total_us == float(
        "inf"
    )


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_more_bytes_are_not_faster(rows):
    dense = fastest(layer(8192, 8192, "8:16"), rows)
    assert fastest(layer(8192, 8192, "4:16"), rows) < dense
    assert fastest(layer(8192, 8192, "2:16"), rows) < fastest(layer(8192, 8192, "4:16"), rows)
    assert fastest(layer(16384, 8192, "4:16"), rows) > fastest(layer(8192, 8192, "4:16"), rows)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_more_rows_of_activations_are_not_faster(n, k):
    fmt = layer(n, k)
    times = [fastest(fmt, rows) for rows in (1, 2, 4, 8, 16, 32)]
    assert all(later >= before * 0.999 for before, later in pairwise(times))


@pytest.mark.parametrize(
    "better",
    [
        {"bandwidth_gbps": 6000.0},
        {"memory_ns": 350.0},
        {"clock_ghz": 3.0},
        {"launch_us": 1.0},
        {"l2_bytes_per_clock": 9000.0},
    ],
    ids=lambda better: next(iter(better)),
)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_better_gpu_is_not_slower(better, rows):
    fmt = layer(11008, 4096)
    for knobs in gather_tile.candidates(fmt, rows, "float16", ROOM):
        before = GatherModel(H100, fmt, rows, "float16").predict(knobs).total_us
        after = GatherModel(replace(H100, **better), fmt, rows, "float16").predict(knobs).total_us
        assert after <= before * (1 + 1e-9), knobs


def test_never_faster_than_memory_and_launch():
    for n, k in SHAPES:
        fmt = layer(n, k)
        for knobs in gather_tile.candidates(fmt, 8, "float16", ROOM):
            said = GatherModel(H100, fmt, 8, "float16").predict(knobs)
            assert said.total_us >= said.memory_us + H100.launch_us


@pytest.mark.parametrize("gpu", ["h100", "a100", "rtx-4090", "a10", "b200", "rtx-5090"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_candidates_and_choice_are_legal(gpu, dtype):
    itemsize = 4 if dtype == "float32" else 2
    machine = cuda_machine.machine(gpus.GPUS[gpu])
    for n, k in SHAPES:
        for pattern in ("4:16", "16:256", "3:16"):
            fmt = layer(n, k, pattern, dtype)
            for rows in (1, 8, 13):
                got = list(gather_tile.candidates(fmt, rows, dtype, ROOM))
                assert len(got) == len(set(got)) < 500
                assert gather_model.choose(fmt, rows, dtype, ROOM, machine) in got
                for one in got:
                    held = one.vector * one.groups
                    staged = one.chunk * fmt.pattern.block * held * itemsize
                    assert staged + one.warps * held * 32 * 4 <= ROOM
                    assert one.chunk * fmt.pattern.nnz % fmt.index_vector == 0
                    assert one.vector * itemsize <= 8
                    assert one.warps * 32 <= 1024


def test_choice_is_the_same_every_time():
    fmt = layer(6000, 1500)
    first = gather_model.choose(fmt, 8, "float16", ROOM, H100)
    gather_model._choose.cache_clear()
    assert gather_model.choose(fmt, 8, "float16", ROOM, H100) == first


def test_choice_is_near_the_fastest_and_reads_least_among_those():
    for rows in (1, 8, 16):
        for n, k in SHAPES:
            fmt = layer(n, k)
            model = GatherModel(H100, fmt, rows, "float16")
            timed = [
                model.predict(knobs)
                for knobs in gather_tile.candidates(fmt, rows, "float16", ROOM, H100.sm_count)
            ]
            limit = 1.1 * min(one.total_us for one in timed)
            chosen = model.predict(gather_model.choose(fmt, rows, "float16", ROOM, H100))
            assert chosen.total_us <= limit
            near = [(one.memory_us, one.stream_bytes) for one in timed if one.total_us <= limit]
            assert (chosen.memory_us, chosen.stream_bytes) == min(near)


def test_large_weights_are_read_once():
    """Where the stream does not fit the level-2 cache, all rows of activations are in one tile."""
    for rows in (1, 2, 4, 8):
        chosen = gather_model.choose(layer(28672, 8192), rows, "float16", ROOM, H100)
        assert chosen.vector * chosen.groups >= rows


def test_few_outputs_are_spread_over_tiles_of_activations():
    fmt = layer(384, 384)
    chosen = gather_model.choose(fmt, 16, "float16", ROOM, H100)
    assert chosen.vector * chosen.groups < 16


def test_sums_of_thread_blocks_by_hand():
    """A second launch, its chain, and the sums twice through the level-2 cache; all else is shared out."""
    fmt = layer(64, 16384)
    model = GatherModel(H100, fmt, 1, "float16")
    whole, split = (GatherTile(1, 1, 16, 4, 256, splits) for splits in (1, 4))
    one, four = model.predict(whole), model.predict(split)
    assert (one.thread_blocks, four.thread_blocks) == (2, 8)
    # as often read and staged, by more of the multiprocessors
    assert (one.stream_bytes, one.staged_bytes) == (four.stream_bytes, four.staged_bytes)
    assert four.latency_us < one.latency_us
    clock = H100.clock_ghz * 1e3
    # two tiles of outputs run, each behind a port of 64 bytes; four loads wait together
    clocks = H100.stage_ns * H100.clock_ghz + (4 + 60) * 2 + 2 * 4 * 64 * 4 / (2 * 64)
    sums_us = cuda_machine.adding_us(H100, splits=4, outputs=64, work_groups=2)
    assert sums_us == pytest.approx(H100.launch_us + clocks / clock)
    slow = replace(H100, launch_us=10.0)
    more = GatherModel(slow, fmt, 1, "float16").predict(split).total_us - four.total_us
    assert more == pytest.approx(2 * (slow.launch_us - H100.launch_us))


def test_a_second_launch_has_to_pay():
    fmt = layer(64, 16384)
    assert gather_model.choose(fmt, 1, "float16", ROOM, H100).splits == 4
    assert gather_model.choose(fmt, None, "float16", ROOM, H100).splits == 1
    slow = replace(H100, launch_us=10.0)
    assert gather_model.choose(fmt, 1, "float16", ROOM, slow).splits == 1


def test_choice_depends_on_the_gpu():
    fmt = layer(2048, 4096)
    chosen = {
        gather_model.choose(fmt, 16, "float16", ROOM, cuda_machine.machine(figures))
        for figures in gpus.GPUS.values()
    }
    assert len(chosen) > 1


def test_symbolic_rows_are_taken_for_eight():
    fmt = layer(4096, 4096)
    assert gather_model.choose(fmt, None, "float16", ROOM, H100) == gather_model.choose(
        fmt, 8, "float16", ROOM, H100
    )


def test_prediction_prints_its_parts_and_that_it_is_uncalibrated():
    text = str(predict(layer(4096, 4096), 1, (1, 1, 16, 4, 256)))
    assert cuda_machine.CALIBRATION == "uncalibrated"
    assert "us (uncalibrated), bound by" in text.splitlines()[0]
    assert "bytes_in_flight" in text


def test_other_layouts_and_architectures_are_refused():
    fmt = PackedFormat(64, 64, BalancedPattern("4:16"), Layout(1, 8), "u8")
    with pytest.raises(InputError, match="r1v8 is not of the gather kernel"):
        GatherModel(H100, fmt, 1, "float16")
    with pytest.raises(InputError, match=r'"sm_61".*known are sm_80'):
        cuda_machine.machine(replace(gpus.GPUS["h100"], arch="sm_61"))


def test_plan_and_compiler_speak_of_the_same_prediction():
    from tvm_balanced.schedules.cuda import gather as cuda_gather

    spec = targets.resolve("rtx-4090")
    fmt = layer(4096, 4096)
    machine = cuda_machine.machine(gpus.gpu_of(spec.target))
    limit = cuda_gather.shared_limit(spec.target)
    tile = gather_model.choose(fmt, 4, "float16", limit, machine)
    said = GatherModel(machine, fmt, 4, "float16").predict(tile)
    assert cost.sparse_us(spec, 4, fmt, "float16") == pytest.approx(said.total_us)


@pytest.mark.parametrize("name", sorted(gpus.GPUS))
def test_a_target_names_its_gpu(name):
    assert gpus.gpu_of(targets.resolve(name).target) == gpus.GPUS[name]


def test_a_detected_gpu_is_told_by_its_target():
    gpu = driver.DetectedGpu(
        "NVIDIA GeForce RTX 4070", "sm_89", 12 << 30, 504.0, 46, 2.475, 36 << 20, 99 << 10
    )
    target = gpus.cuda_target(gpus.known_gpu(gpu))
    # as a record, or a library built by another process, says it
    for same in (target, Target(str(target))):
        assert gpus.gpu_of(same) == gpus.known_gpu(gpu)
        spec = targets.resolve(same)
        assert (spec.gpu, spec.cores, spec.bandwidth_gbps) == (gpu.name, 46, 504.0)
