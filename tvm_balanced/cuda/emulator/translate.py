"""CUDA C to C++ for ``include/cudaemu.h``: inline PTX, vector accesses, shared memory, entry points."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tvm_balanced.cuda.emulator.compiler import EmulatorError

_MMA_TYPES = {
    name: f"EMU_{name.upper()}" for name in ["f16", "bf16", "tf32", "s8", "u8", "f32", "s32"]
}
_ASM = re.compile(r"\b(?:__asm__|asm)\s*(?:__volatile__|volatile)?\s*\(")
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
# what matters where a text is split: strings, brackets and separators
_TOKEN = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|::|[][(){}:,]""", re.DOTALL)
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_OPERAND = re.compile(r'\s*"[^"]*"\s*\((.*)\)\s*$', re.DOTALL)
_KERNEL = re.compile(
    r'(?:extern\s+"C"\s+)?__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\('
)
_VECTOR_ACCESS = re.compile(r"\*\((?:const )?([A-Za-z_][\w:]*[248]|[\w:]*(?:16|8|4|2)_t)\s*\*\)\(")
_VECTOR_TYPE = re.compile(
    r"(?:half|nv_bfloat16|float|double|u?(?:char|short|int|long|longlong))[248]"
)
_SHARED = re.compile(
    r"(extern\s+)?__shared__\s+((?:alignas|__align__)\s*\(\d+\)\s*)?"
    r"((?:[\w:]+\s+)*?[\w:<>, ]+?[\s*]+?)(\w+)\s*((?:\[[^\]]*\])*)\s*;"
)
_LDMATRIX = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(?:\.satfinite)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)\s*"
    + r"\s*,\s*".join([r"\{([^}]*)\}"] * 4)
)
_MMA_SPARSE = re.compile(
    r"mma\.sp(?:::ordered_metadata)?\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(f16|bf16)\.\1\.f32\s*"
    + r"\s*,\s*".join([r"\{([^}]*)\}"] * 4)
    + r"\s*,\s*(%\d+)\s*,\s*([^\s;]+)\s*;"
)
_CP_ASYNC = re.compile(
    r"(?:setp\.(eq|ne)\.\w+ p, %(\d+), (\d+);)?\s*(@p )?"
    r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)?\s*"
    r"\[%(\d+)\],\s*\[%(\d+)\],\s*(%?)(\d+)(?:,\s*%(\d+))?\s*;"
)
_DP4A = re.compile(r"dp4a\.([us])32\.([us])32 ")
_BARRIER = re.compile(r"bar(?:rier)?\.sync(?:\.aligned)? (\S+?)(?:, (\S+?))?\s*;")


