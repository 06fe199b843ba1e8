"""The space of the CUDA gather kernel: all that the kernel model considers, and every point is a kernel."""

from __future__ import annotations

import random
import re
from dataclasses import asdict
from typing import Any

import pytest
import tvm
import tvm_ffi
from tvm import s_tir

from tests.helpers.cuda_cases import Case, fused_kernel, packed_format, target
from tvm_balanced.build.pipeline import TIR_PIPELINE
from tvm_balanced.cuda.codegen import lower
from tvm_balanced.schedules import dispatch, workload
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model, gather_tile, machine
from tvm_balanced.schedules.cuda.gather_tile import GatherTile
from tvm_balanced.targets.gpus import GPUS
from tvm_balanced.tuning.estimates import Candidate, features
from tvm_balanced.tuning.space import point_schedule

ROOM = 48 << 10
SIZES = {"float": 4, "uint": 4, "ushort": 2}
SMALL = Case((3,), 64, 64, "4:16")

SHAPES = [
    Case((1,), 4096, 4096, "2:16"),
    Case((8,), 64, 16384, "4:16"),  # thread blocks share K
    Case((13,), 50, 16390, "2:16", "bfloat16", "bfloat16"),
    Case((200,), 1536, 384, "4:16", "float32", "float32"),
    Case((16,), 512, 2048, "8:64"),  # larger windows
    Case((5,), 256, 4096, "8:32"),
    SMALL,
]


def _workload(case: Case) -> tvm.IRModule:
    got = workload.workload(fused_kernel(case, packed_format(case)), target())
    assert got is not None
    return got


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_what_the_kernel_model_considers_is_in_the_space(case: Case) -> None:
    fmt, (rows,) = packed_format(case), case.shapes[0]
    layer = (fmt, rows, case.dtype, ROOM)
    gpu = machine.machine(GPUS["h100"])
    choices = gather_tile.choices(*layer, gpu.sm_count)
    considered = {
        gather_model.choose(*layer, gpu),
        *gather_tile.candidates(*layer),
        *gather_tile.candidates(*layer, gpu.sm_count, split=True),
    }
    for knobs in considered:
        assert all(value in choices[name] for name, value in asdict(knobs).items()), knobs
        assert gather_tile.is_legal(*layer, knobs), knobs


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 7},
        {"chunk": 1 << 16},
        {"warps": 16, "unroll": 4},
        {"groups": 4},
        {"vector": 4, "groups": 3},
        {"splits": 2, "chunk": 8},
    ],
    ids=["odd-chunk", "no-room", "idle-warps", "idle-rows", "idle-vectors", "idle-blocks"],
)
def test_what_would_be_wrong_or_idle_is_refused(change: dict[str, int]) -> None:
    layer = (packed_format(SMALL), 3, SMALL.dtype, ROOM)
    good = asdict(gather_model.choose(*layer, machine.machine(GPUS["h100"])))
    assert gather_tile.is_legal(*layer, GatherTile(**good))
    assert not gather_tile.is_legal(*layer, GatherTile(**{**good, **change}))


def test_every_point_of_a_small_space_is_a_kernel() -> None:
    mod = _workload(SMALL)
    (space,) = dispatch.spaces(mod["main"], target())
    points = space.points()
    assert len({tuple(point.items()) for point in points}) == len(points) > 10
    for point in points:
        func = workload.build_for(mod["main"], target(), space.kernel, point)
        loops: list[Any] = []
        tvm_ffi.structural_walk(func.body, (tvm.tirx.For, loops.append), order="post")
        bound = {
            str(loop.thread_binding.thread_tag): int(loop.extent)
            for loop in loops
            if loop.thread_binding is not None
        }
        assert bound["threadIdx.y"] <= point["warps"]
        assert bound["blockIdx.y"] == -(-3 // (point["vector"] * point["groups"]))


@pytest.mark.parametrize("case", [SMALL, *SHAPES[1:3]], ids=str)
def test_estimated_shared_memory_is_what_a_kernel_declares(case: Case) -> None:
    mod, fmt = _workload(case), packed_format(case)
    *_, space = dispatch.spaces(mod["main"], target())
    for point in random.Random(0).sample(space.points(), 4):
        built = workload.build_for(mod["main"], target(), space.kernel, point)
        source, _ = lower(tvm.IRModule({"main": built}), target(), TIR_PIPELINE)
        declared = sum(
            SIZES[dtype] * int(length)
            for dtype, length in re.findall(r"__shared__ .*?(\w+) \w+\[(\d+)\];", source)
        )
        assert declared == gather_tile.estimated_shared_bytes(fmt, case.dtype, GatherTile(**point))


def test_a_trace_replays_to_the_same_kernel() -> None:
    mod = _workload(SMALL)
    (space,) = dispatch.spaces(mod["main"], target())
    point = space.points()[-1]
    trace = point_schedule(mod, space, point).trace
    drawn = [step for step in trace.insts if step.kind.name == "SampleCategorical"]
    assert len(drawn) == len(space.choices)
    again = s_tir.Schedule(mod)
    s_tir.schedule.Trace.apply_json_to_schedule(trace.as_json(), again)
    assert workload.knobs_of(again.mod) == (space.kernel, point)
    built = workload.realize(again.mod, target())["main"]
    tile = gather_tile.GatherTile(**point)
    expected = cuda_gather.apply(mod["main"], target(), tile)
    assert expected is not None
    tvm.ir.assert_structural_equal(built.body, expected.mod["main"].body)


def test_features_tell_points_apart() -> None:
    mod = _workload(SMALL)
    (space,) = dispatch.spaces(mod["main"], target())
    candidates = [Candidate.of(space.kernel, point) for point in space.points()]
    said = {tuple(features(mod, target(), candidate)) for candidate in candidates}
    assert len(said) > len(space.points()) / 2
