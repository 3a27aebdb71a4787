"""Every rewrite: the same outputs, no firing where it must not, nothing more at the second time, and what it is for."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, conv, node, normal, product, quantized, run, samples
from transformer_graphs import PACKED, attention, gelu, grouped, layer_norm, mlp, packed, partition, windows

from engines.core import arithmetic, onnx_runtime as ort
from qdq.assemble.precision.convert import convert
from qdq.model.model import Model
from qdq.passes import rewrites
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES
from qdq.passes.rewrites.attention.scores import scores

REWRITES = {**FLOAT_REWRITES, **QUANTIZED_REWRITES}
NORM_FORMS = ("torch", "product", "swapped", "plain", "keras", "twice", "sum")
GELU_FORMS = ("torch", "half first", "half of erf", "tanh", "cube", "factored")


def transposed(rank: int = 2, kernel: int = 2, stride: int = 2, size: int | str = 5, **attributes: object) -> Model:
    """x -> ConvTranspose with a bias -> Relu -> y."""
    tensors = {"w": normal(8, 4, *(kernel,) * rank), "b": normal(4, seed=1)}
    nodes = [node("ConvTranspose", "x w b", "a", strides=[stride] * rank, **attributes), node("Relu", "a", "y")]
    return build(nodes, {"x": (1, 8, *(size,) * rank)}, tensors)


def normalized(op: str = "Conv", channels: int = 6, *, output: bool = False, group: int = 1) -> Model:
    """x -> Conv or ConvTranspose with a bias -> InstanceNormalization -> Relu -> y."""
    shape = (channels, 4, 3, 3) if op == "Conv" else (4, channels, 3, 3)
    tensors = {
        "w": normal(shape[0], shape[1] // group, *shape[2:]),
        "b": normal(channels, seed=1),
        "g": normal(channels, seed=2),
        "h": normal(channels, seed=3),
    }
    nodes = [
        node(op, "x w b", "a", group=group),
        node("InstanceNormalization", "a g h", "n"),
        node("Relu", "n", "y"),
    ]
    return build(nodes, {"x": (1, 4, 6, 6)}, tensors, outputs=("y", "a") if output else ("y",))


def stack(*, shortcut: bool = False, divided: bool = False) -> Model:
    """x -> (Conv -> InstanceNormalization -> x * sigmoid(x / 2)) twice -> Conv -> y; both Convs of 6 channels."""
    tensors = {"w": normal(6, 4, 3, 3), "v": normal(6, 6, 3, 3), "u": normal(4, 6, 1, 1), "two": np.float32([2])}
    tensors |= {"g": normal(6, seed=2), "h": normal(6, seed=3)}
    nodes, last = [], "x"
    for index, weight in enumerate("wv"):
        nodes += [
            node("Conv", f"{last} {weight}", f"a{index}", f"conv_{index}", pads=[1] * 4),
            node("InstanceNormalization", f"a{index} g h", f"n{index}", f"norm_{index}"),
            node("Div", f"n{index} two", f"d{index}", f"div_{index}"),
            node("Sigmoid", f"d{index}", f"s{index}", f"sigmoid_{index}"),
            node("Div" if divided else "Mul", f"n{index} s{index}", f"m{index}", f"mul_{index}"),
        ]
        last = f"m{index}"
    nodes.append(node("Conv", f"{last} u", "y", "last"))
    if shortcut:
        nodes[-1] = node("Add", "m0 m1", "y")
    return build(nodes, {"x": (1, 4, 6, 6)}, tensors)


def scaled(factors: float = 4.0, **options: object) -> Model:
    """A quantized Conv whose channel scales are up to `factors` apart."""
    shape = (8, 4, 3, 3)
    values = normal(*shape) * np.geomspace(1, factors, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    model = conv(shape, values=values, **options)  # type: ignore[arg-type]
    return quantized(model, samples(model), shift=False).model


def normalized_codes(factors: float = 4.0, *, norms: int = 1, output: bool = False, epsilon: float = 1e-5) -> Model:
    """A quantized Conv with a bias whose scales are up to `factors` apart -> InstanceNormalization (one or more)."""
    weight = normal(8, 4, 3, 3) * np.geomspace(1, factors, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    tensors = {"w": weight, "b": normal(8, seed=1), "g": normal(8, seed=2), "h": normal(8, seed=3)}
    nodes = [node("Conv", "x w b", "a")]
    nodes += [node("InstanceNormalization", "a g h", f"y{i}", f"norm_{i}", epsilon=epsilon) for i in range(norms)]
    outputs = (*(f"y{i}" for i in range(norms)), *(["a"] if output else []))
    model = build(nodes, {"x": (1, 4, 9, 9)}, tensors, outputs=outputs)
    return quantized(model, samples(model), shift=False).model


def behind(model: Model) -> Model:
    """A constant per channel added behind the Conv, and another subtracted."""
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(8, 1, 1, seed=4), "c"))
    index = next(i for i, n in enumerate(proto.graph.node) if n.op_type == "Conv")
    proto.graph.node[index].output[0] = "before"
    for new in (node("Sub", "less c", "a", "sub"), node("Add", "c before", "less", "add")):
        proto.graph.node.insert(index + 1, new)
    return model.replace(proto)


def one_channel(
    kernel: int = 1, channels: int = 1, size: int | str = 6, *, bias: bool = True, **attributes: object
) -> Model:
    """x of few channels -> Conv -> InstanceNormalization -> Relu -> y; one of the Conv's weights is near zero."""
    weight = normal(8, channels, kernel, kernel, kernel)
    weight[0] = 1e-3
    tensors = {"w": weight, "b": normal(8, seed=1), "g": normal(8, seed=2), "h": normal(8, seed=3)}
    nodes = [
        node("Conv", "x w b" if bias else "x w", "a", **attributes),
        node("InstanceNormalization", "a g h", "n"),
        node("Relu", "n", "y"),
    ]
    return build(nodes, {"x": ("n", channels, size, size, size)}, tensors)


