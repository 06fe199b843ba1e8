"""Tables and plots of the rows: means, paired differences, intervals."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# what a pattern is compared with, at the same share of zeros
AGAINST = "unstructured"
# test images to training images of a fold: what the corrected interval needs
SHARED = {"MLP": 1 / 4, "CNN": 1 / 4}

Rows = Sequence[dict[str, Any]]
# of a plot: its label, its pattern, and its points
Line = tuple[str, str, list[tuple[float, float]]]


def differences(rows: Rows, against: str = AGAINST) -> list[dict[str, Any]]:
    """Mean of each pattern's score and of its paired differences to ``against``, with 95 % intervals.

    Pairs share task, fold, seed and share of zeros. ``half`` is half of Student's interval, as if runs were
    independent. Folds share training data; ``corrected`` is half of the interval whose variance has
    ``1 / runs + test / training`` in place of ``1 / runs`` (Nadeau and Bengio, "Inference for the
    generalization error", Machine Learning 52, 2003), and equal to ``half`` where there are no folds.
    In points of accuracy; perplexities are compared by their ratio, so there it is in percent.
    """
    from scipy.stats import t

    groups: dict[tuple[str, float, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        if "score" in row:
            group = groups[row["task"], row["sparsity"], row["pattern"]]
            group[row["seed"], row["fold"]] = row["score"]
    got = []
    for (task, sparsity, pattern), scores in sorted(groups.items()):
        base = groups.get((task, sparsity, against), {})
        keys = [key for key in scores if key in base]
        mine = np.array([scores[key] for key in keys])
        theirs = np.array([base[key] for key in keys])
        pairs = 100 * (mine / theirs - 1) if task == "LSTM" else mine - theirs
        row = {"task": task, "sparsity": sparsity, "pattern": pattern, "runs": len(scores)}
        row["score"] = float(np.mean(list(scores.values())))
        if len(pairs) > 1 and pattern != against:
            width = float(t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1))
            row["difference"] = float(pairs.mean())
            row["half"] = width / len(pairs) ** 0.5
            row["corrected"] = width * (1 / len(pairs) + SHARED.get(task, 0)) ** 0.5
        got.append(row)
    return got


def excludes_loss(row: dict[str, Any], kind: str = "corrected") -> bool:
    """Whether the interval excludes a loss of more than 1 point of accuracy, or 2 % of perplexity."""
    if row["task"] == "LSTM":
        return bool(row["difference"] + row[kind] <= 2)
    return bool(row["difference"] - row[kind] >= -1)


def table(got: Rows) -> str:
    """The differences as Markdown, one line a share of zeros and pattern."""
    lines = [
        f"| task | zeros | pattern | runs | score | minus {AGAINST} | corrected | loss excluded, corrected |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in got:
        cells = ["", "", ""]
        if "half" in row:
            verdicts = [
                "yes" if excludes_loss(row, kind) else "no" for kind in ("half", "corrected")
            ]
            unit = " %" if row["task"] == "LSTM" else ""
            cells = [
                f"{row['difference']:+.2f} ± {row['half']:.2f}{unit}",
                f"± {row['corrected']:.2f}",
                ", ".join(verdicts),
            ]
        lines.append(
            f"| {row['task']} | {100 * row['sparsity']:g} % | {row['pattern']} | {row['runs']} | "
            f"{row['score']:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def minilm_table(rows: Rows) -> str:
    """Cosine, its standard error and the rank correlation, per method and pattern."""
    mine = {(row["method"], row["pattern"]): row for row in rows if "cosine" in row}
    patterns = ("8:16", "4:16", "2:16")
    lines = ["| MiniLM | " + " | ".join(patterns) + " |", "|---" * 4 + "|"]
    for method in dict.fromkeys(method for method, _ in mine):
        cells = []
        for pattern in patterns:
            row = mine.get((method, pattern))
            cells.append(
                f"{row['cosine']:.3f} ± {row['error']:.3f} ({row['rank']:.3f})" if row else "-"
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compiled_table(rows: Rows) -> str:
    """Score from PyTorch and from the compiled library."""
    lines = ["| network | zeros | PyTorch | compiled | sparse layers |", "|---" * 5 + "|"]
    lines += [
        f"| {row['task']} | {100 * row['sparsity']:g} % | {row['torch']:.4f} | {row['library']:.4f} | "
        f"{row['sparse_layers']} |"
        for row in rows
        if row.get("kind") == "compiled"
    ]
    return "\n".join(lines)


def speed_table(rows: Rows) -> str:
    """Microseconds of the layer, and how many times faster than dense, per rows of input and pattern."""
    lines = ["| M | zeros | pattern | run by | µs, median (20-80 %) | speedup |", "|---" * 6 + "|"]
    times = [row for row in rows if "us" in row]
    base = {row["rows"]: row["us"] for row in times if row["pattern"] == "dense"}
    lines += [
        f"| {row['rows']} | {100 * row['sparsity']:g} % | {row['pattern']} | {row['runner']} | "
        f"{row['us']:.0f} ({row['p20']:.0f}-{row['p80']:.0f}) | {base[row['rows']] / row['us']:.2f} |"
        for row in times
    ]
    return "\n".join(lines)


def write(rows: Rows, folder: Path) -> None:
    """``table.md``, ``summary.csv``, ``scores.csv`` and plots: ``quality.png``, with times ``speed.png``."""
    got = differences(rows)
    parts = [table(got), compiled_table(rows), minilm_table(rows), speed_table(rows)]
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")
    columns = (
        "task", "sparsity", "pattern", "runs", "score", "difference", "half", "corrected",
    )  # fmt: skip
    _write_csv(folder / "summary.csv", columns, got)
    # what the differences are made of
    scores = [{**row, "score": f"{row['score']:.4f}"} for row in rows if "score" in row]
    _write_csv(
        folder / "scores.csv", ("task", "seed", "fold", "sparsity", "pattern", "score"), scores
    )
    if got:
        plot(got, folder / "quality.png")
        times = [row for row in rows if "us" in row]
        if times:
            plot(got, folder / "speed.png", times)


def _write_csv(path: Path, columns: Sequence[str], rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(got: Rows, path: Path, times: Rows = ()) -> None:
    """Quality, one line a pattern, one panel a task: against zeros, or with ``times`` against speed.

    Speed is that of the layer at the rows of the first of ``times``, in multiples of the compiled dense
    one; patterns that were not timed are left out.
    """
    import matplotlib.pyplot as plt

    names = sorted({row["task"] for row in got})
    patterns = sorted({row["pattern"] for row in got})
    # ten colours in turns: the styles tell those apart that share one
    looks = {
        pattern: {"color": f"C{number}", "linestyle": "-" if number < 10 else "--"}
        for number, pattern in enumerate(patterns)
    }
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4.5), squeeze=False)
    for panel, task in zip(panels[0], names, strict=True):
        rows = [row for row in got if row["task"] == task]
        for label, pattern, points in _speed_lines(rows, times) if times else _lines(rows):
            xs, scores = zip(*points, strict=True)
            panel.plot(xs, scores, marker="o", markersize=4, label=label, **looks[pattern])
        for row in rows:
            if row["pattern"] == "dense":
                panel.axhline(row["score"], color="black", linewidth=0.8, label="dense")
        panel.set(title=task, xlabel="zeros, %")
        if times:
            m = times[0]["rows"]
            panel.set(xlabel=f"speed of a 1024 x 1024 layer at M = {m}, dense = 1", xscale="log")
        panel.set_ylabel("perplexity" if task == "LSTM" else "accuracy, %")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _lines(rows: Rows) -> Iterator[Line]:
    """Scores over per cent of zeros, of the patterns of one task."""
    for pattern in dict.fromkeys(row["pattern"] for row in rows if row["sparsity"] > 0):
        points = [
            (100 * row["sparsity"], row["score"]) for row in rows if row["pattern"] == pattern
        ]
        yield pattern, pattern, points


def _speed_lines(rows: Rows, times: Rows) -> Iterator[Line]:
    """Scores over speed, of the patterns of one task that were timed."""
    mine = [row for row in times if row["rows"] == times[0]["rows"]]
    (dense,) = (row["us"] for row in mine if row["pattern"] == "dense")
    speeds = {(row["pattern"], row["sparsity"]): dense / row["us"] for row in mine}
    runners = {row["pattern"]: row["runner"] for row in mine}
    scores = {(row["pattern"], row["sparsity"]): row["score"] for row in rows}
    for pattern in dict.fromkeys(row["pattern"] for row in rows if row["sparsity"] > 0):
        points = [(speeds[k], scores[k]) for k in scores if k[0] == pattern and k in speeds]
        if points:
            yield f"{pattern} ({runners[pattern]})", pattern, points
