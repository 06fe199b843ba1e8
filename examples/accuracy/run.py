"""Train, prune and compare: ``python -m examples.accuracy.run --task MLP -o build/accuracy``.

Rows go to ``rows.jsonl`` as they come, the paired differences to ``table.txt``, and quality against the share
of zeros to ``quality.png`` where Matplotlib is installed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from examples.accuracy import tasks

SPARSITIES = (0.5, 0.75, 0.875, 0.9375)
# what a pattern is compared with, at the same share of zeros
AGAINST = "unstructured"


def differences(rows: Sequence[dict[str, Any]], against: str = AGAINST) -> list[dict[str, Any]]:
    """Mean of each pattern's score and of its paired differences to ``against``, with 95 % intervals.

    Pairs share task, fold, seed and share of zeros. The interval is Student's; folds share training data,
    so it is narrower than that of independent runs would be.
    """
    from scipy.stats import t

    groups: dict[tuple[str, float, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        groups[row["task"], row["sparsity"], row["pattern"]][row["seed"], row["fold"]] = row[
            "score"
        ]
    found = []
    for (task, sparsity, pattern), scores in sorted(groups.items()):
        base = groups.get((task, sparsity, against), {})
        pairs = np.array([scores[key] - base[key] for key in scores if key in base])
        row = {"task": task, "sparsity": sparsity, "pattern": pattern, "runs": len(scores)}
        row["score"] = float(np.mean(list(scores.values())))
        if len(pairs) > 1 and pattern != against:
            half = t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / len(pairs) ** 0.5
            row |= {"difference": float(pairs.mean()), "half": float(half)}
        found.append(row)
    return found


def table(found: Iterable[dict[str, Any]]) -> str:
    """The differences as text, one line a pattern."""
    lines = [
        f"{'task':5} {'zeros':>7} {'pattern':14} {'runs':>4} {'score':>8}  minus {AGAINST}, 95 %"
    ]
    for row in found:
        shown = f"{row['difference']:+.2f} ± {row['half']:.2f}" if "half" in row else ""
        lines.append(
            f"{row['task']:5} {row['sparsity']:7.2%} {row['pattern']:14} {row['runs']:4} "
            f"{row['score']:8.2f}  {shown}"
        )
    return "\n".join(lines)


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality against zeros, one line a pattern, one panel a task."""
    import matplotlib.pyplot as plt

    names = sorted({row["task"] for row in found})
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for panel, task in zip(panels[0], names, strict=True):
        mine = [row for row in found if row["task"] == task]
        for pattern in dict.fromkeys(row["pattern"] for row in mine if row["sparsity"] > 0):
            points = [(100 * r["sparsity"], r["score"]) for r in mine if r["pattern"] == pattern]
            panel.plot(*zip(*points, strict=True), marker="o", label=pattern)
        for row in mine:
            if row["pattern"] == "dense":
                panel.axhline(row["score"], color="black", linewidth=0.8, label="dense")
        panel.set(title=task, xlabel="zeros, %")
        panel.set_ylabel("perplexity" if task == "LSTM" else "accuracy, %")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command()
@click.option("--task", "names", multiple=True, type=click.Choice(["MLP", "CNN", "LSTM"]))
@click.option("--seeds", default=5, show_default=True, help="Of each fold.")
@click.option("-o", "--output", default="build/accuracy", show_default=True)
def main(names: tuple[str, ...], seeds: int, output: str) -> None:
    """Compare patterns of zeros on small trained tasks."""
    torch.set_num_threads(1)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with (folder / "rows.jsonl").open("w") as file:
        for name in names or ("MLP", "CNN", "LSTM"):
            work = (
                tasks.characters(click.echo, SPARSITIES, seeds)
                if name == "LSTM"
                else tasks.digits(click.echo, name, SPARSITIES, seeds)
            )
            for row in work:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    found = differences(rows)
    (folder / "table.txt").write_text(table(found) + "\n")
    plot(found, folder / "quality.png")
    click.echo(table(found))


if __name__ == "__main__":
    main()
