"""Damaged files: each must end in a result or in one of our errors, in one sentence.

Whole samples of every kind (``corpus.py``) are damaged by seeded mutations and opened in a worker process,
so that a crash of native code and a hang are seen and known by the file that caused them::

    python -m tests.fuzz.damage --count 2000 --seed 0
    python -m tests.fuzz.damage --seed 0 --only pt2/17 --keep damaged/
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import click

from tests.fuzz.corpus import KINDS, Kind
from tvm_balanced.errors import TvmBalancedError

HANG_SECONDS = 20.0
_START_SECONDS = (
    300.0  # a worker imports PyTorch and TVM first, and the first one makes the samples
)
_END_SECONDS = 10.0
_MEMORY = 16 << 30  # of address space: a size that was damaged must not take the machine's memory
_LONGEST = 600  # characters of a sentence
_INTERNALS = re.compile(
    r"Traceback|Check failed|InternalError|PytorchStreamReader|enforce fail|<class '|File \""
    r"|\.(cc|cpp|h|py):\d+|\b0x[0-9a-fA-F]{6,}"
)


def damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One mutation of a file's bytes, and what it was in a few words."""
    size = len(data)
    start, stop = sorted(rng.sample(range(size + 1), 2)) if size else (0, 0)
    # stretches are short: one of half the file is found out at once
    stop = min(stop, start + rng.choice((1, 4, 16, 64, 4096)))
    action = rng.choice(("truncate", "flip", "flip", "swap", "duplicate"))
    if action == "truncate":
        kept = rng.choice((start, max(0, size - rng.randint(1, 64))))
        return data[:kept], f"cut to {kept} of {size} bytes"
    if action == "duplicate":
        return data[:stop] + data[start:stop] + data[stop:], f"bytes {start}:{stop} twice"
    changed = bytearray(data)
    if action == "swap":
        length = stop - start
        other = rng.randint(0, size - length)
        if min(start, other) + length > max(start, other):
            length = abs(start - other)
        first, second = data[start : start + length], data[other : other + length]
        changed[start : start + length], changed[other : other + length] = second, first
        return bytes(changed), f"{length} bytes at {start} and {other} swapped"
    places = [rng.randrange(size) for _ in range(rng.choice((1, 1, 2, 8)))] if size else []
    for place in places:
        # a single bit leaves text text, and a number a number
        changed[place] ^= rng.choice((1 << rng.randrange(8), rng.randint(1, 255)))
    return bytes(changed), f"flipped at {', '.join(map(str, places))}"


def sentence_fault(text: str) -> str | None:
    """Why a message is not one clear sentence; None where it is."""
    if not text.isprintable():
        return "line breaks or unprintable characters"
    if len(text) > _LONGEST:
        return f"{len(text)} characters"
    match = _INTERNALS.search(text)
    return None if match is None else f"internals ({match[0]})"


@dataclass(frozen=True)
class Outcome:
    """How one damaged file ended.

    Attributes
    ----------
    key : str
        ``"pt2/17"``: kind and number, from which with the seed the damage follows.
    verdict : str
        ``"result"`` or ``"refused"``; else what failed: ``"raw error"``, ``"no sentence"``, ``"wrong"``,
        ``"crash"``, ``"hang"``.
    what : str
        The file and what was done to it.
    text : str
        What was raised; for a crash the end of what the process printed.
    """

    key: str
    verdict: str
    what: str = ""
    text: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ended in anything but a result or one of our errors."""
        return self.verdict not in ("result", "refused")


def spoil(whole: Path, copy: Path, key: str, seed: int) -> tuple[Path, str]:
    """Copy a kind's samples to ``copy`` and damage a file; the damaged sample and what was done to it."""
    rng = random.Random(f"{seed}/{key}")
    kind = key.partition("/")[0]
    sample = rng.choice(sorted(path.name for path in (whole / kind).iterdir()))
    shutil.copytree(whole / kind / sample, copy / sample)
    files = sorted(path for path in (copy / sample).rglob("*") if path.is_file())
    file = rng.choice(files)
    before = file.read_bytes()
    after, done = damage(before, rng)
    file.write_bytes(after)
    unchanged = " (unchanged)" if after == before else ""
    return copy / sample, f"{file.relative_to(copy)}: {done}{unchanged}"


def _judge(kind: Kind, damaged: Path, whole: Path, number: int) -> tuple[str, str]:
    try:
        kind.use(damaged, whole, number)
    except TvmBalancedError as error:
        text = str(error)
        fault = sentence_fault(text)
        return ("refused", text) if fault is None else ("no sentence", f"{fault}: {text}")
    except AssertionError as error:
        return "wrong", str(error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "tvm_balanced" in f.filename] or list(frames)
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "raw error", f"{type(error).__name__}: {error} (from {where})"
    return "result", ""


