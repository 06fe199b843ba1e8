"""Text to calibrate on: the user's own files as batches of tokens, without padding."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tvm_balanced.errors import InputError
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    import torch

    # as tokenizers of transformers: texts, truncation and max_length to lists of ids
    Tokenizer: TypeAlias = Callable[..., Mapping[str, Sequence[Sequence[int]]]]

# of a sentence: fewest words, and the share of its characters that are letters or blanks
_LEAST_WORDS, _LETTERS = 4, 0.75
# sentences that may begin, or end, with the same words: more are boilerplate
_ALIKE, _WORDS_ALIKE = 12, 4


@dataclass(frozen=True)
class TextBatches:
    """Batches of tokens from text.

    Parameters
    ----------
    batches, held_out : list of tuple of torch.Tensor
        Calls of a model, each ``input_ids`` and ``attention_mask``, (rows, length) int64, all of one
        length and without padding; no sentence of one list is in the other.
    sentences : int
        Sentences in ``batches``.
    tokens : int
        Tokens in ``batches``.
    """

    batches: list[tuple[torch.Tensor, ...]]
    held_out: list[tuple[torch.Tensor, ...]]
    sentences: int
    tokens: int


def text(
    tokenizer: Tokenizer,
    sources: Iterable[str | os.PathLike[str] | Iterable[str]],
    tokens: int = 60_000,
    *,
    longest: int = 64,
    packed: bool = False,
    held_out: float = 0.05,
    batch_tokens: int = 1024,
    seed: int = 0,
) -> TextBatches:
    """Make calibration inputs of text.

    Parameters
    ----------
    tokenizer : callable
        The model's own, as ``transformers.AutoTokenizer`` gives it.
    sources : iterable of path-like or of iterables of str
        Text files in UTF-8, and iterables of texts. Text is cut into sentences; fragments, tables, code
        and what is there already are left out.
    tokens : int
        How many tokens to take; sentences are drawn at random from all sources.
    longest : int
        Most tokens of a row; longer sentences are cut.
    packed : bool
        Whether rows are sentences one after the other, ``longest`` tokens each, as language models are
        trained on, rather than one sentence each.
    held_out : float
        Share of the tokens that is kept apart.
    batch_tokens : int
        Most tokens of a batch.
    seed : int
        Seed of the order.

    Returns
    -------
    TextBatches
        ``batches`` to calibrate by, and ``held_out``.

    Raises
    ------
    InputError
        For a file that is no text, numbers out of range, or sources with no sentence.
    """
    need("torch", "torch", "calibration text")
    if tokens < 1 or longest < 2 or batch_tokens < longest or not 0 <= held_out < 1:
        raise InputError(
            f"tokens={tokens}, longest={longest}, batch_tokens={batch_tokens}, held_out={held_out} were "
            "given; give at least one token, rows of at least two, batches of at least one row, and a share "
            "to hold out below 1"
        )
    chosen = list(_distinct(_sentences(sources)))
    if not chosen:
        raise InputError("the sources hold no whole sentence; give files or lists of plain prose")
    draw = random.Random(seed)
    draw.shuffle(chosen)
    parts: tuple[list[Sequence[int]], list[Sequence[int]]] = ([], [])
    counts, wanted = [0, 0], [tokens, int(tokens * held_out)]
    for start in range(0, len(chosen), 256):
        rows = tokenizer(chosen[start : start + 256], truncation=True, max_length=longest)
        for row in rows["input_ids"]:
            # held out as they come, in proportion, so that few sentences are divided too
            place = int(counts[1] < wanted[1] and counts[1] <= held_out * counts[0])
            parts[place].append(row)
            counts[place] += len(row)
        if counts[0] >= tokens:
            break
    batches, held = (_batches(part, longest, packed, batch_tokens, draw) for part in parts)
    total = sum(ids.numel() for ids, _ in batches)
    return TextBatches(batches, held, len(parts[0]), total)


def _sentences(sources: Iterable[str | os.PathLike[str] | Iterable[str]]) -> Iterator[str]:
    """Whole sentences of prose, cut out of files and texts."""
    for source in sources:
        for body in [_read(Path(source))] if isinstance(source, str | os.PathLike) else source:
            for paragraph in re.split(r"\n\s*\n", body):
                line = " ".join(paragraph.split())
                for sentence in re.split(r"(?<=[.!?])\s+(?=[^\W\d_a-z])", line):
                    if _is_prose(sentence):
                        yield sentence


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as text ({error}); give files of plain text in UTF-8"
        ) from None


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        sentence[-1:] in ".!?"
        and len(sentence.split()) >= _LEAST_WORDS
        and letters >= _LETTERS * len(sentence)
    )


def _distinct(sentences: Iterable[str]) -> Iterator[str]:
    """Leave out what differs in case or punctuation alone, and all but some of those that begin alike."""
    seen: set[str] = set()
    alike: dict[tuple[str, ...], int] = {}
    for sentence in sentences:
        words = re.findall(r"\w+", sentence.lower())
        key = " ".join(words)
        ends = (("", *words[:_WORDS_ALIKE]), tuple(words[-_WORDS_ALIKE:]))
        if key in seen or any(alike.get(end, 0) >= _ALIKE for end in ends):
            continue
        seen.add(key)
        for end in ends:
            alike[end] = alike.get(end, 0) + 1
        yield sentence


def _batches(
    rows: Sequence[Sequence[int]], longest: int, packed: bool, most: int, draw: random.Random
) -> list[tuple[torch.Tensor, ...]]:
    """Rows of one length to each batch, in random order."""
    import torch

    if packed:
        flat = [token for row in rows for token in row]
        rows = [flat[i : i + longest] for i in range(0, len(flat) - longest + 1, longest)]
    lengths: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        lengths.setdefault(len(row), []).append(row)
    batches = []
    for length, group in sorted(lengths.items()):
        size = max(1, most // length)
        for start in range(0, len(group), size):
            ids = torch.tensor(group[start : start + size], dtype=torch.int64)
            batches.append((ids, torch.ones_like(ids)))
    draw.shuffle(batches)
    return batches
