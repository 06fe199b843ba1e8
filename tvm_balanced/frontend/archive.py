"""Files from elsewhere: what may be opened at all, and ``.pt2`` archives that cannot run code.

``torch.export.load`` trusts its file. It unpickles sample inputs, constants and weights in full where the
safe way fails, evaluates symbolic sizes as Python, looks operators up by any dotted name below ``torch``
(``torch.os.system``) and calls them when the program is decomposed, and loads compiled libraries. So every
member is looked at first, through the reader that PyTorch itself uses, and what is not plain data is
refused; and while PyTorch opens the file, an audit hook refuses every global that a pickle asks for beyond
the few that rebuild tensors.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickletools
import re
import sys
import threading
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.support.optional import first_line, need, printable

if TYPE_CHECKING:
    import torch
    from torch.export.pt2_archive import PT2ArchiveReader


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# globals that a pickle of tensors, and containers of them, needs
_TENSOR_GLOBALS = _words(
    "collections.OrderedDict torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 "
    "torch._utils._rebuild_parameter torch._tensor._rebuild_from_type_v2 torch.nn.parameter.Parameter "
    "torch.Tensor torch.Size torch.device torch.storage.UntypedStorage torch.serialization._get_layout "
    "torch.float32 torch.float64 torch.float16 torch.bfloat16 torch.int64 torch.int32 torch.int16 "
    "torch.int8 torch.uint8 torch.bool torch.FloatStorage torch.DoubleStorage torch.HalfStorage "
    "torch.BFloat16Storage torch.LongStorage torch.IntStorage torch.ShortStorage torch.CharStorage "
    "torch.ByteStorage torch.BoolStorage"
)
_NAMESPACES = _words("aten prim prims higher_order quantized_decomposed")
_UNSAFE_OPERATORS = frozenset(["from_file"])  # opens, and can create, files
_PYTHON_OPERATORS = _words(
    "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ getitem lshift "
    "rshift invert index"
)
_MATH_FUNCTIONS = _words(
    "trunc ceil floor sqrt pow exp log log2 cos sin tan acos asin atan cosh sinh tanh fabs"
)
_SYM_FUNCTIONS = re.compile(r"torch\.(_sym_\w+|sym_\w+)\Z")
_SYMPY_FUNCTIONS = _words(
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift "
    "PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat "
    "Identity Max Min Abs Add Mul Pow Symbol Integer Float Rational Eq Ne Lt Le Gt Ge Equality Unequality "
    "StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not "
    "IsNonOverlappingAndDenseIndicator"
)
_SYMBOL_OR_NUMBER = re.compile(r"([a-z]{1,2}\d+|-?\d+(\.\d*)?(e[+-]?\d+)?)\Z")
_SYMPY_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.Name,
    ast.Constant, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
# how PyTorch's reader of archives, as opposed to what it reads, begins its errors
_OF_THE_ARCHIVE = re.compile(r"PytorchStreamReader|enforce fail at inline_container")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# containers that inputs and outputs may be made of
_CONTAINERS = _words("builtins.tuple builtins.list builtins.dict collections.OrderedDict")

_watched = threading.local()  # .active while an archive is being opened in this thread
_hook_lock = threading.Lock()
_hook_installed = False


def read_head(path: str | os.PathLike[str], size: int = 16) -> bytes:
    """Return the first bytes of a file.

    Raises InputError when it is not there, not a file, not readable or empty.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(size)
    except OSError as error:
        raise InputError(
            f"cannot read {os.fspath(path)}: {error.strerror or error}; give the path of a readable file"
        ) from None
    if not head:
        raise InputError(f"{os.fspath(path)} is empty; export the model again")
    return head


