"""What ONNX's operators compute, in PyTorch, so that gradients flow through a piece of a graph.

`run(nodes, values)` -> values of the nodes' outputs. Rounding passes gradients as if it were the identity (the
straight-through estimator). Only operators of networks are here; a graph with another one is refused as `Unknown`, and
callers leave it. This module must not know models, and loads PyTorch when it is first asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from engines.core.errors import import_runtime

Tensor = Any  # torch.Tensor
Values = MutableMapping[str, Tensor]
Operator = Callable[[list[Tensor], dict[str, Any]], Any]
UNARY = (  # of the same name in PyTorch
    *("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log"),
    *("Neg", "Reciprocal", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Tanh"),
)


class Unknown(Exception):
    """An operator, or a form of it, that is not here."""


def run(nodes: Iterable[NodeProto], values: Values, rounded: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
    """Compute nodes in their order; `values` has all that they read and receives what they make.

    Args:
        nodes: of the standard domain.
        values: tensor name -> torch tensor. Codes are there as floats that hold whole numbers.
        rounded: chooses from a tensor and its codes, both as (unrounded, rounded) codes; None takes the rounded ones.

    Raises:
        Unknown: says which operator.
    """
    known = operators()
    for node in nodes:
        if node.domain or node.op_type not in known:
            raise Unknown(node.op_type)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attributes["rounded"] = rounded
        attributes["outputs"] = len(node.output)
        read = [values[name] if name else None for name in node.input]
        made = known[node.op_type](read, attributes)
        made = made if isinstance(made, tuple | list) else (made,)
        values.update((name, value) for name, value in zip(node.output, made, strict=False) if name)


def tensor(array: np.ndarray) -> Tensor:
    """A torch tensor of an array; floats and codes of any type become FP32, other whole numbers INT64."""
    torch = import_runtime("torch")
    array = np.asarray(array)
    if array.dtype == np.bool_:
        return torch.from_numpy(np.array(array))
    whole = np.issubdtype(array.dtype, np.integer) and array.dtype.itemsize >= 4
    return torch.from_numpy(np.array(array, dtype=np.int64 if whole else np.float32))


@cache
def operators() -> dict[str, Operator]:
    """Operator -> its function of the inputs and the attributes."""
    torch = import_runtime("torch")
    F = torch.nn.functional

    def each(function: Callable[..., Tensor]) -> Operator:
        return lambda x, a: function(*x)

    def many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
        def fold(x: list[Tensor], a: dict[str, Any]) -> Tensor:
            made = x[0]
            for other in x[1:]:
                made = function(made, other)
            return made

        return fold

    def reduced(function: Callable[..., Tensor]) -> Operator:
        def reduce(x: list[Tensor], a: dict[str, Any]) -> Tensor:
            axes = _whole(x[1]) if len(x) > 1 and x[1] is not None else a.get("axes")
            if not axes and a.get("noop_with_empty_axes", 0):
                return x[0]
            return function(x[0], tuple(axes or range(x[0].ndim)), bool(a.get("keepdims", 1)))

        return reduce

    return {
        **{name: each(getattr(torch, name.lower())) for name in UNARY},
        **{name: each(getattr(F, name.lower())) for name in ("Relu", "Mish", "Softplus", "Softsign")},
        **{name: many(getattr(torch, name.lower())) for name in ("Add", "Sub", "Mul", "Equal", "Greater", "Less")},
        "And": many(torch.logical_and),
        "Not": each(torch.logical_not),
        "Or": many(torch.logical_or),
        "Div": lambda x, a: x[0] / x[1] if x[0].is_floating_point() else torch.div(*x, rounding_mode="trunc"),
        "Pow": lambda x, a: torch.pow(x[0], x[1].to(x[0].dtype)),
        "Max": many(torch.maximum),
        "Min": many(torch.minimum),
        "Where": each(torch.where),
        "HardSwish": each(F.hardswish),
        "HardSigmoid": lambda x, a: torch.clamp(x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1),
        "LeakyRelu": lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
        "Elu": lambda x, a: F.elu(x[0], a.get("alpha", 1.0)),
        "Celu": lambda x, a: F.celu(x[0], a.get("alpha", 1.0)),
        "Selu": each(F.selu),
        "PRelu": lambda x, a: torch.where(x[0] >= 0, x[0], x[0] * x[1]),
        "Gelu": lambda x, a: F.gelu(x[0], approximate=a.get("approximate", b"none").decode()),
        "Clip": lambda x, a: torch.clamp(x[0], *(t if t is not None else None for t in (*x[1:], None, None)[:2])),
        "Softmax": lambda x, a: torch.softmax(x[0], a.get("axis", -1)),
        "LogSoftmax": lambda x, a: torch.log_softmax(x[0], a.get("axis", -1)),
        "MatMul": each(torch.matmul),
        "Gemm": _gemm,
        "Conv": _conv,
        "ConvTranspose": _conv_transpose,
        "QuantizeLinear": _quantize,
        "DequantizeLinear": _dequantize,
        "ReduceMean": reduced(torch.mean),
        "ReduceSum": reduced(torch.sum),
        "ReduceMax": reduced(torch.amax),
        "ReduceMin": reduced(torch.amin),
        "ReduceL2": reduced(lambda t, axes, keep: torch.sqrt(torch.sum(t * t, axes, keep))),
        "ReduceSumSquare": reduced(lambda t, axes, keep: torch.sum(t * t, axes, keep)),
        "GlobalAveragePool": lambda x, a: torch.mean(x[0], tuple(range(2, x[0].ndim)), True),
        "GlobalMaxPool": lambda x, a: torch.amax(x[0], tuple(range(2, x[0].ndim)), True),
        "MaxPool": lambda x, a: _pool(x, a, "max"),
        "AveragePool": lambda x, a: _pool(x, a, "avg"),
        "BatchNormalization": lambda x, a: F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5)),
        "InstanceNormalization": lambda x, a: F.instance_norm(x[0], None, None, x[1], x[2], eps=a.get("epsilon", 1e-5)),
        "GroupNormalization": lambda x, a: F.group_norm(x[0], a["num_groups"], x[1], x[2], a.get("epsilon", 1e-5)),
        "LayerNormalization": _layer_norm,
        "Identity": lambda x, a: x[0],
        "Cast": lambda x, a: _cast(x[0], a["to"]),
        "Shape": lambda x, a: torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end", None)]),
        "Reshape": _reshape,
        "Flatten": lambda x, a: x[0].reshape(math.prod(x[0].shape[: a.get("axis", 1) % (x[0].ndim + 1)]), -1),
        "Transpose": lambda x, a: x[0].permute(a.get("perm", list(range(x[0].ndim))[::-1])),
        "Squeeze": lambda x, a: x[0].squeeze(tuple(_whole(x[1])) if len(x) > 1 else tuple(range(x[0].ndim))),
        "Unsqueeze": _unsqueeze,
        "Expand": lambda x, a: x[0].expand(torch.broadcast_shapes(x[0].shape, tuple(_whole(x[1])))),
        "Concat": lambda x, a: torch.cat(x, a["axis"]),
        "Split": _split,
        "Slice": _slice,
        "Gather": _gather,
        "Pad": _pad,
        "Tile": lambda x, a: x[0].repeat(_whole(x[1])),
        "Range": lambda x, a: torch.arange(x[0].item(), x[1].item(), x[2].item()),
        "Constant": lambda x, a: _constant(a),
        "ConstantOfShape": lambda x, a: torch.full(_whole(x[0]), _value_of(a), dtype=_type_of(a)),
        "Resize": _resize,
        "DepthToSpace": _depth_to_space,
    }


def _whole(values: Tensor) -> list[int]:
    return [int(v) for v in values.reshape(-1).tolist()]


def _constant(a: dict[str, Any]) -> Tensor:
    from onnx import numpy_helper

    if "value" not in a:
        raise Unknown("Constant without a tensor")
    return tensor(numpy_helper.to_array(a["value"]))


def _value_of(a: dict[str, Any]) -> float:
    from onnx import numpy_helper

    return numpy_helper.to_array(a["value"]).reshape(-1)[0].item() if "value" in a else 0.0


def _type_of(a: dict[str, Any]) -> Any:
    return _constant(a).dtype if "value" in a else import_runtime("torch").float32


def _cast(x: Tensor, to: int) -> Tensor:
    torch = import_runtime("torch")
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(to))
    if kind == np.bool_:
        return x != 0
    if np.issubdtype(kind, np.floating):
        return x.to(torch.float32)
    if kind.itemsize < 4:
        raise Unknown(f"Cast to {kind.name}")
    return x.to(torch.int64)


def _reshape(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    sizes = _whole(x[1])
    if not a.get("allowzero", 0):
        sizes = [x[0].shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x[0].reshape(sizes)


def _unsqueeze(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    made, axes = x[0], _whole(x[1])
    rank = made.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        made = made.unsqueeze(axis)
    return made


def _split(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    axis, torch = a.get("axis", 0), import_runtime("torch")
    if len(x) > 1 and x[1] is not None:
        return torch.split(x[0], _whole(x[1]), axis)
    return torch.split(x[0], -(-x[0].shape[axis] // a["outputs"]), axis)


def _slice(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    torch = import_runtime("torch")
    starts, ends = _whole(x[1]), _whole(x[2])
    axes = _whole(x[3]) if len(x) > 3 and x[3] is not None else list(range(len(starts)))
    steps = _whole(x[4]) if len(x) > 4 and x[4] is not None else [1] * len(starts)
    made = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        taken = range(made.shape[axis])[start:end:step]
        made = made.index_select(axis, torch.tensor(list(taken), dtype=torch.int64))
    return made


def _gather(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    axis, index = a.get("axis", 0), x[1].to(import_runtime("torch").int64)
    index = index % x[0].shape[axis]
    shape = (*x[0].shape[: axis % x[0].ndim], *index.shape, *x[0].shape[axis % x[0].ndim + 1 :])
    return x[0].index_select(axis, index.reshape(-1)).reshape(shape)


def _pad(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    mode = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}.get(a.get("mode", b"constant"))
    pads, rank = _whole(x[1]), x[0].ndim
    axes = _whole(x[3]) if len(x) > 3 and x[3] is not None else list(range(rank))
    wanted = {axis % rank: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    flat = [n for axis in reversed(range(rank)) for n in wanted.get(axis, (0, 0))]
    F = import_runtime("torch").nn.functional
    if mode is None:
        raise Unknown("Pad of another mode")
    if mode == "constant":
        return F.pad(x[0], flat, value=float(x[2]) if len(x) > 2 and x[2] is not None else 0.0)
    return F.pad(x[0], flat[: 2 * (rank - 2)], mode=mode)


def _gemm(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    left, right = x[0].T if a.get("transA", 0) else x[0], x[1].T if a.get("transB", 0) else x[1]
    made = a.get("alpha", 1.0) * (left @ right)
    return made if len(x) < 3 or x[2] is None else made + a.get("beta", 1.0) * x[2]


def _window(x: Tensor, kernel: Sequence[int], a: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads (all starts, then all ends)."""
    axes = len(kernel)
    strides, dilations = a.get("strides") or [1] * axes, a.get("dilations") or [1] * axes
    pads = a.get("pads") or [0] * 2 * axes
    if (mode := a.get("auto_pad", b"NOTSET")) in (b"SAME_UPPER", b"SAME_LOWER"):
        sizes = zip(x.shape[2:], kernel, strides, dilations, strict=True)
        total = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in sizes]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + more if mode == b"SAME_UPPER" else more + less
    return list(strides), list(dilations), list(pads)


