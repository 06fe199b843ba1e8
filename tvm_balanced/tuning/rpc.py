"""A runner for other machines: TVM's RPC tracker says which servers are free, and each measures a candidate.

Candidates are built here as shared libraries and uploaded. As many are measured at a time as there are
servers of the key. A server that dies takes the candidate it has with it, which is then measured by
another one, once: a candidate may be what killed it.
"""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.tuning.measure import (
    RUN_SECONDS,
    Arguments,
    Feed,
    Known,
    Signature,
    Timer,
    build,
)

if TYPE_CHECKING:
    import tvm
    from tvm.s_tir.meta_schedule.runner import RPCRunner, RunnerInput, RunnerResult


# until a tracker answers
_CONNECT_SECONDS = 5.0

# between two looks at the tracker, and at the candidates, while these are measured
_LOOK_SECONDS = 2.0
_POLL_SECONDS = 0.02

# sessions that a candidate waits for, its own among them, before its process is given up
_SESSIONS = 4

# looks in a row that find no server before the run is given up: one is between two sessions at times
_LOOKS = 3
log = logging.getLogger("tvm_balanced.tuning")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Tracker:
    """Where servers of a key are asked for."""

    host: str
    port: int
    key: str

    @staticmethod
    def parse(address: str | None, key: str | None) -> Tracker:
        """Return the tracker at ``"host:port"``; InputError where one is missing or of another form."""
        if not address or not key:
            raise InputError(
                f"the rpc runner needs a tracker and a key, and was given tracker {address} and key {key}; "
                "give host:port of a tracker and the key its servers were started with"
            )
        match = re.fullmatch(r"(.+):(\d{1,5})", address)
        if match is None or not 0 < int(match[2]) < 1 << 16:
            raise InputError(
                f'the tracker "{address}" is not of the form host:port; give 10.0.0.7:9190'
            )
        if ":" in key:
            raise InputError(
                f'the key "{key}" has a colon, which TVM\'s tracker cannot tell; rename it'
            )
        return Tracker(match[1], int(match[2]), key)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def servers(self) -> int:
        """Servers of the key that are registered, busy ones too; ToolchainError where no tracker answers."""
        from tvm import rpc

        try:
            with socket.create_connection((self.host, self.port), timeout=_CONNECT_SECONDS):
                pass
            session = rpc.connect_tracker(self.host, self.port)
            summary = session.summary()
            session.close()
        except (OSError, RuntimeError) as error:
            raise ToolchainError(
                f"no RPC tracker answers at {self} ({error}); start one with "
                f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {self.port}"
            ) from error
        return sum(server["key"] == f"server:{self.key}" for server in summary["server_info"])

    def no_server(self) -> ToolchainError:
        """Return what to say where no server of the key is left."""
        return ToolchainError(
            f'the tracker at {self} has no server of key "{self.key}"; start one on each device with '
            f"python -m tvm.exec.rpc_server --tracker {self} --key {self.key}, then go on with resume"
        )


def _without_session(call: Callable[..., _Answer], _session: object, *given: object) -> _Answer:
    """Call what the local runner would: TVM's RPC runner gives the session too."""
    return call(*given)


def make_shared(mod: tvm.IRModule, target: tvm.target.Target) -> str:
    """Build a candidate as a shared library, alone in a folder; its path."""
    folder = Path(tempfile.mkdtemp(prefix="tvm-balanced-"))
    # a server loads many libraries; none is taken for another
    path = folder / f"{folder.name}.so"
    build(mod, target).export_library(str(path))
    return str(path)


class RpcRunner:
    """Measures candidates on the servers of a tracker; ToolchainError where none is left."""

    def __init__(self, tracker: Tracker, feeds: Mapping[Signature, Feed], cache: str) -> None:
        self.tracker = tracker
        self._feeds, self._cache = feeds, cache
        self._servers = self._workers = 0
        self._runner: RPCRunner | None = None
        if not self._look():
            raise tracker.no_server()

    def _look(self) -> int:
        """How many servers there are; all of them are used from now on."""
        count = self.tracker.servers()
        if count < self._servers:
            log.warning("%d of %d RPC servers are left", count, self._servers)
        if count > self._workers:
            self._open(count)
        self._servers = count
        return count

    def _open(self, workers: int) -> None:
        from tvm.s_tir import meta_schedule as ms
        from tvm.support.popen_pool import PopenPoolExecutor

        self.close()
        runner = ms.runner.RPCRunner(
            rpc_config=ms.runner.RPCConfig(
                tracker_host=self.tracker.host,
                tracker_port=self.tracker.port,
                tracker_key=self.tracker.key,
                session_timeout_sec=int(RUN_SECONDS),
            ),
            f_alloc_argument=partial(_without_session, Arguments(self._feeds, self._cache)),
            # the server empties its caches
            f_run_evaluator=partial(_without_session, Timer(self._cache)),
        )
        runner.pool.shutdown()
        # TVM's own pool waits for ever for a server that no longer answers
        runner.pool = PopenPoolExecutor(
            max_workers=workers, timeout=_SESSIONS * RUN_SECONDS, stderr=subprocess.DEVNULL
        )
        self._runner, self._workers = runner, workers

    def run(self, inputs: Sequence[RunnerInput]) -> list[Known]:
        """One result for each of MetaSchedule's runner inputs, in order."""
        if not self._look():
            raise self.tracker.no_server()
        before = self._servers
        results = self._measure(inputs)
        lost = [i for i, result in enumerate(results) if result.error_msg is not None]
        if lost and self._look() < before:
            if not self._servers:
                raise self.tracker.no_server()
            for i, result in zip(lost, self._measure([inputs[i] for i in lost]), strict=True):
                results[i] = result
            self._look()
        return [Known(result) for result in results]

    def _measure(self, inputs: Sequence[RunnerInput]) -> list[RunnerResult]:
        assert self._runner is not None  # whoever measures has looked
        futures = self._runner.run(list(inputs))
        missing, looked = 0, time.monotonic()
        while not all(future.done() for future in futures):
            time.sleep(_POLL_SECONDS)
            if time.monotonic() < looked + _LOOK_SECONDS:
                continue
            looked = time.monotonic()
            # what waits for a server would do so until its time is over
            missing = 0 if self.tracker.servers() else missing + 1
            if missing == _LOOKS:
                self.close()
                raise self.tracker.no_server()
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the processes that talk to servers."""
        if self._runner is not None:
            self._runner.pool.shutdown(wait=False)
        self._runner, self._workers = None, 0
