"""The space of the CUDA expand kernel."""

from __future__ import annotations

import pytest
from tvm import tirx

from tests.helpers.cuda_cases import Case, fused_kernel, packed_format, target
from tvm_balanced.schedules import dispatch
from tvm_balanced.schedules.cuda import expand as cuda_expand


def _func(rows: int, pattern: str = "4:16"):
    case = Case((rows,), 4096, 4096, pattern)
    return fused_kernel(case, packed_format(case, "u4"))


def test_every_point_is_a_kernel() -> None:
    func = _func(40)
    (space, gather) = dispatch.spaces(func, target())
    assert (space.kernel, gather.kernel) == ("cuda_expand", "cuda_gather")
    points = space.points()
    assert len(points) > 20
    default, _ = cuda_expand.choose(
        packed_format(Case((40,), 4096, 4096, "4:16"), "u4"), 40, "float16", target()
    )
    assert vars(default) in points
    assert {point["splits"] for point in points} == {1, 2, 4, 8}
    for point in points[::5]:
        built = space.build(point)
        body = built.mod["main"].body.block.body
        kernels = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
        assert len(kernels) == 1 + (point["splits"] > 1)
        threads = {
            str(loop.thread_binding.thread_tag): int(loop.extent) for loop in _bound(kernels[0])
        }
        assert threads["threadIdx.y"] == point["columns"] * point["shares"]
        assert threads.get("blockIdx.z", 1) == point["splits"]
        blocks = threads["blockIdx.x"] * threads["blockIdx.y"] * point["splits"]
        assert point["splits"] == 1 or blocks <= 132


def _bound(stmt):
    while hasattr(stmt, "thread_binding") and stmt.thread_binding is not None:
        yield stmt
        stmt = stmt.body


@pytest.mark.parametrize("rows", [1, 4])
def test_few_rows_are_the_gathers(rows: int) -> None:
    spaces = dispatch.spaces(_func(rows), target())
    assert [space.kernel for space in spaces] == ["cuda_gather"]
