"""Text at hand: sentences of the repository, and English that ships with Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tvm_balanced.demo.sentences import docstring_sentences, made_sentence

PAIRS = Path(__file__).with_name("sentences.txt")


def triples() -> list[tuple[str, str, str]]:
    """A sentence, a paraphrase and another one on the same subject, of ``sentences.txt``."""
    lines = [line for line in PAIRS.read_text().splitlines() if not line.startswith("#")]
    groups = [group.split("\n") for group in "\n".join(lines).strip().split("\n\n")]
    return [(a, b, c) for a, b, c in groups]


def varied_sentences(count: int, words: Sequence[str], seed: int = 0) -> list[str]:
    """Sentences such as those of ``calibration_sentences``, a third of the words drawn from ``words``.

    They mean nothing, but a model that learns to answer as another one does sees far more of its vocabulary.
    One in four is left as it is.
    """
    draw = random.Random(seed)
    read = sorted(set(docstring_sentences()))
    tested = {sentence for triple in triples() for sentence in triple}
    got: dict[str, None] = {}
    while len(got) < count:
        if draw.random() < 0.5:
            sentence = draw.choice(read)
        else:
            sentence = made_sentence(draw)
        if draw.random() < 0.75:
            sentence = " ".join(
                draw.choice(words) if draw.random() < 1 / 3 else word for word in sentence.split()
            )
        if sentence not in tested:
            got[sentence] = None
    return list(got)


def library_text(size: int) -> str:
    """The first ``size`` characters of the prose in Python's standard library, in a fixed order."""
    got: dict[str, None] = {}
    length = 0
    for sentence in docstring_sentences():
        if sentence not in got:
            got[sentence] = None
            length += len(sentence) + 1
            if length > size:
                break
    return " ".join(got)[:size]
