"""``CompileOptions``: normalised and checked once, and through JSON and the command line and back."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest

from tvm_balanced.cli.options import KNOBS, Request, options_words, requesting
from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import BITMAP
from tvm_balanced.format.layout import ENCODINGS as INDEX_BITS
from tvm_balanced.options import ENCODINGS, CompileKeywords, CompileOptions, make_options

FULL = CompileOptions(
    policy={"re:.*": "never", "fc 1": "always"},
    quantize={"re:.*": "int8", "fc 1": "none"},
    ignore=["re:head.*", "out"],
    buckets={"batch": [8, 1, 8]},
    encoding="u4",
    dense="cublas",
    cuda_graph=False,
    logs=Path("records"),
    dump_ir="ir",
)


def test_values_are_brought_into_one_form():
    assert FULL.ignore == ("re:head.*", "out")
    assert (FULL.dimension, FULL.sizes) == ("batch", (1, 8))
    assert (FULL.logs, FULL.record_folder) == ("records", "records")
    assert CompileOptions(ignore="out").ignore == ("out",)
    assert CompileOptions(buckets=np.array([4, 2])).sizes == (2, 4)
    assert CompileOptions(buckets=[]) == CompileOptions(buckets={}) == CompileOptions()
    assert CompileOptions(logs=False).record_folder is None
    with pytest.raises(FrozenInstanceError):
        FULL.dense = "dlight"


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"policy": "maybe"}, 'policy "maybe" is not known; choose auto, always or never'),
        ({"policy": {"fc": "maybe"}}, 'policy for layer fc "maybe" is not known'),
        ({"policy": 3}, "policy is a int, expected a string or a mapping"),
        ({"quantize": "int7"}, 'quantize "int7" is not known; choose none, int8 or w8'),
        ({"quantize": {"fc": "fp8"}}, 'quantize for layer fc "fp8" is not known'),
        ({"ignore": [3]}, "ignore holds 3, expected names of layers"),
        ({"buckets": [0]}, "hold a size below 1"),
        ({"buckets": [True]}, "hold a size below 1"),
        ({"buckets": [1.5]}, "are not whole numbers"),
        ({"buckets": "1,8"}, "are not whole numbers"),
        ({"buckets": 8.0}, "are not whole numbers"),
        ({"buckets": {"a": [1], "b": [2]}}, "give them for one dimension"),
        ({"encoding": "u5"}, "choose auto, u8, u4, u3, u2 or bitmap"),
        ({"dense": "cudnn"}, 'dense "cudnn" is not known; choose dlight or cublas'),
        ({"cuda_graph": "no"}, "cuda_graph is 'no', expected True or False"),
        ({"logs": True}, "logs is True; give a folder, or leave it out, or False for none"),
        ({"dump_ir": ""}, "dump_ir is ''; give a folder, or leave it out"),
        ({"polcy": "auto"}, 'there is no option "polcy"; did you mean policy?'),
        ({"threads": 3}, 'there is no option "threads"; choose among policy, ignore'),
    ],
    ids=str,
)
def test_what_no_compilation_can_take_is_named_in_one_sentence(keywords, says):
    with pytest.raises(InputError, match=re.escape(says)) as error:
        make_options(None, **keywords)
    assert "\n" not in str(error.value)


def test_an_object_or_keywords_but_not_both():
    assert make_options(FULL) is FULL
    assert make_options(None, policy="never") == CompileOptions(policy="never")
    with pytest.raises(InputError, match="options and also policy were given"):
        make_options(FULL, policy="never")
    with pytest.raises(InputError, match="options is a dict, expected CompileOptions"):
        make_options({"policy": "never"})


@pytest.mark.parametrize("options", [CompileOptions(), CompileOptions(logs=False), FULL], ids=str)
def test_through_json_and_back(options):
    import json

    assert CompileOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


@pytest.mark.parametrize(
    "options",
    [
        CompileOptions(),
        CompileOptions(policy="always", buckets=[8, 1], encoding="bitmap", logs=False),
        FULL,
    ],
    ids=str,
)
def test_through_a_command_line_and_back(options):
    """What ``inspect`` prints makes the same options again."""
    import click

    asked = []

    @click.command()
    @requesting("...")
    def command(request: Request) -> None:
        asked.append(request)

    command.main(["m.onnx", *options_words(options)], standalone_mode=False)
    assert asked == [Request("m.onnx", (), "llvm", None, options)]


def test_every_list_of_the_fields_is_whole():
    names = [field.name for field in fields(CompileOptions)]
    assert names == list(CompileKeywords.__annotations__) == list(KNOBS)
    assert set(ENCODINGS) == {"auto", BITMAP, *INDEX_BITS}
