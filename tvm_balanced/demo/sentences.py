"""English at hand to calibrate by: templates, and the docstrings that ship with Python."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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


def made_sentence(draw: random.Random) -> str:
    """Return a sentence of four parts, one of some twenty thousand."""
    parts = (draw.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
    return " ".join(parts) + "."


def calibration_sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` different sentences, half of them made from templates, half of Python's own docstrings."""
    draw = random.Random(seed)
    made: set[str] = set()
    while len(made) < count // 2:
        made.add(made_sentence(draw))
    read = sorted(set(docstring_sentences()))
    chosen = sorted(made) + draw.sample(read, count - len(made))
    draw.shuffle(chosen)
    return chosen


def docstring_sentences() -> Iterator[str]:
    """Sentences of docstrings in the standard library, file by file."""
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