def _work(
    pipe: Connection, kinds: Mapping[str, Kind], whole: Path, seed: int, keep: Path | None
) -> None:
    """The worker: makes the samples that are not there, then opens one damaged file an order."""
    printed = os.open(whole / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    for name, kind in kinds.items():
        if not (whole / name).exists():
            part = whole / f".{name}"
            part.mkdir()
            kind.make(part)
            part.rename(whole / name)
    # whole samples must do: else every damage would be refused for another reason than the damage
    for name, kind in kinds.items():
        for sample in sorted((whole / name).iterdir()):
            for number in range(6):
                with tempfile.TemporaryDirectory() as place:
                    copy = Path(shutil.copytree(sample, Path(place) / sample.name))
                    verdict, text = _judge(kind, copy, sample, number)
                assert verdict == ("result" if name != "safetensors" else verdict), (name, text)
    pipe.send("ready")
    while (key := pipe.recv()) is not None:
        name, _, number = key.partition("/")
        os.ftruncate(printed, 0)
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "damaged" if keep is None else keep / key.replace("/", "-")
            copy.mkdir(parents=True)
            damaged, what = spoil(whole, copy, key, seed)
            pipe.send(what)
            verdict, text = _judge(kinds[name], damaged, whole / name / damaged.name, int(number))
        pipe.send(Outcome(key, verdict, what, text))


@contextlib.contextmanager
def _worker(*arguments: object) -> Iterator[tuple[multiprocessing.Process, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(_END_SECONDS)
        process.kill()
        process.join()
        ours.close()


def run(
    keys: Sequence[str],
    seed: int,
    kinds: Mapping[str, Kind] = KINDS,
    *,
    keep: Path | None = None,
    seconds: float = HANG_SECONDS,
) -> Iterator[Outcome]:
    """Open damaged files one after the other, in as many worker processes as it takes.

    Parameters
    ----------
    keys : sequence of str
        ``"pt2/17"``: kind and number of each.
    seed : int
        Seed that all of the damage follows from, together with the keys.
    kinds : mapping of str to Kind
        Kinds by name.
    keep : pathlib.Path, optional
        Folder where the damaged samples stay; nothing stays where it is left out.
    seconds : float
        Time after which a file hangs.

    Yields
    ------
    Outcome
        One a key, in order.

    Raises
    ------
    RuntimeError
        When a worker does not start, or a whole sample is refused.
    """
    left = list(keys)
    with tempfile.TemporaryDirectory(prefix="tvm-balanced-damage-") as place:
        whole = Path(place)
        while left:
            used = {
                name: kinds[name] for name in kinds if any(k.startswith(name + "/") for k in keys)
            }
            with _worker(used, whole, seed, keep) as (process, pipe):
                if not pipe.poll(_START_SECONDS) or _receive(pipe) != "ready":
                    raise RuntimeError(f"the worker did not start:\n{_printed(whole)}")
                while left:
                    outcome = _one(process, pipe, left.pop(0), whole, seconds)
                    yield outcome
                    if outcome.verdict in ("crash", "hang"):
                        break


def _one(
    process: multiprocessing.Process, pipe: Connection, key: str, whole: Path, seconds: float
) -> Outcome:
    pipe.send(key)
    what = ""
    end = time.monotonic() + seconds
    while pipe.poll(max(0.0, end - time.monotonic())):
        answer = _receive(pipe)
        if isinstance(answer, Outcome):
            return answer
        if answer is None:
            process.join()
            number = -(process.exitcode or 0)
            ended = signal.Signals(number).name if number > 0 else f"exit code {-number}"
            return Outcome(key, "crash", what, f"{ended}: {_printed(whole)}")
        what = str(answer)
    os.kill(process.pid or 0, signal.SIGABRT)  # faulthandler prints where it is
    process.join(_END_SECONDS)
    process.kill()
    return Outcome(key, "hang", what, f"over {seconds:g} s: {_printed(whole)}")


def _receive(pipe: Connection) -> object:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _printed(whole: Path) -> str:
    with contextlib.suppress(OSError):
        return (whole / "printed").read_text(errors="replace")[-2000:]
    return ""


def keys(count: int, kinds: Sequence[str]) -> list[str]:
    """``count`` keys, as many of each kind."""
    return [f"{kinds[i % len(kinds)]}/{i // len(kinds)}" for i in range(count)]


def table(outcomes: Sequence[Outcome]) -> str:
    """Outcomes of each kind, counted."""
    verdicts = ("result", "refused", "raw error", "no sentence", "wrong", "crash", "hang")
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.key.partition("/")[0], Counter())[outcome.verdict] += 1
    rows = [f"{'kind':12}" + "".join(f"{verdict:>13}" for verdict in verdicts)]
    rows += [
        f"{kind:12}" + "".join(f"{count[verdict]:13}" for verdict in verdicts)
        for kind, count in sorted(counts.items())
    ]
    return "\n".join(rows)


@click.command()
@click.option(
    "--count", default=2000, show_default=True, help="Damaged files, of all kinds together."
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--kind", "names", multiple=True, type=click.Choice(list(KINDS)), help="All if not given."
)
@click.option("--only", multiple=True, metavar="KIND/NUMBER", help="These alone.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Leave the damaged samples in a folder."
)
@click.option("-v", "--verbose", is_flag=True, help="Print every outcome.")
def main(
    count: int,
    seed: int,
    names: tuple[str, ...],
    only: tuple[str, ...],
    keep: Path | None,
    verbose: bool,
) -> None:
    """Open damaged files; ends with 1 where one ended in anything but a result or one of our errors."""
    outcomes = []
    for outcome in run(only or keys(count, names or list(KINDS)), seed, keep=keep):
        outcomes.append(outcome)
        if outcome.failed or verbose:
            click.echo(
                f"{outcome.verdict}: --seed {seed} --only {outcome.key}, {outcome.what}\n"
                f"    {outcome.text}"
            )
    click.echo(table(outcomes))
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