def _matching(text: str, start: int, opening: str = "(", closing: str = ")") -> int:
    """Index just past the bracket that closes ``text[start]``, strings left out."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token[0] == opening) - (token[0] == closing)
        if depth == 0 and token[0] == closing:
            return token.end()
    raise EmulatorError("the CUDA source has unbalanced brackets")


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator outside brackets and strings; ``::`` in a name does not split at ``:``."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        part = text[start : token.start()]
        if depth or token[0] not in (separator, separator * 2):
            continue
        # between the sections of an asm statement, '::' is two separators
        if token[0] == "::" and part.strip() and not part.rstrip().endswith(('"', ")")):
            continue
        parts += [part] if token[0] == separator else [part, ""]
        start = token.end()
    return [*parts, text[start:]]


def _ptx(text: str, outs: list[str], ins: list[str]) -> str:
    """One inline PTX statement as calls into the emulation."""
    ptx = " ".join(re.sub(r"\\n|\\t", " ", text).replace("%%", "%").split())
    ops = outs + ins
    for pattern, emit in (
        (_LDMATRIX, _ldmatrix),
        (_MMA, _mma),
        (_MMA_SPARSE, _mma_sparse),
        (_BARRIER, _barrier),
        (_DP4A, _dp4a),
    ):
        match = pattern.match(ptx)
        if match:
            return emit(match, outs, ops)
    match = _CP_ASYNC.search(ptx)
    if match:
        return _cp_async(match, ptx, ops)
    if ptx.startswith("cp.async.commit_group"):
        return "emu_async_commit();"
    match = re.match(r"cp\.async\.wait_group (\S+?)\s*;", ptx)
    if match:
        return f"emu_async_wait({_value(match[1], ops)});"
    if ptx.startswith("cp.async.wait_all"):
        return "emu_async_wait(-1);"
    if "cvta.to.shared.u64" in ptx:
        return f"{outs[0]} = (unsigned)__cvta_generic_to_shared({ins[0]});"
    if "%globaltimer" in ptx or "%clock" in ptx:
        return f"{outs[0]} = 0;"
    if not ptx or re.match(r"prefetch|discard|applypriority", ptx):
        return ";"
    raise EmulatorError(f"this inline PTX is not emulated: {ptx}")


def _value(text: str, ops: list[str]) -> str:
    return ops[int(text[1:])] if text.startswith("%") else text


def _ldmatrix(match: re.Match[str], outs: list[str], ops: list[str]) -> str:
    count, transposed = int(match[1]), "true" if match[2] else "false"
    load = f"emu_ldmatrix<{count},{transposed}>((unsigned)({ops[count]}), emu_o);"
    store = "".join(f"emu_set({outs[i]}, emu_o[{i}]);" for i in range(count))
    return "{unsigned emu_o[4]; " + load + store + "}"


def _mma(match: re.Match[str], outs: list[str], ops: list[str]) -> str:
    depth, types = match[1], [_MMA_TYPES[name] for name in match.groups()[1:5]]
    return _fragments(match.groups()[5:], ops, f"emu_mma<{depth},{','.join(types)}>(emu_m);")


def _mma_sparse(match: re.Match[str], outs: list[str], ops: list[str]) -> str:
    code = f"emu_m.metadata=emu_bits({_value(match[6], ops)});"
    code += f"emu_m.selector={_value(match[7], ops)};emu_mma_sparse<{_MMA_TYPES[match[1]]}>(emu_m);"
    return _fragments(match.groups()[1:5], ops, code)


def _fragments(groups: Sequence[str], ops: list[str], code: str) -> str:
    """``code`` on the registers of D, A, B and C, which ``groups`` names."""
    results, *operands = ([ops[int(i)] for i in re.findall(r"%(\d+)", text)] for text in groups)
    filled = "".join(
        f"emu_m.{name}[{i}]=emu_bits({register});"
        for name, registers in zip("abc", operands, strict=True)
        for i, register in enumerate(registers)
    )
    kept = "".join(f"emu_set({register}, emu_m.d[{i}]);" for i, register in enumerate(results))
    return "{EmuMma emu_m = {};" + filled + code + kept + "}"


def _cp_async(match: re.Match[str], ptx: str, ops: list[str]) -> str:
    test, tested, constant, predicated, to, source, percent, number, ignore = match.groups()
    size = ops[int(number)] if percent else number
    kept = f"(int)({ops[int(ignore)] if ignore else size})"
    target, origin = f"(unsigned)({ops[int(to)]})", f"(const void*)({ops[int(source)]})"
    head = f"emu_cp_async({target}, {origin}, (int)({size}), "
    if not predicated:
        return "{" + head + kept + ");}"
    condition = f"(({ops[int(tested)]}) {'==' if test == 'eq' else '!='} {constant})"
    if "@!p st.shared" in ptx:
        return "{" + head + f"{condition} ? {kept} : 0);" + "}"
    return "{if " + condition + " " + head + kept + ");}"


def _barrier(match: re.Match[str], outs: list[str], ops: list[str]) -> str:
    threads = _value(match[2], ops) if match[2] else "0"
    return f"emu_barrier({_value(match[1], ops)}, {threads});"


def _dp4a(match: re.Match[str], outs: list[str], ops: list[str]) -> str:
    byte = {"u": "unsigned char", "s": "signed char"}
    left, right, start = ops[1:4]
    terms = "".join(
        f" + (int)({byte[match[1]]})(({left}) >> {8 * i}) * (int)({byte[match[2]]})(({right}) >> {8 * i})"
        for i in range(4)
    )
    return f"{outs[0]} = ({start}){terms};"


def _rewrite_asm(source: str) -> str:
    out, position = [], 0
    for match in _ASM.finditer(source):
        line = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
        if match.start() < position or line.lstrip().startswith("#"):
            continue
        end = _matching(source, match.end() - 1)
        sections = [*_split(source[match.end() : end - 1], ":"), "", "", ""]
        operands = [
            [f"({operand[1]})" for operand in map(_OPERAND.match, _split(text, ",")) if operand]
            for text in sections[1:3]
        ]
        code = _ptx("".join(_STRING.findall(sections[0])), *operands)
        semicolon = re.match(r"\s*;", source[end:])
        if semicolon:
            end += semicolon.end()
        # line numbers stay the same, for reports
        out += [source[position : match.start()], code]
        out.append("\n" * source[match.start() : end].count("\n"))
        position = end
    return "".join(out) + source[position:]


class _SharedMemory:
    """Static shared arrays of one kernel, laid out one after the other."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._count = 0
        self._end = "0"
        self.declarations = ""
        self._vectors: dict[str, str] = {}

    def replace(self, match: re.Match[str]) -> str:
        dynamic, qualifier, name = match[1], match[2] or "", match[4]
        kind, dims = match[3].strip(), match[5] or ""
        if dynamic:
            start = f"emu_tls.smem + emu_static_{self._kernel}"
            return f"{kind}* {name} = ({kind}*)({start});"
        alignment = re.search(r"\((\d+)\)", qualifier)
        unit = alignment[1] if alignment else "16"
        offset = f"emu_off_{self._kernel}_{self._count}"
        self._count += 1
        self.declarations += (
            f"typedef {kind} {offset}_t{dims}; enum : unsigned long {{ "
            f"{offset} = (({self._end}) + {unit} - 1) / {unit} * {unit}, "
            f"{offset}_end = {offset} + sizeof({offset}_t) }};"
        )
        self._end = f"{offset}_end"
        if _VECTOR_TYPE.fullmatch(kind):
            self._vectors[name] = kind
        return f"{offset}_t& {name} = *({offset}_t*)(emu_tls.smem + {offset});"

    def whole_elements(self, body: str) -> str:
        """Make an element of an array of vectors one access, as on the GPU; g++ would split it."""
        for name, kind in self._vectors.items():
            out, position = [], 0
            for match in re.finditer(rf"(?<![\w&.]){name}\[", body):
                end = _matching(body, match.end() - 1, "[", "]")
                if body[end : end + 1] in (".", "["):
                    continue
                element = f"emu_v<{kind}>({name} + ({body[match.end() : end - 1]}))"
                out += [body[position : match.start()], element]
                position = end
            body = "".join(out) + body[position:]
        return body

    def prelude(self) -> str:
        size = f"emu_static_{self._kernel} = (({self._end}) + 127) / 128 * 128"
        return f"{self.declarations}enum : unsigned long {{ {size} }};"