def _around(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    axes = len(pads) // 2
    flat = [n for axis in reversed(range(axes)) for n in (pads[axis], pads[axis + axes])]
    return import_runtime("torch").nn.functional.pad(x, flat, value=value) if any(pads) else x


def _conv(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    axes, F = x[1].ndim - 2, import_runtime("torch").nn.functional
    strides, dilations, pads = _window(x[0], x[1].shape[2:], a)
    bias = x[2] if len(x) > 2 else None
    if even := pads[:axes] == pads[axes:]:
        inside, pads = pads[:axes], [0] * 2 * axes
    call = getattr(F, f"conv{axes}d")
    padding = inside if even else 0
    return call(_around(x[0], pads), x[1], bias, strides, padding, dilations, a.get("group", 1))


def _conv_transpose(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    axes, F = x[1].ndim - 2, import_runtime("torch").nn.functional
    if a.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in a:
        raise Unknown("ConvTranspose of a given output size")
    strides, dilations, pads = _window(x[0], x[1].shape[2:], a)
    more = a.get("output_padding") or [0] * axes
    made = getattr(F, f"conv_transpose{axes}d")(
        x[0], x[1], x[2] if len(x) > 2 else None, strides, 0, more, a.get("group", 1), dilations
    )
    for axis in range(axes):
        made = made.narrow(2 + axis, pads[axis], made.shape[2 + axis] - pads[axis] - pads[axis + axes])
    return made


def _pool(x: list[Tensor], a: dict[str, Any], kind: str) -> Tensor:
    kernel, F = a["kernel_shape"], import_runtime("torch").nn.functional
    strides, dilations, pads = _window(x[0], kernel, a)
    axes = len(kernel)
    if a.get("ceil_mode", 0) or a["outputs"] > 1 or (kind == "avg" and any(d != 1 for d in dilations)):
        raise Unknown(f"{kind} pool of another form")
    if kind == "max":
        return getattr(F, f"max_pool{axes}d")(_around(x[0], pads, -math.inf), kernel, strides, 0, dilations)
    call = getattr(F, f"avg_pool{axes}d")
    if not any(pads) or a.get("count_include_pad", 0):
        return call(_around(x[0], pads), kernel, strides)
    ones = import_runtime("torch").ones_like(x[0][:1, :1])
    return call(_around(x[0], pads), kernel, strides) / call(_around(ones, pads), kernel, strides)


def _layer_norm(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    axes = list(range(a.get("axis", -1) % x[0].ndim, x[0].ndim))
    mean = x[0].mean(axes, keepdim=True)
    spread = ((x[0] - mean) ** 2).mean(axes, keepdim=True)
    made = (x[0] - mean) / import_runtime("torch").sqrt(spread + a.get("epsilon", 1e-5)) * x[1]
    return made if len(x) < 3 or x[2] is None else made + x[2]


def _resize(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    F, axes = import_runtime("torch").nn.functional, x[0].ndim - 2
    sizes = _whole(x[3]) if len(x) > 3 and x[3] is not None else None
    if sizes is None:
        sizes = [int(n * s) for n, s in zip(x[0].shape, x[2].reshape(-1).tolist(), strict=True)]
    mode, place = a.get("mode", b"nearest"), a.get("coordinate_transformation_mode", b"half_pixel")
    if list(sizes[:2]) != list(x[0].shape[:2]) or "axes" in a:
        raise Unknown("Resize of other axes")
    if mode == b"nearest":
        whole = all(n % m == 0 for n, m in zip(sizes[2:], x[0].shape[2:], strict=True))
        if not whole:
            raise Unknown("Resize by a fraction")
        return F.interpolate(x[0], size=sizes[2:], mode="nearest")
    named = {1: "linear", 2: "bilinear", 3: "trilinear"}.get(axes)
    if mode != b"linear" or named is None or place not in (b"half_pixel", b"pytorch_half_pixel", b"align_corners"):
        raise Unknown("Resize of another mode")
    return F.interpolate(x[0], size=sizes[2:], mode=named, align_corners=place == b"align_corners")


def _depth_to_space(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    n, channels, height, width = x[0].shape
    b, last = a["blocksize"], a.get("mode", b"DCR") == b"CRD"
    apart = (n, channels // b**2, b, b, height, width) if last else (n, b, b, channels // b**2, height, width)
    order = (0, 1, 4, 2, 5, 3) if last else (0, 3, 4, 1, 5, 2)
    return x[0].reshape(apart).permute(order).reshape(n, channels // b**2, height * b, width * b)


def _spread(scale: Tensor, like: Sequence[int], a: dict[str, Any]) -> Tensor:
    """A scale or zero point for every value: of the whole, along an axis, or of blocks."""
    axis = a.get("axis", 1)
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        return scale.reshape([-1 if i == axis % len(like) else 1 for i in range(len(like))])
    return scale.repeat_interleave(a["block_size"], axis).narrow(axis, 0, like[axis])


def _quantize(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    """Whole numbers of INT8; the zero point has no other type in a Q/DQ model of ours."""
    torch = import_runtime("torch")
    free = x[0] / _spread(x[1], x[0].shape, a)
    if len(x) > 2 and x[2] is not None:
        free = free + _spread(x[2], x[0].shape, a)
    free = torch.clamp(free, -128, 127)
    codes = free + (torch.round(free) - free).detach()
    return codes if a["rounded"] is None else a["rounded"](free, codes)


def _dequantize(x: list[Tensor], a: dict[str, Any]) -> Tensor:
    codes = x[0] if len(x) < 3 or x[2] is None else x[0] - _spread(x[2], x[0].shape, a)
    return codes * _spread(x[1], x[0].shape, a)
