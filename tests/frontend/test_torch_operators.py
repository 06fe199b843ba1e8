"""Operators of PyTorch against PyTorch, NaN included: a third of the calls, every converter when large."""

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import torch_sweep
from tests.helpers.torch_sweep import DTYPES, compare, sample
from tvm_balanced.errors import InputError
from tvm_balanced.frontend import from_torch, torch_importer
from tvm_balanced.frontend.torch_ops import TABLE

NAN = math.nan


def floats(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


def with_nan(*shape, dtype=torch.float32):
    """Floats with NaN of both signs, infinities and zeros in every row of four or more."""
    x = floats(*shape).reshape(-1)
    x[0::11] = NAN
    x[3::11] = -torch.tensor(NAN)
    x[5::11], x[7::11], x[9::11] = math.inf, -math.inf, 0.0
    return x.reshape(shape).to(dtype)


INTS = torch.tensor([[-9, -4, -1, 0, 3], [7, -16, 15, 2, 1]])
IDS = torch.tensor([[2, 0, -1], [1, 1, 0]])
SHIFTS = torch.tensor([[0, 1, 63, 5, 70], [2, 3, 1, 0, 64]])
X, N, POSITIVE = floats(3, 5), with_nan(3, 5), floats(3, 5).abs() + 0.5
IMAGE, BAD_IMAGE = floats(2, 4, 7, 6), with_nan(2, 4, 7, 6)


def unary():
    names = "exp expm1 sigmoid tanh sin cos atan sinh cosh asinh erf exp2 neg square abs sign"
    for name in f"{names} ceil floor trunc round".split():
        yield sample(name, getattr(torch, name), N)
    for name in ["log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "acosh", "tan"]:
        yield sample(name, getattr(torch, name), POSITIVE + 1)
    for name in ["acos", "asin", "atanh"]:
        yield sample(name, getattr(torch, name), X.tanh())
    for name in ["isnan", "isinf", "isfinite", "logical_not"]:
        yield sample(name, getattr(torch, name), N)
        yield sample(name, getattr(torch, name), INTS)
    for name in ["exp", "sqrt", "sigmoid", "log1p"]:
        yield sample(f"{name} of integers", getattr(torch, name), INTS.abs())
    yield sample("small log1p", torch.log1p, X * 1e-6)
    yield sample("small expm1", torch.expm1, X * 1e-6)
    yield sample("bitwise_not", torch.bitwise_not, INTS)
    yield sample("round decimals", lambda x: torch.round(x, decimals=2), X)
    yield sample("sgn of integers", torch.sgn, INTS)
    yield sample("abs of integers", torch.abs, INTS)


def activations():
    for name in [
        "relu",
        "relu6",
        "selu",
        "elu",
        "celu",
        "silu",
        "mish",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "leaky_relu",
        "softplus",
        "softsign",
        "logsigmoid",
        "tanhshrink",
        "softshrink",
        "hardshrink",
    ]:
        yield sample(name, getattr(F, name), N)
    # of infinity PyTorch's own is NaN
    yield sample("gelu", F.gelu, torch.tensor([NAN, -1e6, -3.0, 0.0, 3.0, 1e6]))
    yield sample("relu of integers", torch.relu, INTS)
    yield sample("elu 0.7", lambda x: F.elu(x, 0.7), X)
    yield sample("celu 1.3", lambda x: F.celu(x, 1.3), X * 3)
    yield sample("softplus 2, 5", lambda x: F.softplus(x, 2, 5), X * 4)
    yield sample("hardtanh of other bounds", lambda x: F.hardtanh(x, -0.5, 0.7), N)
    yield sample("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), X)
    yield sample("glu", F.glu, floats(3, 6))
    yield sample("prelu", F.prelu, N, floats(5))
    for low, high in ((-1, 1), (None, 0.5), (0.2, None), (1, -1), (-math.inf, 2)):
        yield sample(f"clamp {low} {high}", lambda x, a=low, b=high: x.clamp(a, b), N)
    yield sample("clamp by tensors", lambda x, a: x.clamp(a, a + 1), X, N)
    yield sample("clamp of integers", lambda x: x.clamp(-3, 5), INTS)


def binary():
    other = N.flip(1)
    for name in [
        "add",
        "sub",
        "mul",
        "div",
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "atan2",
        "logaddexp",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    ]:
        yield sample(name, getattr(torch, name), N, other)
    yield sample("add alpha", lambda x, y: torch.add(x, y, alpha=2.5), X, floats(5))
    yield sample("sub alpha", lambda x, y: torch.sub(x, y, alpha=-3), X, floats(3, 1))
    yield sample("rsub", lambda x: torch.rsub(x, 3, alpha=2), X)
    yield sample("integer plus float", lambda n: n + 2.5, INTS)
    yield sample("integer below float", lambda n: n < 2.5, INTS)
    yield sample(
        "booleans", lambda a, b: (a & b, a | b, a ^ b, a * b, a + b, a == b), X > 0, X > 0.5
    )
    for name in [
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "logical_and",
        "logical_or",
        "logical_xor",
    ]:
        yield sample(name, getattr(torch, name), INTS, INTS.flip(1))
    yield sample("logical_and of NaN", torch.logical_and, N, other)
    yield sample("not greater", lambda x: ~(x > 0), N)
    yield sample("shifts", lambda n, s: (n << s, n >> s), INTS, SHIFTS)
    for mode in (None, "floor", "trunc"):
        yield sample(
            f"div {mode}", lambda a, b, m=mode: torch.div(a, b, rounding_mode=m), X * 9, POSITIVE
        )
        yield sample(
            f"integer div {mode}", lambda n, m=mode: torch.div(n, -3, rounding_mode=m), INTS
        )
    for name in ["remainder", "fmod", "floor_divide"]:
        function = getattr(torch, name)
        yield sample(name, function, X * 9, floats(5))
        yield sample(f"integer {name}", lambda n, f=function: f(n, -4), INTS)
    for power in (0, 1, 2, 3, -1, 0.5, 2.5):
        yield sample(f"pow {power}", lambda x, p=power: x**p, POSITIVE)
    yield sample("integer powers", lambda n, p: (n**3, n**0, 2**p), INTS, SHIFTS.clamp(0, 5))
    yield sample("where", lambda x: torch.where(x > 0, x, 0.0), N)
    yield sample("to uint8", lambda n: n.abs().to(torch.uint8), INTS)
    yield sample("casts", lambda x: (x.to(torch.int32), x.bool(), x.half(), x.double()), X * 3)


def reductions():
    for name in ["sum", "mean", "amax", "amin", "prod", "logsumexp"]:
        function = getattr(torch, name)
        yield sample(name, lambda x, f=function: f(x, dim=1), N)
        yield sample(f"{name} keepdim", lambda x, f=function: f(x, dim=-2, keepdim=True), X)
    for name in ["sum", "mean", "prod", "max", "min", "any", "all", "argmax", "argmin", "median"]:
        yield sample(f"{name} of all", getattr(torch, name), N if name != "median" else X)
    yield sample("sum over several", lambda x: x.sum((0, 2)), floats(2, 3, 4))
    yield sample("amax over several", lambda x: x.amax((0, 2)), floats(2, 3, 4))
    yield sample("sum of booleans", lambda x: (x > 0).sum(-1), X)
    yield sample("sum of int32", lambda n: n.int().sum(0), INTS)
    for correction in (0, 1, 2):
        yield sample(f"var {correction}", lambda x, c=correction: torch.var(x, 1, correction=c), X)
    yield sample("var_mean", lambda x: torch.var_mean(x, 0, keepdim=True), X)
    yield sample("std", lambda x: x.std(-1), X)
    yield sample("max along", lambda x: (x.max(1), x.min(0), x.argmax(1), x.argmin(-1)), N)
    yield sample(
        "argmax of ties", lambda n: ((n > 0).int().argmax(1), (n > 0).int().argmin(1)), INTS
    )
    yield sample("cumsum", lambda x: (x.cumsum(1), (x > 0).cumsum(0), x.cumprod(-1)), X)
    for order in (1, 2, 3, math.inf, -math.inf, 0):
        yield sample(f"norm {order}", lambda x, o=order: torch.linalg.vector_norm(x, o, 1), X)
    yield sample("histc", lambda x: torch.histc(x, 4, -1, 1), X)
    for p in (0.0, 1.0, 2.0, 3.0, math.inf):
        yield sample(f"cdist {p}", lambda x, y, p=p: torch.cdist(x, y, p), X, floats(4, 5) + 1)
    yield sample("any along", lambda x: ((x > 1).any(1), (x > -1).all(0), x.any(1)), N)
    yield sample(
        "no axes",
        lambda x: (x.sum(), x.mean(0), x.amax(0), x.max(0), x.cumsum(0), x.softmax(0)),
        X[0, 0],
    )


def sorting():
    for descending in (False, True):
        yield sample(
            f"sort {descending}",
            lambda x, d=descending: x.sort(dim=0, descending=d, stable=True),
            N,
        )
    yield sample("sort of ties", lambda n: (n % 3).sort(dim=-1, stable=True), INTS)
    yield sample("topk", lambda x: (x.topk(2, -1), x.topk(2, 0, largest=False)), X)
    yield sample("topk of NaN", lambda x: x.topk(1, -1).values, N)
    yield sample("kthvalue", lambda x: (x.kthvalue(2, 1), x.kthvalue(3, 0, keepdim=True)), X)
    yield sample("median", lambda x: (x.median(1), x.median(0, keepdim=True)), X)
    edges = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    for right in (False, True):
        yield sample(
            f"bucketize {right}", lambda x, e, r=right: torch.bucketize(x, e, right=r), N, edges
        )
    yield sample(
        "searchsorted", lambda s, v: torch.searchsorted(s, v), X.sort(-1).values, floats(3, 2)
    )


def indexing():
    x = floats(4, 5, 6)
    rows, columns = torch.tensor([0, -1, 2]), torch.tensor([[1], [-2]])
    mask = floats(4, 5) > 0
    yield sample("selects", lambda x: (x[1], x[-1], x[:, 2], x[..., -3]), x)
    yield sample("slices", lambda x: (x[1:], x[:-1], x[:, ::2], x[..., 1:5:3], x[10:, :0].sum()), x)
    yield sample("one index", lambda x, r: (x[r], x[:, r], x[..., r]), x, rows)
    yield sample("two indices", lambda x, r, c: (x[r, c], x[:, r, c], x[r, :, c]), x, rows, columns)
    yield sample("index_select", lambda x, r: torch.index_select(x, 1, r), x, rows.abs())
    yield sample(
        "take",
        lambda x, r: (torch.take(x, r), torch.gather(x, 1, r[:, None, None].expand(3, 2, 6).abs())),
        x,
        rows,
    )

    def writes(x, r, c, mask):
        one, two, three, four, five = (x.clone() for _ in range(5))
        one[r] = -1.0
        two[:, r] = x[:, :3] * 2
        three[r, :, c] = 7.0
        four[mask] = 0.5
        five[:, 1:4] = x[:, :3]
        return one, two, three, four, five, x.masked_fill(mask[..., None], 3.0)

    yield sample("writes", writes, x, torch.tensor([0, -2, 3]), columns, mask)
    yield sample(
        "accumulate", lambda x, r: x.index_put((r,), torch.ones(()), accumulate=True), x, rows
    )
    yield sample("masked_scatter", lambda x, m: x[..., 0].masked_scatter(m, x[..., 1]), x, mask)
    ids = torch.tensor([[0, 1, 0], [2, 2, 1]])
    for name in ("sum", "prod", "mean", "amax", "amin"):
        for own in (True, False):
            yield sample(
                f"scatter {name} {own}",
                lambda y, i, s, n=name, o=own: y.scatter_reduce(0, i, s, n, include_self=o),
                X,
                ids,
                floats(2, 3),
            )
    yield sample(
        "scatter",
        lambda y, i: (y.scatter(0, i, 2.0), y.scatter(1, i, y), y.scatter_add(1, i, y)),
        X,
        ids,
    )
    yield sample(
        "index_add", lambda y, i: y.index_add(0, i, y[:2], alpha=2), X, torch.tensor([2, 2])
    )
    yield sample("index_copy", lambda y, i: y.index_copy(1, i, y[:, 3:]), X, torch.tensor([2, 0]))
    yield sample("embedding", F.embedding, IDS.abs(), floats(6, 4))
    for mode in ("sum", "mean", "max"):
        yield sample(
            f"bag {mode}",
            lambda i, w, m=mode: F.embedding_bag(i, w, mode=m, padding_idx=1),
            IDS.abs(),
            floats(6, 4),
        )
    offsets = torch.tensor([0, 2, 2])
    yield sample(
        "bags",
        lambda i, w, o: F.embedding_bag(i, w, o),
        torch.tensor([3, 1, 0, 2]),
        floats(6, 4),
        offsets,
    )
    yield sample("one_hot", lambda i: F.one_hot(i, 4), IDS.abs())


def shapes():
    x = floats(2, 3, 4)
    yield sample(
        "views",
        lambda x: (
            x.view(6, 4),
            x.flatten(1),
            x.transpose(0, -1),
            x.permute(2, 0, 1),
            x[None].squeeze(0),
        ),
        x,
    )
    yield sample(
        "repeats", lambda x: (x.repeat(2, 1, 3), x.expand(5, 2, 3, 4), x.repeat_interleave(2, 1)), x
    )
    yield sample(
        "joins",
        lambda x: (torch.cat([x, x[:1]]), torch.stack([x, x], -1), torch.cat([x, torch.zeros(0)])),
        x,
    )
    yield sample("cat of dtypes", lambda x, n: torch.cat([x, n]), X, INTS)
    yield sample(
        "splits", lambda x: (*x.split(2, -1), *x.chunk(2, 1), *x.unbind(0), *x.split([1, 3], 2)), x
    )
    yield sample(
        "turns", lambda x: (x.flip(0, -1), x.roll((1, -2), (0, 2)), x.roll(5), torch.rot90(x)), x
    )
    yield sample("pads", lambda x: (F.pad(x, (1, 2, 0, 1), value=3.0), F.pad(x, (-1, 1))), x)
    for mode in ("reflect", "replicate", "circular"):
        yield sample(f"pad {mode}", lambda x, m=mode: F.pad(x, (1, 2), mode=m), x)
    yield sample("strided", lambda x: (x.as_strided((3, 2), (2, 5), 1), x.unfold(2, 2, 1)), x)
    yield sample(
        "new",
        lambda x: (
            torch.full_like(x, 2),
            x.new_ones(2),
            torch.zeros(3),
            torch.eye(3, 4),
            x * 0 + 1,
        ),
        x,
    )
    yield sample(
        "ranges",
        lambda x: (
            torch.arange(7),
            torch.arange(2, -5, -2),
            torch.arange(0, 1, 0.3),
            torch.linspace(-1, 1, 5),
            x,
        ),
        x,
    )
    yield sample("triangles", lambda x: (x.tril(), x.triu(-1), x.tril(2)), x)
    yield sample(
        "diagonals",
        lambda x: (x.diagonal(1, 1, 2), torch.diag_embed(x), torch.einsum("iik->ik", x[:, :2])),
        x,
    )


def neural():
    x, weight, bias = IMAGE, floats(6, 2, 3, 3), floats(6)
    yield sample("conv", lambda x, w, b: F.conv2d(x, w, b, 2, (1, 0), (1, 2), 2), x, weight, bias)
    yield sample("conv1d", lambda x, w: F.conv1d(x, w, padding=1), floats(2, 4, 9), floats(5, 4, 3))
    yield sample("conv3d", F.conv3d, floats(1, 2, 4, 5, 4), floats(3, 2, 2, 2, 2), floats(3))
    yield sample(
        "conv_transpose",
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2),
        x,
        floats(4, 3, 3, 3),
    )
    yield sample(
        "products",
        lambda a, b: (a @ b, a @ b[:, 0], a[0] @ b, torch.dot(a[0], a[1]), torch.outer(a[0], b[0])),
        X,
        floats(5, 4),
    )
    yield sample(
        "addmm", lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), floats(4), X, floats(5, 4)
    )
    yield sample(
        "beta 0", lambda c, a, b: torch.addmm(c, a, b, beta=0), with_nan(3, 4), X, floats(5, 4)
    )
    yield sample(
        "baddbmm",
        lambda c, a, b: torch.baddbmm(c, a, b, alpha=3),
        floats(2, 3, 4),
        floats(2, 3, 5),
        floats(2, 5, 4),
    )
    yield sample("addbmm", torch.addbmm, floats(3, 4), floats(2, 3, 5), floats(2, 5, 4))
    for ceil in (False, True):
        yield sample(
            f"max_pool {ceil}",
            lambda x, c=ceil: F.max_pool2d(x, (3, 2), 2, (1, 0), 1, c, return_indices=True),
            x,
        )
        yield sample(f"avg_pool {ceil}", lambda x, c=ceil: F.avg_pool2d(x, 3, 2, 1, c, False), x)
    yield sample("max_pool of NaN", lambda x: F.max_pool2d(x, 3, 2, return_indices=True), BAD_IMAGE)
    yield sample("max_pool1d", lambda x: F.max_pool1d(x, 2, dilation=2), floats(2, 3, 9))
    yield sample(
        "max_pool3d", lambda x: F.max_pool3d(x, 2, return_indices=True), floats(1, 2, 4, 4, 5)
    )
    yield sample(
        "avg_pools",
        lambda x: (
            F.avg_pool1d(x[0], 3),
            F.avg_pool2d(x, 2, divisor_override=3),
            F.avg_pool3d(x, 2),
        ),
        x,
    )
    yield sample(
        "adaptive",
        lambda x: (
            F.adaptive_avg_pool2d(x, (3, 5)),
            F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool3d(x, 2),
            F.adaptive_max_pool2d(x, (1, 3)),
        ),
        x,
    )
    yield sample(
        "layer_norm", lambda x, w: (F.layer_norm(x, (7, 6)), F.layer_norm(x, (6,), w)), x, floats(6)
    )
    yield sample(
        "group_norm", lambda x: (F.group_norm(x, 2), F.instance_norm(x), F.rms_norm(x, (6,))), x
    )
    yield sample(
        "batch_norm", F.batch_norm, x, floats(4), floats(4).abs() + 0.1, floats(4), floats(4)
    )
    yield sample(
        "norm statistics",
        lambda x: (
            torch.native_layer_norm(x, (6,), None, None, 1e-5),
            torch.native_group_norm(x, None, None, 2, 4, 42, 2, 1e-5),
        ),
        x,
    )
    yield sample("softmax", lambda x: (x.softmax(-1), x.log_softmax(0), F.softmin(x, 1)), N)
    for mode in ("nearest", "nearest-exact", "bilinear", "area"):
        yield sample(f"interpolate {mode}", lambda x, m=mode: F.interpolate(x, (9, 4), mode=m), x)
    yield sample(
        "interpolate by factors",
        lambda x: (
            F.interpolate(x, scale_factor=1.7),
            F.interpolate(x, scale_factor=(2, 0.6), mode="bilinear", align_corners=True),
        ),
        x,
    )
    for mode in ("bilinear", "nearest"):
        for padding in ("zeros", "border", "reflection"):
            yield sample(
                f"grid_sample {mode} {padding}",
                lambda x, g, m=mode, p=padding: F.grid_sample(x, g, m, p, align_corners=False),
                x,
                floats(2, 3, 8, 2),
            )
    yield sample(
        "shuffle",
        lambda x: (F.pixel_shuffle(x, 2), F.unfold(x, 3, padding=1), F.channel_shuffle(x, 2)),
        x,
    )
    yield sample(
        "attention",
        lambda q: (
            F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.scaled_dot_product_attention(q, q + 1, q, q[..., :1] > 0),
        ),
        floats(2, 2, 5, 4),
    )


def overloads():
    """What other exporters, or a model itself, call by its ATen name."""
    aten = torch.ops.aten
    for kind in ("and", "or", "xor"):
        plain, dunder = getattr(aten, f"bitwise_{kind}"), getattr(aten, f"__{kind}__")
        yield sample(
            f"{kind} with numbers",
            lambda n, p=plain, d=dunder: (p.Scalar(n, 5), p.Scalar_Tensor(5, n), d.Scalar(n, 6)),
            INTS,
        )
    for side in ("left", "right"):
        shift, dunder = getattr(aten, f"bitwise_{side}_shift"), getattr(aten, f"__{side[0]}shift__")
        yield sample(
            f"{side} shifts",
            lambda n, s, f=shift, d=dunder: (
                f.Tensor(n, s),
                f.Tensor_Scalar(n, 2),
                f.Scalar_Tensor(9, s),
                d.Scalar(n, 3),
            ),
            INTS,
            SHIFTS,
        )
    yield sample(
        "clamps",
        lambda x, y: (
            aten.clamp_max.default(x, 0.5),
            aten.clamp_min.default(x, 0.5),
            aten.clamp_max.Tensor(x, y),
            aten.clamp_min.Tensor(x, y),
        ),
        N,
        X,
    )
    yield sample(
        "numbers",
        lambda x, n: (
            aten.div.Scalar(x, 3),
            aten.div.Scalar_mode(x, 0.3, rounding_mode="floor"),
            aten.floor_divide.Scalar(n, 4),
            aten.remainder.Scalar_Tensor(7, n + 20),
            aten.rsub.Tensor(x, x + 1),
            aten.sub.Scalar(x, 2, 3),
            aten.pow.Tensor_Tensor(x.abs(), x),
        ),
        X,
        INTS,
    )
    yield sample(
        "fills",
        lambda x: (
            aten.fill.Scalar(x, 2),
            aten.fill.Tensor(x, x[0, 0]),
            torch.full((2, 3), 4) + x.new_full((3,), 2.0),
            torch.ones_like(x),
            torch.full((2,), True),
        ),
        X,
    )
    yield sample(
        "memory",
        lambda x: (
            torch.empty(2).shape,
            torch.empty_like(x).zero_(),
            x.new_empty(3).fill_(1),
            aten.empty_permuted.default([2, 3], [1, 0]) * 0,
            aten.empty_strided.default([2, 3], [1, 2]) * 0,
            aten.new_empty_strided.default(x, [2], [1]) * 0,
            aten.empty.memory_format([2]) * 0,
            aten.alias.default(x),
        ),
        X,
    )
    yield sample(
        "reductions",
        lambda x: (
            (x > 0).all((0, 1)),
            (x > 1).any((0, 1)),
            torch.std_mean(x, 1),
            torch.vdot(x[0], x[1]),
        ),
        X,
    )
    yield sample("sort", lambda x: x.sort().values, N)
    yield sample(
        "writes",
        lambda x, i, r: (
            x.scatter(0, i, x, reduce="add"),
            x.scatter(0, i, 2.0, reduce="multiply"),
            x.index_fill(1, r, 3.0),
            x.index_fill(0, r, x[0, 0]),
            x.select_scatter(x[0], 0, -1),
            aten._unsafe_index_put.default(x, [r], x[:2]),
        ),
        X,
        torch.tensor([[0, 1, 0], [2, 2, 1]]),
        torch.tensor([2, 0]),
    )
    edges = torch.tensor([-1.0, 0.0, 2.0])
    yield sample(
        "one value",
        lambda e: (torch.searchsorted(e, 0.5), torch.bucketize(2.0, e, right=True)),
        edges,
    )
    yield sample("adaptive 3d", lambda x: F.adaptive_max_pool3d(x, 2), floats(1, 2, 4, 4, 6))
    yield sample(
        "bag",
        lambda w, i, o: aten._embedding_bag.default(w, i, o)[0],
        floats(6, 4),
        torch.tensor([3, 1, 0]),
        torch.tensor([0, 2]),
    )


FAMILIES = [
    unary,
    activations,
    binary,
    reductions,
    sorting,
    indexing,
    shapes,
    neural,
    overloads,
]


class Recording(dict):
    """A table that remembers what was asked of it."""

    asked: ClassVar[set[str]] = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)