def refuse_pickle(path: str | os.PathLike[str], head: bytes, expected: str) -> None:
    """Refuse files of ``torch.save`` and ``pickle``.

    Raises InputError when ``head``, the file's first bytes, or its zip directory are a pickle's.
    """
    pickled = head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5
    if head[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        # whatever is wrong with its directory: who opens the archive says so
        except Exception:
            names = []
        pickled = any(n.count("/") == 1 and n.endswith("/data.pkl") for n in names)
    if pickled:
        raise InputError(
            f"{os.fspath(path)} is a pickle (torch.save), which can run code when it is opened, expected "
            f"{expected}; save it with torch.export.save, as ONNX, or give the module itself"
        )


def load_exported(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Open a ``.pt2`` archive of PyTorch 2.9 or newer whose members were found to be whole, plain data.

    Raises InputError when the file is not readable, not such an archive, truncated, damaged, or could
    run code, and ToolchainError when PyTorch is not installed.
    """
    path = os.fspath(path)
    need("torch", "torch", "opening a .pt2 file")
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2

    head = read_head(path)
    refuse_pickle(path, head, "a .pt2 archive of torch.export.save")
    if head[:4] != b"PK\x03\x04":
        raise InputError(
            f"{path} is not a .pt2 archive; write one with torch.export.save(program, path)"
        )
    try:
        reader = PT2ArchiveReader(path)
        members = reader.get_file_names()
        _check_sums(path)
        _check_archive(path, reader, members)
    except InputError:
        raise
    # names that are no text, JSON of another form: damage fails in many ways
    except Exception as error:
        raise _damaged(path) from error
    with _PickleWatch():
        try:
            # by a file object no library path could be resolved from the name
            with open(path, "rb") as file:
                contents = load_pt2(file)
            return contents.exported_programs["model"]
        except InputError:
            raise
        except Exception as error:
            refused = getattr(_watched, "refused", None)
            if refused is not None:
                raise _unsafe(path, f"it asks for the Python global {refused}") from None
            if isinstance(error, UnicodeDecodeError) or _OF_THE_ARCHIVE.search(str(error)):
                raise _damaged(path) from error
            raise InputError(
                f"{path} cannot be opened as an exported program ({first_line(error)}); it may be damaged "
                "or from another version of PyTorch: export the model again"
            ) from error


def _damaged(path: str) -> InputError:
    return InputError(
        f"{path} is not a whole .pt2 archive; it may be truncated or damaged, or written before PyTorch "
        "2.9: copy it or export the model again"
    )


def _damaged_member(path: str, name: str) -> InputError:
    return InputError(f"{path} has a damaged member {printable(name)}; export the model again")


def _unsafe(path: str, why: str) -> InputError:
    return InputError(
        f"{path} is damaged or hostile, and could run code when it is opened: {why}; expected a .pt2 of "
        "plain tensors and operators, so get the model from a source you trust, or as ONNX or safetensors"
    )


def _check_sums(path: str) -> None:
    """Compare every member with its checksum, which PyTorch's reader does not do."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise _damaged_member(path, damaged.partition("/")[2])


def _check_archive(path: str, reader: PT2ArchiveReader, members: list[str]) -> None:
    """Refuse what is not plain data, member by member."""
    if len(set(members)) != len(members):
        raise _unsafe(path, "it holds two members of one name")
    programs = [name for name in members if name.startswith("models/")]
    if programs != ["models/model.json"]:
        raise InputError(
            f"{path} holds {len(programs)} exported programs, expected one named 'model'; "
            "write it with torch.export.save(program, path)"
        )
    for name in members:
        base = name.rpartition("/")[2]
        if name.startswith(("data/aotinductor/", "data/executorch/", "mtia/")):
            raise _unsafe(path, f"it holds compiled code ({name})")
        if base.startswith(("custom_obj_", "opaque_obj_")):
            raise _unsafe(path, f"it holds a pickled object ({name})")
        if name.startswith("models/"):
            _check_program(path, _json(path, name, reader.read_bytes(name)))
        elif name.endswith("_config.json"):
            _check_payloads(path, reader, members, name)
        elif base.endswith(".pt"):
            _check_pickle(path, name, reader.read_bytes(name))


def _json(path: str, name: str, data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError as error:
        raise _damaged_member(path, name) from error


def _check_payloads(path: str, reader: PT2ArchiveReader, members: list[str], name: str) -> None:
    """Weights and constants that are not raw bytes must be pickles of tensors."""
    folder = name.rpartition("/")[0]
    config = _json(path, name, reader.read_bytes(name))
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise _damaged_member(path, name)
    for entry in entries.values():
        file = str(entry.get("path_name"))
        if not re.fullmatch(r"(weight|tensor)_\d+", file):
            raise _unsafe(path, f"{name} points to {file!r}")
        if entry.get("use_pickle"):
            member = f"{folder}/{file}"
            if member not in members:
                raise InputError(f"{path} lacks its member {member}; export the model again")
            _check_pickle(path, member, reader.read_bytes(member))


def _check_pickle(path: str, name: str, data: bytes) -> None:
    """Refuse a file of ``torch.save`` that does not unpickle with the globals of tensors alone."""
    if not data:
        return
    if not zipfile.is_zipfile(io.BytesIO(data)):
        streams = [data]  # the format before PyTorch 1.6: several pickles in a row
    else:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            streams = [archive.read(n) for n in archive.namelist() if n.endswith(".pkl")]
    for stream in streams:
        for used in _pickle_globals(path, name, stream):
            if used not in _TENSOR_GLOBALS:
                raise _unsafe(path, f"its member {name} asks for the Python global {used}")


def _pickle_globals(path: str, name: str, stream: bytes) -> Iterator[str]:
    """Every global that a pickle looks up, as ``module.name``."""
    strings: list[str] = []  # STACK_GLOBAL takes its names from the two strings before
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                # names that went through the memo are not followed: such a pickle is no tensor's
                yield ".".join(strings[-2:]) if len(strings) > 1 else "(computed)"
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                yield f"extension {argument}"
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError as error:
        raise _damaged_member(path, name) from error


def _check_program(path: str, program: object) -> None:
    """Refuse a serialized graph that names more than tensors, known operators and arithmetic."""
    stack: list[tuple[str, object]] = [("", program)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            if key == "range_constraints":
                for text in value:
                    _check_expression(path, text)
            stack += value.items()
        elif isinstance(value, list):
            stack += ((key, item) for item in value)
        elif not isinstance(value, str):
            continue
        elif key == "expr_str":
            _check_expression(path, value)
        elif key == "target":
            _check_operator(path, value)
        elif key in ("name", "as_name", "graph_module_name") and value:
            if not _IDENTIFIER.match(value):
                raise _unsafe(path, f"a value of its graph is named {value[:60]!r}")
        elif key in ("in_spec", "out_spec", "as_string_treespec") and value:
            _check_containers(path, value)


def _check_expression(path: str, text: str) -> None:
    # sympy evaluates these as Python
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        raise _unsafe(path, f"it has the size {text[:60]!r}") from None
    for node in ast.walk(tree):
        good = isinstance(node, _SYMPY_NODES)
        if isinstance(node, ast.Constant):
            # strings: the names in Symbol('s0') and the numbers in Float('0.5')
            text_good = isinstance(node.value, str) and _SYMBOL_OR_NUMBER.match(node.value)
            good = isinstance(node.value, (int, float)) or bool(text_good)
        elif isinstance(node, ast.Call):
            good = isinstance(node.func, ast.Name) and node.func.id in _SYMPY_FUNCTIONS
        elif isinstance(node, ast.Name):
            # symbols: s0, u1, zf2, ...; oo and the booleans
            good = node.id in _SYMPY_FUNCTIONS or bool(
                re.fullmatch(r"[a-z]{1,2}\d+|int_oo|oo|nan|zoo|true|false", node.id)
            )
        if not good:
            raise _unsafe(path, f"it has the size {text[:60]!r}")


def _check_operator(path: str, target: str) -> None:
    # PyTorch follows the dots from its own module, and calls what it finds
    parts = target.split(".")
    if target.startswith("torch.ops."):
        good = (
            3 < len(parts) < 6
            and parts[2] in _NAMESPACES
            and all(_IDENTIFIER.match(part) and not part.startswith("__") for part in parts[3:])
            and parts[3] not in _UNSAFE_OPERATORS
        )
    elif parts[0] == "_operator":
        good = len(parts) == 2 and parts[1] in _PYTHON_OPERATORS
    elif parts[0] == "math":
        good = len(parts) == 2 and parts[1] in _MATH_FUNCTIONS
    else:
        good = bool(_SYM_FUNCTIONS.match(target))
    if not good:
        raise _unsafe(path, f"its graph calls {target[:80]!r}")


def _check_containers(path: str, text: str) -> None:
    # a description of nested containers can name any importable type
    stack = [json.loads(text)] if text.startswith(("[", "{")) else []
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            kind = value.get("type")
            if kind is not None and kind not in _CONTAINERS:
                raise InputError(
                    f"{path} has inputs or outputs in a {kind}, expected tuples, lists and dicts; "
                    "wrap the model so that it takes and returns these"
                )
            if any(str(key).startswith("__") for key in value):
                raise _unsafe(path, "its inputs name a Python type")
            stack += (v for v in value.values() if not isinstance(v, str))


class _PickleWatch:
    """While active in a thread, every global that a pickle looks up must be a tensor's."""

    def __enter__(self) -> None:
        global _hook_installed
        with _hook_lock:
            if not _hook_installed:
                sys.addaudithook(_refuse_globals)  # cannot be removed; idle unless active
                _hook_installed = True
        _watched.active, _watched.refused = True, None

    def __exit__(self, *_: object) -> None:
        _watched.active = False


def _refuse_globals(event: str, args: tuple[object, ...]) -> None:
    if event == "pickle.find_class" and getattr(_watched, "active", False):
        name = f"{args[0]}.{args[1]}"
        if name not in _TENSOR_GLOBALS:
            _watched.refused = name
            raise PermissionError(f"the global {name} was refused")
