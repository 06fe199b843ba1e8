"""Text to calibrate on: what is kept of it, and how it is laid into batches."""

import pytest
import torch

import tvm_balanced as tb
from tvm_balanced.errors import InputError


def tokenizer(texts, truncation, max_length):
    assert truncation
    rows = [[1, *(sum(map(ord, word)) % 500 + 3 for word in text.split()), 2] for text in texts]
    return {"input_ids": [row[:max_length] for row in rows]}


WORDS = [
    "river",
    "stone",
    "market",
    "winter",
    "garden",
    "letter",
    "engine",
    "village",
    "music",
    "harbour",
    "silver",
    "paper",
]
PROSE = [
    f"{a.capitalize()} and {b} met near the {c} before {d} came home {'again ' * n}today."
    for n, (a, b, c, d) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:], WORDS[3:], strict=False))
]


def rows_of(batches):
    return [tuple(row.tolist()) for ids, _ in batches for row in ids]


def test_sentences_are_cut_cleaned_and_kept_once(tmp_path):
    path = tmp_path / "prose.txt"
    noise = "| a | b |\n\nx = {1: 2}; y[3] = 4.\n\nToo short.\n\nNo end to this line of words"
    path.write_text(f"{PROSE[0]} {PROSE[1]}\n\n{noise}\n\n{PROSE[2].upper()}", encoding="utf-8")
    made = tb.calibration.text(
        tokenizer, [path, [PROSE[2], PROSE[0].replace(" and", ", and")]], held_out=0
    )
    kept = tokenizer([PROSE[0], PROSE[1], PROSE[2].upper()], truncation=True, max_length=64)
    assert sorted(rows_of(made.batches)) == sorted(map(tuple, kept["input_ids"]))
    assert made.sentences == 3 and made.held_out == []
    assert made.tokens == sum(map(len, kept["input_ids"]))


def test_boilerplate_is_left_out():
    made = tb.calibration.text(
        tokenizer,
        [[f"This package contains the files of {'very ' * n}old software." for n in range(40)]],
    )
    assert sum(map(len, (rows_of(made.batches), rows_of(made.held_out)))) == 12


def test_batches_are_of_one_length_and_apart_from_those_held_out():
    made = tb.calibration.text(tokenizer, [PROSE], held_out=0.3, batch_tokens=64)
    train, held = rows_of(made.batches), rows_of(made.held_out)
    assert held and not set(train) & set(held) and len(train) + len(held) == len(PROSE)
    for ids, mask in made.batches:
        assert ids.dtype == torch.int64 and bool((mask == 1).all()) and mask.shape == ids.shape
        assert ids.numel() <= 64
    again = tb.calibration.text(tokenizer, [PROSE], held_out=0.3, batch_tokens=64)
    assert rows_of(again.batches) == train


def test_packed_rows_are_full_and_tokens_bounded():
    made = tb.calibration.text(tokenizer, [PROSE], packed=True, longest=8, held_out=0)
    flat = [token for row in rows_of(made.batches) for token in row]
    assert {ids.shape[1] for ids, _ in made.batches} == {8}
    whole = tokenizer(PROSE, truncation=True, max_length=8)["input_ids"]
    assert len(flat) == sum(map(len, whole)) // 8 * 8 == made.tokens


@pytest.mark.parametrize(
    "change, says",
    [
        ({"sources": [["12 34 56."]]}, "no whole sentence"),
        ({"sources": ["nowhere.txt"]}, "cannot be read as text"),
        ({"tokens": 0}, "at least one token"),
        ({"batch_tokens": 8}, "batches of at least one row"),
    ],
)
def test_refuses(change, says):
    given = {"sources": [PROSE], **change}
    with pytest.raises(InputError, match=says):
        tb.calibration.text(tokenizer, given.pop("sources"), **given)
