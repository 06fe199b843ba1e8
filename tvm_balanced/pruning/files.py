"""Pruning a file into a file: ``.onnx`` to ``.onnx``, a ``.pt2`` or a checkpoint to ``.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.distillation import seconds_of
from tvm_balanced.pruning.layers import Progress
from tvm_balanced.report import PruningReport
from tvm_balanced.support.files import check_output

if TYPE_CHECKING:
    from tvm_balanced.pruning.inputs import Goal
    from tvm_balanced.pruning.sensitivity import Selection
    from tvm_balanced.support.tensors import Array


@dataclass(frozen=True)
class PrunedFile:
    """What was done, and for calibrated pruning how near the model still is and what was chosen."""

    report: PruningReport
    scores: Mapping[str, float] = field(default_factory=dict)
    selection: Selection | None = None


@dataclass(frozen=True)
class FilePruning:
    """What is to be pruned, how, and where the result goes, checked when it is made.

    ``pattern`` is one for all layers, or what to reach; without ``output`` it is ``SOURCE-pruned`` beside
    the source. Methods other than magnitude, distillation, by steps (``distill``) or time (``budget``), and
    a goal need ``calibration``.

    Raises
    ------
    InputError
        For settings that contradict each other.
    OutputError
        For an output that could not be written.
    """

    source: Path
    pattern: str | Goal | None
    output: Path | None = None
    dry_run: bool = False
    overwrite: bool = False
    ignore: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int | str, ...]] | None = None
    method: str | None = None
    calibration: Path | None = None
    distill: int = 0
    budget: str | None = None
    quantize: str = "none"
    memory: int | None = None
    resume: Path | None = None
    metric: str = "cosine"

    def __post_init__(self) -> None:
        if self.pattern is None:
            raise InputError(
                "there is neither a pattern nor a goal; give --pattern 4:16, or --target-speedup or "
                "--max-loss"
            )
        if isinstance(self.pattern, str):
            BalancedPattern(self.pattern)
        if self.path.suffix != self.suffix:
            raise InputError(
                f"the pruned weights of {self.source} are written as {self.suffix}, but the output is "
                f"{self.path}; name it {self.path.with_suffix(self.suffix)}"
            )
        if self.calibrated and self.calibration is None:
            raise InputError(
                "a method other than magnitude, --distill, --budget and a goal need inputs to look at; give "
                "--calibration FILE"
            )
        if self.distill and self.budget is not None:
            raise InputError("--distill and --budget both say how long to distil; give one of them")
        if self.budget is not None:
            seconds_of(self.budget)
        if self.quantize != "none" and not self.steps:
            raise InputError(
                "--quantize is trained for in a distillation, and there is none; give --budget 10m, or "
                "quantise when compiling alone"
            )
        if self.calibration is not None and not self.calibrated:
            raise InputError(
                "--calibration was given, but pruning by magnitude without --distill looks at no input; "
                "leave --method out, or --calibration"
            )
        if self.calibrated and self.source.suffix in (".onnx", ".safetensors"):
            raise InputError(
                f"calibration runs the model in PyTorch, and {self.source} is no .pt2; export it with "
                "torch.export, or prune it by magnitude"
            )
        if not self.dry_run:
            check_output(self.path, self.overwrite)

    @property
    def suffix(self) -> str:
        """What kind of file is written."""
        known = (".onnx", ".safetensors")
        return self.source.suffix if self.source.suffix in known else ".safetensors"

    @property
    def path(self) -> Path:
        """The file that is written."""
        default = self.source.with_name(f"{self.source.stem}-pruned{self.suffix}")
        return default if self.output is None else self.output

    @property
    def steps(self) -> int | str:
        """Steps or time of distillation, 0 for none."""
        return self.distill if self.budget is None else self.budget

    @property
    def method_used(self) -> str:
        """The method that was given; else reconstruction where there are inputs, and magnitude without."""
        return self.method or ("magnitude" if self.calibration is None else "reconstruct")

    @property
    def calibrated(self) -> bool:
        """Whether the model is run on inputs."""
        goal = not isinstance(self.pattern, str)
        return self.method_used != "magnitude" or bool(self.steps) or goal

    def run(self, progress: Progress) -> PrunedFile:
        """Prune and, unless it is a dry run, write; errors are those of :func:`tvm_balanced.prune`."""
        if self.calibrated:
            return self._calibrated(progress)
        if self.source.suffix == ".safetensors":
            return PrunedFile(self._checkpoint(progress))
        return PrunedFile(self._model(progress))

    def _calibrated(self, progress: Progress) -> PrunedFile:
        from tvm_balanced.pruning.inputs import ProgramPruning, prune_program

        assert self.calibration is not None and self.pattern is not None
        wanted = BalancedPattern(self.pattern) if isinstance(self.pattern, str) else self.pattern
        settings = ProgramPruning(
            self.method_used,
            tuple(self.ignore),
            self.steps,
            self.quantize,
            self.memory,
            self.resume,
            self.metric,
        )
        pruned, scores, selection = prune_program(
            self.source, wanted, self.calibration, settings, progress
        )
        self._write(pruned.params, {}, pruned.patterns)
        return PrunedFile(pruned.pruned, scores, selection)

    def _checkpoint(self, progress: Progress) -> PruningReport:
        from tvm_balanced.frontend import checkpoint
        from tvm_balanced.pruning.magnitude import prune_tensors

        tensors, metadata = checkpoint.read_checkpoint(self.source)
        changed, patterns, report = prune_tensors(tensors, str(self.pattern), self.ignore, progress)
        # what was noted before holds for the weights that stay
        patterns = {**checkpoint.read_patterns(metadata, self.source), **patterns}
        self._write({**tensors, **changed}, metadata, patterns)
        return report

    def _model(self, progress: Progress) -> PruningReport:
        from tvm_balanced.frontend import checkpoint, load_model
        from tvm_balanced.pruning.magnitude import prune_model

        progress("import the model")
        model = load_model(self.source, self.shapes)
        pruned = prune_model(model, str(self.pattern), self.ignore, progress)
        if self.suffix != ".onnx":
            self._write(pruned.params, {}, pruned.patterns)
        elif not self.dry_run:
            new = {n: a for n, a in pruned.params.items() if a is not model.params[n]}
            checkpoint.write_onnx(self.source, self.path, new, self.overwrite)
        return pruned.pruned

    def _write(
        self,
        tensors: Mapping[str, Array],
        metadata: Mapping[str, str],
        patterns: Mapping[str, BalancedPattern],
    ) -> None:
        from tvm_balanced.frontend.checkpoint import write_checkpoint

        if not self.dry_run:
            write_checkpoint(self.path, tensors, metadata, patterns, self.overwrite)
