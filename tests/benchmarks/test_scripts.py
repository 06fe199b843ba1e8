"""Every script of ``benchmarks/`` runs, in its smallest form."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))

# script, arguments in which OUT is the file to write, and rows that it then has at least
SMALL = {
    "crossover": ("-o OUT --pattern 4:16", 100),
    "models": (
        "--model minilm --size small --input-size 1x4 --pattern 4:16 --quantize int8 --policy always"
        " --peers torch-int8 --callers 1,2 --threads 1 --no-compile --seconds 0.01 --target llvm -o OUT",
        8,
    ),
    "shape_report": ("--set minilm --m 1 --pattern 4:16 --dtype float32 --arch sm_80 -o OUT", 3),
    # simulating needs GPGPU-Sim
    "simulate_gather": ("compare benchmarks/results/gather_simulated.csv --output OUT", 20),
}
LARGE = {
    "build_times": ("--json", 0),
    "expand_report": ("--arch sm_90 --pattern 2:4 -o OUT", 5),
    "compare_releases": (f"minilm --python now={sys.executable} --seconds 5 -o OUT", 1),
    "tuning_sweep": ("operator --n 64 --k 32 --m 1 --pattern 4:16 --trials 2 -o OUT", 3),
}


def _run(script: str, arguments: str, out: Path) -> str:
    words = [str(out) if word == "OUT" else word for word in arguments.split()]
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _rows(script: str, arguments: str, least: int, out: Path) -> None:
    said = _run(script, arguments, out)
    if not least:
        assert said.strip()
        return
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= least
    assert all(None not in row and None not in row.values() for row in rows)


@pytest.mark.parametrize("script", SMALL)
def test_smallest_form(script: str, tmp_path: Path) -> None:
    _rows(script, *SMALL[script], tmp_path / "out.csv")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--llama-size 8x2048", '"8x2048" is not LAYERSxHIDDENxFEEDFORWARD in whole numbers above zero'),
        ("--llama-size 8x2000x5504", "2000 is not a multiple of 256, four heads of 64"),
        ("--input-size 8x0", '"8x0" is not BATCHxTOKENS in whole numbers above zero'),
        ("--peers ort-int8", '"ort-int8" is not one of onnxruntime, '),
    ],
)  # fmt: skip
def test_models_refuse_what_they_cannot_read(arguments: str, said: str) -> None:
    command = [sys.executable, "benchmarks/models.py", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr, done.stderr[-3000:]


@pytest.mark.large
def test_llama_of_another_size_runs_beside_int4(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out.csv"
    llama = (
        "--model llama_decode --llama-size 1x256x512 --pattern 4:16 --quantize int8 --no-compile"
    )
    _run("models", f"{llama} --target llvm --peers ort-int4 --seconds 0.05 -o OUT", out)
    with out.open(newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert rows["ort-int4"]["quantize"] == "int4" and rows["ort-int4"]["ms"], rows["ort-int4"][
        "note"
    ]
    assert rows["tvm-balanced, 4:16 int8"]["sparse_layers"] == "8"


@pytest.mark.large
@pytest.mark.parametrize("script", LARGE)
def test_smallest_form_of_slow_ones(script: str, tmp_path: Path) -> None:
    _rows(script, *LARGE[script], tmp_path / "out.csv")


@pytest.mark.large
def test_every_engine_that_is_installed_takes_part(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    models = "--model minilm --model lstm --size small --target llvm --pattern 4:16 --no-compile"
    _run("models", f"{models} --quantize none,int8,w8 --callers 1,4 --seconds 0.05 -o OUT", out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"onnxruntime", "onnxruntime-int8", "torch-int8"} <= {row["contender"] for row in rows}
    assert all(row["calls_per_s"] for row in rows), [row["note"] for row in rows]


def test_models_say_what_an_option_takes() -> None:
    for given, expected in (
        ("--peers tensorrt", '"tensorrt" is not one of onnxruntime'),
        ("--quantize int4", '"int4" is not one of none, int8, w8'),
        ("--callers 0", '"0" is not numbers above zero'),
        ("--input-size 32", '"32" is not BATCHxTOKENS'),
    ):
        command = [sys.executable, "benchmarks/models.py", *given.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and expected in done.stderr


def test_shipping_records_reads_what_is_shipped(tmp_path: Path) -> None:
    (folder,) = (ROOT / "tuning_logs").glob("*-2-cores")
    said = _run("ship_records", f"{folder} -o OUT", tmp_path / "logs")
    assert folder.name in said and "kernels are faster tuned" in said


@pytest.mark.parametrize("script", LARGE)
def test_slow_ones_are_imported(script: str, tmp_path: Path) -> None:
    assert "Usage" in _run(script, "--help", tmp_path)


def test_each_script_has_a_smallest_form() -> None:
    assert sorted([*SMALL, *LARGE, "ship_records"]) == SCRIPTS
