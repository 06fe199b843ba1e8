"""Writes tuning records (``FOLDER write NAME BATCHES``), or kills writers (``FOLDER kill ROUNDS``)."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

from tvm_balanced.records import store as records
from tvm_balanced.records.record import Environment, Record
from tvm_balanced.records.store import RecordFolder

TARGET = {"kind": "llvm", "mcpu": "znver3", "num-cores": 2}
BATCH = 4


def record(name: str, number: int) -> Record:
    trace = [[["GetSBlock", [], [f"{name} {number}", "main"], ["b0"]]], []]
    args = [["TENSOR", "float32", [8, 16]]]
    return Record((f"{name} {number % 7}", "YmFzZTY0"), trace, (1e-6,), TARGET, args)


def name_of(got: Record) -> str:
    """The name and the number a record was made with."""
    return str(got.trace[0][0][2][0])


def write(folder: Path, name: str, batches: int | None, finished: int) -> None:
    """Write batches, without end if ``batches`` is None; a byte to ``finished`` for each that is there."""
    environment = Environment("cpu", "a CPU", "llvm", "znver3", "0.27.0", "measured", ({},))
    out = RecordFolder(folder, environment)
    for batch in itertools.count() if batches is None else range(batches):
        out.append([record(name, batch * BATCH + i) for i in range(BATCH)])
        os.write(finished, b".")


def kill(folder: Path, rounds: int) -> None:
    """Kill writers at random moments; nothing that one had finished may be missing."""
    rng = random.Random(0)
    expected: list[str] = []
    for round_ in range(rounds):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            write(folder, f"writer {round_}", None, write_end)
        os.close(write_end)
        os.read(read_end, 1)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # the byte of the first batch was taken
        batches = 1
        while chunk := os.read(read_end, 1 << 16):
            batches += len(chunk)
        os.close(read_end)
        expected += [f"writer {round_} {i}" for i in range(batches * BATCH)]
        got, problems = records.read_folder(folder)
        assert not problems, problems
        names = [name_of(one) for one in got]
        assert len(set(names)) == len(names)
        assert set(expected) <= set(names), round_
        # at most one batch was written and not told of
        assert len(names) <= len(expected) + (round_ + 1) * BATCH
    runs = Environment.read(folder / records.ENVIRONMENT).runs
    assert len(runs) == rounds
    kept = {records.RECORDS, records.WORKLOADS, records.ENVIRONMENT, ".lock"}
    write_end = os.open(os.devnull, os.O_WRONLY)
    write(folder, "the last", 1, write_end)
    # of the killed ones nothing is left beside the files
    assert {path.name for path in folder.iterdir()} == kept


if __name__ == "__main__":
    place, what, *rest = sys.argv[1:]
    if what == "kill":
        kill(Path(place), int(rest[0]))
    else:
        write(Path(place), rest[0], int(rest[1]), sys.stdout.fileno())
