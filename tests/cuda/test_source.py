"""A translation unit in the form that is kept: taken apart and put together it is the same bytes."""

from __future__ import annotations

import pytest

from tvm_balanced.cuda.source import (
    file_stem,
    join_kernels,
    normal_form,
    precise_math,
    split_kernels,
)

HEAD = "#include <cuda_fp16.h>\n\n#define uint unsigned int\n"
LONG = "fused_" + "matmul_add_" * 20 + "kernel"


def _signature(name, bounds="__launch_bounds__(64) "):
    return f'extern "C" __global__ void {bounds}{name}(float* __restrict__ a, int64_t n)'


def _unit(*names, between=""):
    """As TVM prints it: first all declarations, then all definitions, blank lines after each."""
    declarations = "".join(f"{_signature(name)};\n{between}" for name in names)
    bodies = "\n".join(
        f"{_signature(name)} {{\n  a[n] = {i};\n}}\n" for i, name in enumerate(names)
    )
    return f"{HEAD}{declarations}{bodies}\n\n"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("main_kernel",), id="one"),
        pytest.param(("b", "a_kernel", "a", "a_1", "a1", "B", "_c"), id="unsorted"),
        pytest.param((LONG + "_1", "fused_z", LONG, "fused_matmul"), id="long"),
    ],
)
def test_normal_form_is_what_its_files_join_to(names):
    kept = normal_form(_unit(*names))
    kernels = split_kernels(kept)
    # as files: a folder is listed by file name, and long names are cut
    files = {f"kernels/{file_stem(name)}.cu": text for name, text in kernels.items()}
    assert join_kernels(dict(sorted(files.items()))) == kept == normal_form(kept)
    assert sorted(kernels) == sorted(names)
    assert kept.count('extern "C"') == len(names)
    for name, text in kernels.items():
        assert text.startswith(HEAD) and text.endswith(f"a[n] = {names.index(name)};\n}}\n")
        assert text.count("__global__") == 1


def test_what_stands_between_declarations_is_kept_for_every_kernel():
    helper = "static __device__ float twice(float x);\n"
    kernels = split_kernels(normal_form(_unit("b", "a", between=helper)))
    assert all(helper in text.partition("__global__")[0] for text in kernels.values())


def test_launch_bounds_and_cluster_sizes_are_no_names():
    bounds = "__launch_bounds__(64, 2) __cluster_dims__(2, 1, 1) "
    assert list(split_kernels(f"{_signature('k', bounds)} {{\n}}\n")) == ["k"]


@pytest.mark.parametrize("source", ["", "static int x = __clz(1);\n\n"], ids=["empty", "no-kernel"])
def test_a_unit_without_kernels_stays_as_it_is(source):
    assert normal_form(source) == source


@pytest.mark.parametrize(
    ("fast", "precise"),
    [
        ("__expf(x) + __exp10f (x)", "expf(x) + exp10f (x)"),
        ("__logf(__log2f(__log10f(x)))", "logf(log2f(log10f(x)))"),
        ("__sinf(x) * __cosf(x) / __tanf(x)", "sinf(x) * cosf(x) / tanf(x)"),
        ("__powf(x, 3.0f)", "powf(x, 3.0f)"),
        ("__tanhf(x)+__fdividef(x, y)", "tanhf(x)+__fdiv_rn(x, y)"),
        ("htanh_approx(h)", "htanh(h)"),
    ],
)
def test_fast_intrinsics_become_the_functions(fast, precise):
    assert precise_math(fast) == precise


@pytest.mark.parametrize(
    "text",
    [
        "expf(x)",
        "my__expf(x)",
        "__expf_table[3]",
        "__fmaf_rn(a, b, c)",
        "__expf",
        "__half2float(h)",
    ],
)
def test_other_text_is_left_alone(text):
    assert precise_math(text) == text