def shortcut(
    order: str = "c x",
    kernel: int = 3,
    size: int | str = 6,
    *,
    group: int = 1,
    output: bool = False,
    **attributes: object,
) -> Model:
    """x -> Conv c -> Add(c, x) -> y."""
    tensors = {"w": normal(4, 4 // group, kernel, kernel), "b": normal(4, seed=1)}
    pads = attributes.pop("pads", [kernel // 2] * 4)
    nodes = [node("Conv", "x w b", "c", group=group, pads=pads, **attributes), node("Add", order, "y")]
    return build(nodes, {"x": (2, 4, size, size)}, tensors, outputs=("y", "c") if output else ("y",))


def too_large() -> Model:
    """A constant of 512 MiB."""
    nodes = [node("ConstantOfShape", "shape", "ones"), node("Mul", "x ones", "y")]
    return build(nodes, {"x": (1, 1)}, {"shape": np.array([1 << 14, 1 << 13])})


def skipped(*, alike: bool = True, channels: int = 4, shift: bool = True) -> Model:
    """relu(x) is read by a padded Conv and, joined with relu(z), by another; all have the same scale and offset."""
    shape = (1, channels, 5, 5)
    tensors = {"w": normal(4, channels, 3, 3), "v": normal(4, 2 * channels, 3, 3, seed=1), "f": np.float32([9])}
    nodes = [
        node("Relu", "x", "t"),
        node("Relu", "z", "r", "relu_right"),
        *([] if alike else [node("Mul", "r f", "u")]),
        node("Conv", "t w", "a", "down", pads=[1] * 4),
        node("Concat", "t r" if alike else "t u", "both", axis=1),
        node("Conv", "both v", "b", "up", pads=[1] * 4),
    ]
    model = build(nodes, {"x": shape, "z": shape}, tensors, outputs=("a", "b"))
    return quantized(model, samples(model), shift=shift).model


POSITIVE: dict[str, dict[str, Callable[[], Model]]] = {
    "packed_projection": {form: partial(packed, form) for form in PACKED},
    "conv_transpose": {
        "2-D": transposed,
        "3-D": lambda: transposed(3),
        "dynamic 2-D": lambda: transposed(size="s"),
        "dynamic 3-D": lambda: transposed(3, size="s"),
        "kernel 3, stride 2": lambda: transposed(kernel=3, pads=[1] * 4, output_padding=[1, 1]),
        "kernel 4, stride 2": lambda: transposed(kernel=4, pads=[1] * 4),
        "kernel 4, no padding": lambda: transposed(kernel=4),
        "kernel 5, stride 3": lambda: transposed(kernel=5, stride=3, pads=[1] * 4),
        "kernel below stride": lambda: transposed(kernel=1, output_padding=[1, 1]),
        "kernel 3, dynamic 3-D": lambda: transposed(3, 3, size="s", pads=[1] * 6, output_padding=[1] * 3),
    },
    "norm_bias": {"Conv": normalized, "ConvTranspose": lambda: normalized("ConvTranspose")},
    "norm_channels": {
        "Conv": normalized,
        "ConvTranspose": lambda: normalized("ConvTranspose"),
        "read by Convs": stack,
        "read by an Add": lambda: stack(shortcut=True),
        "divisor": lambda: stack(divided=True),
    },
    "norm_one_channel": {
        "3-D": one_channel,
        "no bias": lambda: one_channel(bias=False),
        "dynamic": lambda: one_channel(size="s"),
        "all said": lambda: one_channel(strides=[1] * 3, pads=[0] * 6, dilations=[1] * 3),
    },
    "conv_shortcut": {
        "before": shortcut,
        "behind": lambda: shortcut("x c"),
        "1 x 1": lambda: shortcut(kernel=1),
        "grouped": lambda: shortcut(group=2),
        "dilated": lambda: shortcut(dilations=[2, 2], pads=[2] * 4),
        "even kernel": lambda: shortcut(kernel=2, pads=[0, 1, 1, 0]),
        "dynamic": lambda: shortcut(size="s"),
    },
    "constants": {"mask": windows},
    "norm_scale": {
        "bias": normalized_codes,
        "constants behind": lambda: behind(normalized_codes()),
        "two norms": lambda: normalized_codes(norms=2),
        "far apart": lambda: normalized_codes(100.0),
    },
    "concat_codes": {"shifted": skipped, "symmetric": lambda: skipped(shift=False)},
    "head_size": {
        "masked": attention,
        "plain": lambda: attention(masked=False),
        "heads of 3": lambda: attention(3),
        "turned keys": lambda: attention(turned=True),
        "small values": lambda: attention(16, value=8),
        "small keys": lambda: attention(8, value=16),
    },
    "layer_norm": {
        **{form: (lambda form=form: layer_norm(form)) for form in NORM_FORMS},
        "two axes": lambda: layer_norm(shape=(2, 3, 5, 4), axes=(-2, -1)),
        "all axes by number": lambda: layer_norm(shape=("n", 3, 6), axes=(2,)),
        "one gain for all": lambda: layer_norm(g=np.float32([3])),
        "gain of three axes": lambda: layer_norm(g=normal(1, 1, 8)),
    },
    "gelu": {
        **{form: (lambda form=form: gelu(form)) for form in GELU_FORMS},
    },
    "attention_scale": {
        "keys": lambda: attention(16, scales="k"),
        "both": lambda: attention(16, scales="qk"),
        "scores": lambda: attention(16, scales="s"),
        "everything": lambda: attention(16, scales="qks", masked=False),
    },
    "window_mask": {
        "plain": grouped,
        "16 values": lambda: grouped(16),
        "in zeros": lambda: grouped(padded=True),
        "turned": lambda: grouped(turned=True),
        "turned, in zeros": lambda: grouped(turned=True, padded=True),
        "split": lambda: grouped(split=True, bias="before"),
        "bias behind": lambda: grouped(split=True, bias="behind", padded=True),
        "bias between": lambda: grouped(bias="before"),
    },
    "norm_late": {
        "padded": partition,
        "rolled": lambda: partition(roll=True),
        "cropped": lambda: partition(pad=0),
        "axis from the front": lambda: partition(axis=3),
        "up to a turn of the last axis": lambda: partition(last=True, roll=True),
        "gain of four axes": lambda: partition(rows=(1, 1, 1)),
    },
    "flatten": {
        "GELU": mlp,
        "three axes in front": lambda: mlp((2, 3, 2, 4, 8)),
        "dynamic": lambda: mlp(("n", 3, 4, 8)),
        "also an output": lambda: mlp(output=True),
        "another tensor inside": lambda: mlp(inner="sum"),
        "a grid inside": lambda: mlp(inner="grid"),
    },
    "hoist": {
        "bias": scaled,
        "no bias": lambda: scaled(bias=False),
        "equal scales": lambda: quantized_equal(),
        "grouped": lambda: scaled(group=2),
    },
}
NEGATIVE: dict[str, dict[str, Callable[[], Model]]] = {
    "packed_projection": {"not cut": product, "two computed tensors": attention},
    "conv_transpose": {
        "stride 1": lambda: transposed(kernel=3, stride=1),
        "odd output": lambda: transposed(kernel=3),
        "grouped": lambda: transposed(group=2),
        "automatic": lambda: transposed(auto_pad="SAME_UPPER"),
        "no ConvTranspose": conv,
    },
    "norm_bias": {
        "also an output": lambda: normalized(output=True),
        "no norm": conv,
        "no bias": lambda: one_channel(bias=False),
    },
    "norm_channels": {
        "8 channels": lambda: normalized(channels=8),
        "also an output": lambda: normalized(output=True),
        "grouped": lambda: normalized(group=2),
        "no norm": conv,
    },
    "norm_one_channel": {
        "two channels": lambda: one_channel(channels=2),
        "3 x 3": lambda: one_channel(3),
        "strided": lambda: one_channel(strides=[2] * 3),
        "padded": lambda: one_channel(pads=[1] * 6),
    },
    "conv_shortcut": {
        "also an output": lambda: shortcut(output=True),
        "around another tensor": lambda: shortcut("c c"),
        "shifted": lambda: shortcut(kernel=5, dilations=[1, 1], pads=[1, 1, 1, 1], order="c c"),
        "another size": lambda: shortcut(size=3, pads=[0] * 4),
        "no Add": conv,
    },
    "constants": {
        "beyond the limit": too_large,
        "another operator": lambda: build(
            [node("RandomNormalLike", "s", "c"), node("Mul", "x c", "y")], {"x": (1, 4)}, {"s": normal(4)}
        ),
        "nothing constant": conv,
    },
    "norm_scale": {
        "also an output": lambda: normalized_codes(output=True),
        "no norm": scaled,
        "float": normalized,
        "scales too far apart": lambda: normalized_codes(1e5),
        "large epsilon": lambda: normalized_codes(epsilon=0.1),
    },
    "concat_codes": {
        "other numbers": lambda: skipped(alike=False),
        "channels padded": lambda: skipped(channels=3),
        "no Concat": scaled,
    },
    "head_size": {"heads of 12": lambda: attention(12), "no softmax": lambda: attention(softmax=False)},
    "layer_norm": {
        "no mean subtracted": lambda: layer_norm("rms"),
        "epsilon outside": lambda: layer_norm("outside"),
        "first axis": lambda: layer_norm(axes=(0,)),
        "axes apart": lambda: layer_norm(axes=(0, 2), g=normal(2, 1, 8), b=normal(2, 1, 8)),
        "gain per row": lambda: layer_norm(g=normal(5, 1)),
        "dynamic axis": lambda: layer_norm(shape=(2, 5, "n"), g=np.float32([1]), b=np.float32([0])),
        "third power": lambda: layer_norm(two=np.float32([3])),
        "no epsilon": lambda: layer_norm(eps=np.float32([0])),
        "empty axis": lambda: layer_norm(shape=(2, 5, 0)),
        "sum of nothing": lambda: layer_norm("sum", shape=(2, 5, 0), n=np.float32([8])),
    },
    "gelu": {
        "another root": lambda: gelu(root=1.41),
        "another cube": lambda: gelu("tanh", c=0.045),
        "another root in float16": lambda: gelu(dtype="float16", root=1.413),
        "another cube in bfloat16": lambda: gelu("tanh", dtype="bfloat16", c=0.046),
        "float16 numbers in float32": lambda: gelu(root=float(np.float16(2**0.5))),
        "not halved": lambda: gelu(half=1.0),
        "also an output": lambda: gelu(output=True),
        "no GELU": conv,
    },
    "attention_scale": {
        "queries": lambda: attention(16, scales="q"),
        "none": lambda: attention(16),
        "no softmax": lambda: attention(16, scales="k", softmax=False),
    },
    "window_mask": {
        "groups overlap": lambda: grouped(overlap=True),
        "two depths": lambda: grouped(deep=True),
        "infinite": lambda: grouped(low=-math.inf),
        "18 groups": lambda: grouped(many=True),
        "scores are an output": lambda: grouped(output=True),
        "larger than the scores": lambda: grouped(shared=True),
        "another mask": attention,
    },
    "norm_late": {
        "two axes": lambda: partition(axis=2),
        "gain per row": lambda: partition(rows=(5,)),
        "gain per sample": lambda: partition(rows=(2, 1, 1)),
        "cropped by Pad": lambda: partition(pad=-2),
        "read by another": lambda: partition(twice=True),
        "no moves": mlp,
    },
    "flatten": {
        "three axes": lambda: mlp((2, 4, 8)),
        "two dynamic sizes": lambda: mlp(("n", "m", 4, 8)),
        "a weight of three axes": lambda: mlp((2, 3, 4, 4, 8), weight=3),
        "a matrix": product,
    },
    "hoist": {"scales too far apart": lambda: scaled(1e5), "float": conv},
}

# Why; the cases that are not listed have no node that the rewrite starts from.
REASONS: dict[str, dict[str, str]] = {
    "packed_projection": {"not cut": "not cut into parts", "two computed tensors": "with a constant matrix"},
    "conv_transpose": {
        "stride 1": "its stride is 1",
        "odd output": r"not 2 \* \(input",
        "grouped": "2 groups, not one",
        "automatic": "auto_pad",
    },
    "norm_bias": {
        "also an output": "'a' is not read by Inst",
        "no norm": "'a' is not read by Inst",
        "no bias": "no bias",
    },
    "norm_channels": {
        "8 channels": "8 channels are a multiple of 8",
        "also an output": "'a' is an output",
        "grouped": "of one group",
    },
    "norm_one_channel": {
        "two channels": r"Conv 'conv' .* \[8, 2, 1, 1, 1\]",
        "3 x 3": r"\[8, 1, 3, 3, 3\]",
        "strided": "has a stride or padding",
        "padded": "has a stride or padding",
    },
    "conv_shortcut": {
        "also an output": "'c' is an output",
        "around another tensor": "'c' has 2 readers, not one",
        "shifted": "'c' has 2 readers, not one",
        "another size": "not the shape of its input",
        "no Add": "Relu 'relu', which does not add",
    },
    "constants": {"beyond the limit": "larger than 256 MiB", "another operator": "its result is random"},
    "norm_scale": {
        "also an output": "'a' is an output",
        "no norm": "'a' is not read by InstanceNormalization alone",
        "float": "not stored in codes",
        "scales too far apart": "more than 1024 times apart",
        "large epsilon": "above 0.00101",
    },
    "concat_codes": {"other numbers": "same numbers as 'both_Pad_Deq", "channels padded": "no quantizer of one scale"},
    "head_size": {"heads of 12": "heads of 12 values are fused as they are"},
    "layer_norm": {
        "no mean subtracted": "less their mean",
        "epsilon outside": "not the root of a mean of squares",
        "first axis": "over the last axes",
        "axes apart": "over the last axes",
        "gain per row": "gain or shift differs along axes",
        "dynamic axis": "a normalized axis is dynamic",
        "third power": "not the root of a mean of squares",
        "no epsilon": "an epsilon above 0",
        "empty axis": "not the root of a mean of squares",
        "sum of nothing": "not the root of a mean of squares",
    },
    "gelu": {
        **dict.fromkeys(["another root", "another root in float16", "float16 numbers in float32"], "not that of Erf"),
        **dict.fromkeys(["another cube", "another cube in bfloat16"], "not that of Tanh"),
        "not halved": "'y' is an output",
        "also an output": "'u' is an output",
    },
    "attention_scale": dict.fromkeys(["queries", "none"], "neither the keys nor the scores"),
    "window_mask": {
        **dict.fromkeys(
            ["groups overlap", "two depths", "infinite", "18 groups", "another mask"], "no constant of 0 within"
        ),
        "scores are an output": "does not come from a MatMul",
        "larger than the scores": "mask 'mask': it, or another summand, is larger",
    },
    "norm_late": {
        "two axes": "other axes than the last",
        "gain per row": "differs from row to row",
        "gain per sample": "differs from row to row",
        "cropped by Pad": "none of Pad, Slice, Transpose",
        "read by another": "also read by other nodes",
    },
    "flatten": {
        "three axes": "has 3 axes",
        "two dynamic sizes": "two sizes .* are dynamic",
        "a weight of three axes": "its weight is no matrix",
        "a matrix": "has 2 axes",
    },
    "hoist": {"scales too far apart": "more than 1024 times apart", "float": "not stored in codes"},
}


def quantized_equal() -> Model:
    """A quantized Conv whose channels have the same largest weight."""
    weight = np.clip(normal(8, 4, 3, 3), -1, 1)
    weight[:, 0, 0, 0] = 1
    model = conv(values=weight)
    return quantized(model, samples(model), shift=False).model


def each(cases: dict[str, dict[str, Callable[[], Model]]]) -> pytest.MarkDecorator:
    """One test per rewrite and case."""
    rows = [pytest.param(r, make, id=f"{r}: {name}") for r, made in cases.items() for name, make in made.items()]
    return pytest.mark.parametrize(("name", "make"), rows)


def assert_same(before: Model, after: Model) -> None:
    """Outputs agree within float32 rounding of the longest sum: 1e-5 of the largest value."""
    data = samples(before)
    for old, new in zip(run(before, data), run(after, data), strict=True):
        assert list(old) == list(new)
        for key, values in old.items():
            assert values.shape == new[key].shape
            np.testing.assert_allclose(new[key], values, rtol=0, atol=1e-5 * float(np.abs(values).max()))


def test_every_rewrite_has_cases() -> None:
    assert set(REWRITES) == set(POSITIVE) == set(NEGATIVE) == set(REASONS)


def test_a_rewrite_dropped_in_as_one_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "from qdq.passes.rewrites.edit import Rewritten\n"
        'STAGE, RANK = "float", 4\n'
        "def rewrite(model, only=None): return Rewritten(model=model, fired=('toy',))\n"
    )
    monkeypatch.setattr(rewrites, "__path__", [*rewrites.__path__, str(tmp_path)])
    try:
        found = rewrites.found("float")
    finally:
        sys.modules.pop("qdq.passes.rewrites.toy", None)
    assert [name for name in found if name != "toy"] == list(FLOAT_REWRITES)
    assert list(found).index("toy") == 2 and found["toy"](conv()).fired == ("toy",)


def test_float_rewrites_come_in_the_order_of_their_rank() -> None:
    """A bias goes before channels are added to it; channels before phases multiply them."""
    assert [n for n in FLOAT_REWRITES if n.startswith(("norm", "conv"))] == [
        "norm_late",
        "norm_bias",
        "norm_one_channel",
        "norm_channels",
        "conv_shortcut",
        "conv_transpose",
    ]


def test_scales_before_a_norm_need_no_mul() -> None:
    """What `norm_scale` takes, `hoist` does not see; what it cannot take, `hoist` does."""
    assert list(QUANTIZED_REWRITES) == ["norm_scale", "hoist", "concat_codes"]
    done = QUANTIZED_REWRITES["norm_scale"](normalized_codes()).model
    assert QUANTIZED_REWRITES["hoist"](done).fired == ()
    assert "Mul" not in {n.op_type for n in done.graph.node}


@each(POSITIVE)
def test_outputs_stay(name: str, make: Callable[[], Model]) -> None:
    model = make()
    before = model.proto.SerializeToString(deterministic=True)
    done = REWRITES[name](model)
    assert done.fired and set(done.fired) <= {n.name for n in model.graph.node}
    onnx.checker.check_model(done.model.proto, full_check=True)
    names = [n.name for n in done.model.graph.node]
    assert len(set(names)) == len(names)
    assert model.proto.SerializeToString(deterministic=True) == before
    assert_same(model, done.model)


@each(POSITIVE)
def test_second_time_does_nothing_and_same_bytes_come_twice(name: str, make: Callable[[], Model]) -> None:
    model = make()
    done = REWRITES[name](model)
    again = REWRITES[name](done.model)
    assert again.fired == () and again.model is done.model
    twice = REWRITES[name](model).model.proto
    assert twice.SerializeToString(deterministic=True) == done.model.proto.SerializeToString(deterministic=True)


@each(POSITIVE)
def test_only_named_nodes(name: str, make: Callable[[], Model]) -> None:
    model = make()
    assert REWRITES[name](model, only=()).model is model
    fired = REWRITES[name](model).fired
    assert REWRITES[name](model, only=fired).fired == fired


@each(NEGATIVE)
def test_left_alone(name: str, make: Callable[[], Model]) -> None:
    model = make()
    done = REWRITES[name](model)
    assert done.fired == () and done.model is model
    reason = next((why for case, why in REASONS[name].items() if NEGATIVE[name][case] is make), None)
    assert bool(done.unfit) == (reason is not None)
    assert reason is None or any(re.search(reason, said) for said in done.unfit.values())


@each({name: POSITIVE[name] | NEGATIVE[name] for name in POSITIVE})
def test_a_node_that_may_be_changed_is_changed_or_has_a_reason(name: str, make: Callable[[], Model]) -> None:
    model = make()
    done = REWRITES[name](model)
    assert not set(done.fired) & set(done.unfit) and REWRITES[name](model, only=()).unfit == {}
    for node_name, reason in done.unfit.items():
        assert REWRITES[name](model, only=[node_name]).unfit == {node_name: reason}
        assert reason and not reason.endswith(".") and "\n" not in reason
    kinds = {model.node(node_name).op_type for node_name in (*done.fired, *done.unfit)}
    if name not in ("constants", "flatten"):  # one starts from any operator; the other fires on products alone
        assert {n.name for n in model.graph.node if n.op_type in kinds} == {*done.fired, *done.unfit}


def test_conv_transpose_weights_are_those_of_the_kernel() -> None:
    """Kernel = stride: as many weights as before, none of them a zero that costs arithmetic."""
    model = transposed(3)
    done = FLOAT_REWRITES["conv_transpose"](model).model
    (product,) = (n for n in done.graph.node if n.op_type == "Conv")
    assert sorted(done.array(product.input[1]).ravel()) == sorted(model.array("w").ravel())


@pytest.mark.parametrize("form", GELU_FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gelu_is_found_by_the_rounded_constants_of_its_type(dtype: str, form: str) -> None:
    model = gelu(form, dtype=dtype)
    done = FLOAT_REWRITES["gelu"](model)
    assert done.fired == ("curve",) and [n.op_type for n in done.model.graph.node] == ["Relu", "Gelu"]
    if dtype == "float16":  # ONNX Runtime has no Erf of bfloat16
        for old, new in zip(run(model, samples(model)), run(done.model, samples(model)), strict=True):
            np.testing.assert_allclose(new["y"], old["y"].astype(np.float64), rtol=4 * 2**-11, atol=1e-3)


def test_scores_are_found_past_what_a_rewrite_allows_between() -> None:
    model = grouped(split=True, bias="before")
    path = scores(model, "s4", ("Add", "Reshape"))
    assert [n.name for n in path] == ["together", "add_mask", "apart", "add_bias", "scores"]
    assert scores(model, "s4", ("Add",)) == [] and scores(model, "q", ("Add",)) == []
    assert scores(grouped(output=True), "s3", ("Add",)) == []


@pytest.mark.parametrize(("options", "cuts"), [({}, 0), ({"shortcut": True}, 2), ({"divided": True}, 2)])
def test_wide_channels_are_cut_only_where_something_else_reads_them(options: dict[str, bool], cuts: int) -> None:
    done = FLOAT_REWRITES["norm_channels"](stack(**options))
    assert done.fired == ("norm_0", "norm_1")
    assert sum(n.op_type == "Slice" for n in done.model.graph.node) == cuts
    widths = [done.model.array(n.input[1]).shape[:2] for n in done.model.graph.node if n.op_type == "Conv"]
    assert widths == {0: [(8, 4), (8, 8), (4, 8)]}.get(cuts, [(8, 4), (8, 6), (4, 6)][: len(widths)])


def test_hoist_bounds_the_unscaled_output() -> None:
    """The convolution's own output is nowhere larger than the scaled one, so FP16 does not overflow."""
    model = scaled(100.0, bias=False)
    done = QUANTIZED_REWRITES["hoist"](model).model
    unscaled = next(n for n in done.graph.node if n.op_type == "Conv").output[0]
    proto = onnx.ModelProto.FromString(done.proto.SerializeToString())
    for tensor in (unscaled, "a"):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    for values in run(proto, samples(model)):
        assert (np.abs(values[unscaled]) <= np.abs(values["a"]) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_hoist_keeps_the_digits_that_a_large_bias_cancels(dtype: str) -> None:
    """Products around 40, a bias that takes them to around 1: written without it, they would lose 5 bits."""
    weight = np.abs(normal(8, 4, 3, 3)) * np.geomspace(1, 4, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    tensors = {"w": weight, "b": -weight.sum(axis=(1, 2, 3)).astype(np.float32)}
    model = build([node("Conv", "x w b", "c"), node("Relu", "c", "y")], {"x": (1, 4, 9, 9)}, tensors)
    data = [{"x": (1 + 0.05 * normal(1, 4, 9, 9, seed=seed)).astype(np.float32)} for seed in range(3)]
    full = quantized(model, data, shift=False).model
    low = convert(full, unquantized_type=dtype).model
    hoisted = QUANTIZED_REWRITES["hoist"](low).model

    def error(candidate: Model) -> float:
        pairs = zip(run(full, data), ort.run(arithmetic.session(candidate.proto), data), strict=True)
        return sum(float(((wanted["y"] - found["y"]) ** 2).sum()) for wanted, found in pairs)

    assert error(hoisted) <= 1.5 * error(low)  # one rounding more, behind the Mul


@pytest.mark.parametrize("name", ["hoist", "norm_scale"])
def test_the_common_scale_is_a_power_of_two_below_all(name: str) -> None:
    """Its product with any code is exact in FP16 and BF16."""
    model = scaled(bias=False) if name == "hoist" else normalized_codes()
    done = QUANTIZED_REWRITES[name](model).model
    (before,), (after,) = (
        [m.array(n.input[1]) for n in m.graph.node if n.op_type == "DequantizeLinear" and m.is_constant(n.input[0])]
        for m in (model, done)
    )
    assert after.ndim == 0 and math.frexp(float(after))[0] == 0.5
    assert before.min() / 2 < after <= before.min()


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_norm_scale_differs_by_less_than_epsilon_over_the_variance(epsilon: float) -> None:
    """Weights so small that epsilon counts: the largest change stays below the bound that the module states."""
    model = normalized_codes(8.0, epsilon=epsilon)
    data = [{"x": 0.03 * s["x"]} for s in samples(model)]
    done = QUANTIZED_REWRITES["norm_scale"](model).model
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    proto.graph.output.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    shift = model.array("h").reshape(-1, 1, 1)
    for old, new in zip(run(proto, data), run(done, data), strict=True):
        variance = old["a"].var(axis=(2, 3), keepdims=True)
        bound = epsilon / (2 * variance) * np.abs(old["y0"] - shift) + 1e-5
        assert (np.abs(new["y0"] - old["y0"]) <= bound).all()
        if epsilon > 1e-4:
            assert np.abs(new["y0"] - old["y0"]).max() > 1e-4  # the bound is not met by doing nothing
