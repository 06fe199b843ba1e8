"""Rows of a benchmark: derived columns, contenders that fail, time limits, the machine."""

import dataclasses

import pytest
import torch

from tvm_balanced.bench import machine as bench_machine
from tvm_balanced.bench import operators as benchmarking
from tvm_balanced.bench import peers, results
from tvm_balanced.bench.engines import installed_engines
from tvm_balanced.bench.operators import library_problems
from tvm_balanced.bench.shapes import LayerShape, Problem
from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.support import provenance

PROBLEM = Problem("test", LayerShape("layer", 64, 256), 2, "4:16", "float32")
PEERS = {peer.name: peer for peer in peers.PEERS}


class Planted:
    """The dense peer, spoilt."""

    name = "dense"
    what = "planted"

    def __init__(self, fault):
        self.fault = fault

    def prepare(self, machine, problem, weights, data):
        if self.fault == "missing":
            raise bench_machine.PeerMissing("not on this machine")
        contender = PEERS["dense"].prepare(machine, problem, weights, data)
        make, seen = contender.make, []

        def spoilt():
            call = make()

            def run():
                seen.append(1)
                if self.fault == "crash" or (self.fault == "crash later" and len(seen) > 1):
                    raise RuntimeError("no kernel image")
                return call() + (0.1 if self.fault == "wrong" else 0)

            return run

        contender.make = spoilt
        return contender


@pytest.fixture
def machine():
    before = torch.get_num_threads()
    # more threads only wait for each other on a busy machine
    yield benchmarking.make_machine("llvm", 1)
    torch.set_num_threads(before)


@pytest.fixture
def bench(machine):
    return benchmarking.Benchmark(machine, peers=["dense"], seconds=0.01, threads=1)


def test_row_has_what_was_measured_and_what_follows(bench):
    cold, hot = bench.measure(PROBLEM)
    assert (cold["cache"], hot["cache"]) == ("cold", "hot")
    for row in (cold, hot):
        assert set(row) <= set(results.COLUMNS)
        assert row["p20_us"] <= row["us"] <= row["p80_us"]
        assert row["dense_ratio"] == row["dense_us"] / row["us"]
        assert row["bytes_dense"] == 64 * 256 * 4
        assert row["ceiling"] == row["bytes_dense"] / row["bytes"]
        assert row["share_of_ceiling"] == pytest.approx(row["dense_ratio"] / row["ceiling"])
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["share_of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"])
        assert row["error"] <= 1e-5 and row["dense_error"] <= 1e-5
        assert row["zeros"] == 0.75 and row["schedule"] == "default"


def test_row_says_where_and_with_what(bench):
    (row, _) = bench.measure(PROBLEM)
    assert row["kind"] == "llvm" and row["threads"] == "1"
    for column in ("device", "arch", "python", "torch", "tvm", "tvm_balanced", "load", "time"):
        assert row[column] not in (None, "")


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("missing", "not on this machine"),
        ("wrong", "not timed: error"),
        ("crash", "RuntimeError: no kernel image"),
        ("crash later", "RuntimeError: no kernel image"),
    ],
)
def test_faulty_peer_has_empty_columns_and_the_reason(bench, fault, reason):
    bench.peers = [Planted(fault)]
    for row in bench.measure(PROBLEM):
        assert reason in row["dense_note"]
        assert "dense_us" not in row and "dense_ratio" not in row
        assert row["us"] > 0


def test_wrong_operator_is_not_timed(bench, monkeypatch):
    spoilt = dataclasses.replace(peers.OWN, prepare=Planted("wrong").prepare)
    monkeypatch.setattr(benchmarking, "OWN", spoilt)
    for row in bench.measure(PROBLEM):
        assert "not timed: error" in row["note"]
        assert "us" not in row and "dense_ratio" not in row and "gbps" not in row
        assert row["dense_us"] > 0