def translate(source: str) -> tuple[str, dict[str, list[str]]]:
    """Turn CUDA C into C++ for the emulator, and name the parameter types of each of its kernels.

    Line numbers stay the same.

    Raises
    ------
    EmulatorError
        When an inline PTX statement is not emulated; it is named.
    """
    source = _VECTOR_ACCESS.sub(r"emu_v<\1>(", _rewrite_asm(source))
    kernels: dict[str, list[str]] = {}
    out, position = [], 0
    for match in _KERNEL.finditer(source):
        end = _matching(source, match.end() - 1)
        brace = re.match(r"\s*\{", source[end:])
        if brace is None:
            continue
        name = match[1]
        body_end = _matching(source, end + brace.end() - 1, "{", "}")
        memory = _SharedMemory(name)
        body = memory.whole_elements(_SHARED.sub(memory.replace, source[end:body_end]))
        before, head = source[position : match.start()], source[match.start() : end]
        out += [before, memory.prelude(), head, body]
        position = body_end
        parameters = [p.strip() for p in _split(source[match.end() : end - 1], ",") if p.strip()]
        kernels[name] = [
            re.sub(r"__restrict__|__grid_constant__|\s*\b\w+$", "", parameter).strip()
            for parameter in parameters
        ]
    text = "".join(out) + source[position:]
    # the arguments lie in nobody's array: reading them is not looked at
    visible = 'extern "C" __attribute__((visibility("default"))) EMU_NS'
    for name, types in kernels.items():
        args = ", ".join(f"*({kind}*)emu_a[{i}]" for i, kind in enumerate(types))
        text += f"\n{visible} void emu_thunk_{name}(void** emu_a) {{ {name}({args}); }}"
        text += f"\n{visible} unsigned long emu_smem_{name}() {{ return emu_static_{name}; }}\n"
    return text, kernels