def check(samples):
    tally = compare(samples)
    assert not (tally.wrong or tally.refused or tally.crashed), tally
    assert tally.right == len(samples)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_as_pytorch(family):
    check(list(family())[::3])


@pytest.mark.large
def test_every_converter_as_pytorch(monkeypatch):
    monkeypatch.setattr(torch_importer, "TABLE", Recording(TABLE))
    for family in FAMILIES:
        check(list(family()))
    assert sorted(set(TABLE) - Recording.asked) == []


class Lambda(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.special.bessel_j0(x), "bessel_j0"),
        (lambda x: torch.rand_like(x) + x, "rand_like"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout|rand|bernoulli"),
        (lambda x: torch.fft.rfft(x).abs(), "fft"),
        (lambda x: x.index_put((x > 0,), x[0, :3]), "index_put"),
        (lambda x: torch.histc(x, 4), "histc"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(function, named):
    with pytest.raises(InputError, match=named):
        from_torch(Lambda(function), (X,))


def test_a_changed_buffer_is_refused_by_name():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(5))

        def forward(self, x):
            self.seen.add_(x.mean(0))
            return x + self.seen

    with pytest.raises(InputError, match="changes the buffer seen"):
        from_torch(Counter(), (X,))


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_pytorchs_samples(dtype):
    pytest.importorskip("expecttest")  # PyTorch's own samples need it
    wrong = {
        name: tally.wrong + tally.crashed
        for name, tally in torch_sweep.sweep([dtype], limit=12)
        if tally.wrong or tally.crashed
    }
    assert wrong == {}