def test_time_limit_stops_before_a_problem_that_would_end_later(bench, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(benchmarking.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(bench, "measure", lambda problem: [problem])
    # begun at 0; the first problem is looked at 10 s later and takes 10 s
    assert len(list(bench.run([PROBLEM] * 9, time_limit=45))) == 2
    assert len(list(bench.run([PROBLEM] * 9))) == 9


def test_keys_are_those_of_the_rows(bench):
    assert [results.key(k) for k in bench.keys(PROBLEM)] == [
        results.key(row) for row in bench.measure(PROBLEM)
    ]


def test_quantised_row_has_the_ratio_to_the_fastest_int8_engine(machine):
    if "onnxruntime-int8" not in installed_engines():
        pytest.skip("ONNX Runtime is not installed")
    names = ["dense", "onnxruntime-int8", "torch-int8"]
    run = benchmarking.Benchmark(machine, peers=names, seconds=0.01, threads=1)
    for row in run.measure(dataclasses.replace(PROBLEM, quantize="int8")):
        assert set(row) <= set(results.COLUMNS) and row["quantize"] == "int8"
        assert 1e-4 < row["error"] < 0.05 and row["dense_error"] < 1e-5
        ratios = [row[f"{name}_us"] / row["us"] for name in names]
        assert row["int8_engines_ratio"] == pytest.approx(min(ratios[1:]))
        assert [row[f"{name}_ratio"] for name in names] == pytest.approx(ratios)


def test_contender_without_copies_has_the_caches_of_all_flushed(bench, monkeypatch):
    loads = []
    measure = bench.clock.measure
    monkeypatch.setattr(bench.clock, "measure", lambda got, s: loads.append(got) or measure(got, s))
    single = Planted("")
    prepare = single.prepare
    single.prepare = lambda *given: dataclasses.replace(prepare(*given), single=True)
    # of smaller ones there would have to be too many copies
    problem = dataclasses.replace(PROBLEM, layer=LayerShape("layer", 512, 1024))
    for peer, copies, flush in ((Planted(""), 2, False), (single, 1, True)):
        loads.clear()
        bench.peers = [peer]
        bench.measure(problem)
        cold, hot = loads
        for name in ("balanced", "dense"):
            assert min(len(cold[name].calls), 2) == copies and cold[name].flush is flush
            assert len(hot[name].calls) == 1 and not hot[name].flush


def test_unknown_peer_is_told(bench):
    with pytest.raises(InputError, match="peer cublas is not known"):
        benchmarking.Benchmark(bench.machine, peers=["cublas"])


def test_emulated_device_is_not_timed(bench):
    emulated = bench_machine.Machine("emulated", bench.machine.spec, torch.device("cpu"))
    with pytest.raises(InputError, match="is not timed"):
        benchmarking.Benchmark(emulated)


def test_cuda_without_a_gpu_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ToolchainError, match="sees no NVIDIA GPU"):
        benchmarking.make_machine("cuda")


def test_another_target_is_told():
    with pytest.raises(InputError, match='target "h100" cannot be measured here'):
        benchmarking.make_machine("h100")


def test_commit_can_be_told_to_an_installed_copy(monkeypatch):
    monkeypatch.setenv("TVM_BALANCED_COMMIT", "0123456789")
    assert provenance.commit() == "0123456789"


def test_layers_of_a_library_are_problems(tmp_path):
    import tvm_balanced as tb

    module = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(2))).eval()
    model = tb.prune(tb.from_torch(module, (torch.randn(5, 32),)), "4:16")
    library = tb.load(tb.compile(model, "llvm", policy="always").save(tmp_path / "m.tvmb"))
    # both layers have one shape
    (problem,) = library_problems(library)
    assert (problem.layer.n, problem.layer.k, problem.m) == (32, 32, 5)
    assert (problem.pattern, problem.dtype) == ("4:16", "float32")
    rounded = tb.compile(model, "llvm", policy="always", quantize="int8")
    assert [problem.quantize for problem in library_problems(rounded)] == ["int8"]
    dense = tb.load(tb.compile(model, "llvm", policy="never").save(tmp_path / "d.tvmb"))
    with pytest.raises(InputError, match="no layer that runs sparse"):
        library_problems(dense)
