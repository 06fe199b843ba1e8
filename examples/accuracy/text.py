"""Text at hand: sentences of the repository, and English that ships with Python."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

PAIRS = Path(__file__).with_name("sentences.txt")

_SUBJECTS = (
    "The teacher", "A young engineer", "My neighbour", "The captain of the ship", "A group of tourists",
    "The minister", "An old farmer", "The nurse", "A journalist", "The owner of the shop",
    "Every student", "The research team", "A stray dog", "The orchestra", "The new customer",
)  # fmt: skip
_VERBS = (
    "looked for", "talked about", "repaired", "forgot", "described", "bought", "was afraid of",
    "paid too much for", "took a photograph of", "wrote a letter about", "carried", "complained about",
)  # fmt: skip
_OBJECTS = (
    "a broken bicycle", "the price of bread", "an ancient map", "the weather in spring",
    "a letter from the bank", "the new hospital", "two baskets of apples", "a computer program",
    "the results of the election", "a lost umbrella", "the bridge across the river",
    "a book on astronomy", "the football match", "an electric car", "the recipe of the soup",
)  # fmt: skip
_ENDS = (
    "before breakfast", "in the middle of the night", "while it was raining", "at the station",
    "for the first time in years", "without telling anybody", "on the way to work", "last winter",
)  # fmt: skip


def triples() -> list[tuple[str, str, str]]:
    """A sentence, a paraphrase and another one on the same subject, of ``sentences.txt``."""
    lines = [line for line in PAIRS.read_text().splitlines() if not line.startswith("#")]
    groups = [group.split("\n") for group in "\n".join(lines).strip().split("\n\n")]
    return [(a, b, c) for a, b, c in groups]


def calibration_sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences that share nothing with :func:`triples`: half templates, half Python's own docstrings."""
    draw = random.Random(seed)
    made = set()
    while len(made) < count // 2:
        parts = (draw.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
        made.add(" ".join(parts) + ".")
    read = sorted(set(_docstrings()))
    chosen = sorted(made) + draw.sample(read, count - len(made))
    draw.shuffle(chosen)
    return chosen


def varied_sentences(count: int, words: Sequence[str], seed: int = 0) -> list[str]:
    """Sentences of the kind of :func:`calibration_sentences`, a third of the words drawn from ``words``.

    They mean nothing, but a model that learns to answer as another one does sees far more of its vocabulary.
    One in four is left as it is.
    """
    draw = random.Random(seed)
    read = sorted(set(_docstrings()))
    tested = {sentence for triple in triples() for sentence in triple}
    found: dict[str, None] = {}
    while len(found) < count:
        if draw.random() < 0.5:
            sentence = draw.choice(read)
        else:
            parts = (draw.choice(kind) for kind in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
            sentence = " ".join(parts) + "."
        if draw.random() < 0.75:
            sentence = " ".join(
                draw.choice(words) if draw.random() < 1 / 3 else word for word in sentence.split()
            )
        if sentence not in tested:
            found[sentence] = None
    return list(found)


def library_text(size: int) -> str:
    """The first ``size`` characters of the prose in Python's standard library, in a fixed order."""
    found: dict[str, None] = {}
    length = 0
    for sentence in _docstrings():
        if sentence not in found:
            found[sentence] = None
            length += len(sentence) + 1
            if length > size:
                break
    return " ".join(found)[:size]


def _docstrings() -> Iterator[str]:
    """Sentences of docstrings in the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if "site-packages" in path.parts or path.parent.name in ("test", "idlelib", "lib2to3"):
            continue
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                for sentence in re.findall(r"[A-Z][^.?!]{25,110}[.?!](?=\s|$)", text):
                    if re.fullmatch(r"[A-Za-z0-9 ,;:'()?!.-]+", sentence):
                        yield sentence
