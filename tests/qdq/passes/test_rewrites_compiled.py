"""What every rewrite is for: the compiled result, on the CPU, in sizes of real networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import build, conv, node, normal, quantized, samples
from transformer_graphs import windows

from engines.backends import rtx
from engines.verify import audit
from qdq.assemble.precision.convert import convert
from qdq.model.model import Model
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES
from qdq.plan import placement

pytest.importorskip("tensorrt_rtx")


def test_conv_transpose_runs_in_int8() -> None:
    tensors = {"w": normal(8, 4, 2, 2, 2), "b": normal(4, seed=1)}
    nodes = [node("ConvTranspose", "x w b", "a", strides=[2, 2, 2]), node("Relu", "a", "y")]
    model = FLOAT_REWRITES["conv_transpose"](build(nodes, {"x": (1, 8, 5, 5, 5)}, tensors)).model
    assert placement.plan(model).points
    made = quantized(model, samples(model)).model.proto
    assert audit.audit(made, rtx.build(made).table).int8_share == 1.0


def test_hoisted_fp16_convolution_writes_half_the_bytes() -> None:
    plain = conv((64, 64, 3, 3), (28, 28), pads=[1, 1, 1, 1])
    made = convert(quantized(plain, samples(plain), shift=False).model).model
    written = []
    for model in (made, QUANTIZED_REWRITES["hoist"](made).model):
        table = rtx.build(model.proto).table
        kernel = audit.compute_kernel(table.layers, "conv")
        assert kernel is not None and audit.consumed_dtype(kernel) == "int8"
        written.append(sum(t.nbytes or 0 for t in kernel.outputs))
    assert written[1] * 2 == written[0] == 4 * math.prod((64, 28, 28))


@pytest.mark.parametrize("name", ["head_size", "norm_channels"])
def test_fp16_kernels_become_fewer_and_lighter(name: str) -> None:
    """Sizes as in SwinUNETR (343 tokens, heads of 8) and MONAI's UNet (14 channels)."""
    if name == "head_size":
        sizes = {"q": (16, 3, 343, 8), "k": (16, 3, 8, 343), "v": (16, 3, 343, 8)}
        nodes = [node("MatMul", "q k", "s"), node("Softmax", "s", "p"), node("MatMul", "p v", "y", name="mix")]
        model = build(nodes, sizes)
    else:
        tensors = {"w": normal(14, 8, 3, 3, 3), "g": normal(14), "h": normal(14)}
        nodes = [
            node("Conv", "x w", "a", pads=[1] * 6),
            node("InstanceNormalization", "a g h", "n"),
            node("Relu", "n", "y"),
        ]
        model = build(nodes, {"x": (1, 8, 48, 48, 48)}, tensors)
    before, after = (rtx.build(convert(m).model.proto).table for m in (model, FLOAT_REWRITES[name](model).model))
    assert before.bytes_moved and after.bytes_moved
    assert after.kernels < before.kernels and after.bytes_moved < 0.8 * before.bytes_moved


def test_norm_scale_leaves_fewer_kernels_that_move_less_than_hoist() -> None:
    tensors = {"w": normal(16, 16, 3, 3, 3), "v": normal(16, 16, 3, 3, 3), "g": normal(16), "h": normal(16)}
    nodes = []
    for before, weight, after in (("x", "w", "y0"), ("y0", "v", "y")):
        nodes += [
            node("Conv", f"{before} {weight}", f"a{weight}", f"conv_{weight}", pads=[1] * 6),
            node("InstanceNormalization", f"a{weight} g h", f"n{weight}", f"norm_{weight}"),
            node("Relu", f"n{weight}", after, f"relu_{weight}"),
        ]
    plain = build(nodes, {"x": (1, 16, 48, 48, 48)}, tensors)
    made = convert(quantized(plain, samples(plain), shift=False).model).model
    hoisted, scaled_ = (rtx.build(QUANTIZED_REWRITES[n](made).model.proto).table for n in ("hoist", "norm_scale"))
    assert hoisted.bytes_moved and scaled_.bytes_moved
    assert scaled_.kernels < hoisted.kernels and scaled_.bytes_moved < 0.9 * hoisted.bytes_moved


@pytest.mark.parametrize("name", ["norm_one_channel", "conv_shortcut", "constants"])
def test_fp16_kernels_move_less(name: str) -> None:
    """Sizes as in DynUNet (16 channels from one), MONAI's UNet (14 channels) and SwinUNETR (343 tokens)."""
    tensors = {"g": normal(16), "h": normal(16), "w": normal(16, 1, 1, 1, 1), "v": normal(14, 14, 3, 3, 3)}
    if name == "norm_one_channel":
        nodes = [node("Conv", "x w", "a"), node("InstanceNormalization", "a g h", "n"), node("Relu", "n", "y")]
        model = build(nodes, {"x": (1, 1, 48, 48, 48)}, tensors)
    elif name == "conv_shortcut":
        nodes = [node("Relu", "x", "r"), node("Conv", "r v", "a", pads=[1] * 6), node("Add", "a r", "y")]
        model = build(nodes, {"x": (1, 14, 48, 48, 48)}, tensors)
    else:
        model = windows(64, 343)
    before, after = (rtx.build(convert(m).model.proto).table for m in (model, FLOAT_REWRITES[name](model).model))
    assert before.bytes_moved and after.bytes_moved
    assert after.bytes_moved < 0.9 * before.bytes_moved


def feed_forward(shape: tuple[int, ...] = (1568, 384), curve: str = "Tanh") -> Model:
    """x -> MatMul -> Add -> GELU -> MatMul -> Add -> y, four times as wide inside."""
    size = shape[-1]
    tensors = {"w": normal(size, 4 * size), "b": normal(4 * size), "v": normal(4 * size, size), "c": normal(size)}
    numbers = {"one": 1.0, "half": 0.5, "three": 3.0, "f": 0.044715, "k": (2 / np.pi) ** 0.5, "root": 2**0.5}
    tensors |= {name: np.float32([value]) for name, value in numbers.items()}
    nodes = [node("MatMul", "x w", "h", "first"), node("Add", "h b", "a", "add_b")]
    if curve == "Tanh":
        nodes += [node("Pow", "a three", "a3"), node("Mul", "a3 f", "fa3", "times_f"), node("Add", "a fa3", "p", "sum")]
        nodes.append(node("Mul", "p k", "q", "times_k"))
    else:
        nodes.append(node("Div", "a root", "q"))
    nodes += [node(curve, "q", "t"), node("Add", "t one", "u", "plus"), node("Mul", "a u", "g", "times")]
    nodes += [
        node("Mul", "g half", "r", "halve"),
        node("MatMul", "r v", "s", "second"),
        node("Add", "s c", "y", "add_c"),
    ]
    read = {name for n in nodes for name in n.input}
    return build(nodes, {"x": shape}, {name: values for name, values in tensors.items() if name in read})


def bert(size: int = 384) -> Model:
    """x -> norm -> MatMul, and the norm on top -> norm -> MatMul -> y, as BERT does; the norms are written out."""
    tensors = {"axes": np.array([-1]), "two": np.float32([2]), "eps": np.float32([1e-12])}
    nodes, last = [], "x"
    for i in range(2):
        tensors |= {f"g{i}": normal(size), f"b{i}": normal(size), f"w{i}": normal(size, size, seed=i) * 0.05}
        steps = (
            ("ReduceMean", f"{last} axes", "m"),
            ("Sub", f"{last} m{i}", "d"),
            ("Pow", f"d{i} two", "q"),
            ("ReduceMean", f"q{i} axes", "v"),
            ("Add", f"v{i} eps", "e"),
            ("Sqrt", f"e{i}", "s"),
            ("Div", f"d{i} s{i}", "n"),
            ("Mul", f"n{i} g{i}", "h"),
            ("Add", f"h{i} b{i}", "o"),
            ("MatMul", f"o{i} w{i}", "p"),
            ("Add", f"o{i} p{i}", "z"),
        )
        nodes += [node(op, reads, f"{made}{i}", f"{op}_{made}{i}") for op, reads, made in steps]
        last = f"z{i}"
    nodes.append(node("Relu", last, "y"))
    return build(nodes, {"x": (8, 196, size)}, tensors)


def causal(size: int = 384, heads: int = 6, length: int = 196) -> Model:
    """Attention as PyTorch exports it: Q and K scaled by the fourth root each, a mask of 0 and -10^4 added."""
    tensors = {f"w{i}": normal(size, size, seed=ord(i)) * 0.05 for i in "qkvo"}
    tensors |= {f"b{i}": normal(size, seed=ord(i)) for i in "qkv"}
    tensors |= {"apart": np.array([0, 0, heads, size // heads]), "together": np.array([0, 0, size])}
    tensors |= {"root": np.float32([(size / heads) ** -0.25])}
    tensors["mask"] = np.where(np.tri(length) > 0, 0, -1e4).astype(np.float32)[None, None]
    nodes = []
    for i in "qkv":
        order = [0, 2, 3, 1] if i == "k" else [0, 2, 1, 3]
        nodes += [node("MatMul", f"x w{i}", f"{i}0", f"project_{i}"), node("Add", f"{i}0 b{i}", f"{i}1", f"add_{i}")]
        nodes.append(node("Reshape", f"{i}1 apart", f"{i}2", f"apart_{i}"))
        nodes.append(node("Transpose", f"{i}2", i, f"turn_{i}", perm=order))
    nodes += [node("Mul", "q root", "qs", "scale_q"), node("Mul", "k root", "ks", "scale_k")]
    nodes += [node("MatMul", "qs ks", "s", "scores"), node("Add", "s mask", "t", "add_mask"), node("Softmax", "t", "p")]
    nodes += [node("MatMul", "p v", "m", "mix"), node("Transpose", "m", "n", "turn_back", perm=[0, 2, 1, 3])]
    nodes += [node("Reshape", "n together", "r", "together"), node("MatMul", "r wo", "y", "project_o")]
    return build(nodes, {"x": (8, length, size)}, tensors)


def masked_windows() -> Model:
    """Attention of 64 windows of 343 tokens in 3 heads of 8, padded, as in SwinUNETR; the mask has 8 groups each."""
    labels = np.random.default_rng(0).integers(0, 8, (64, 343))
    mask = np.where(labels[:, :, None] == labels[:, None, :], 0, -100).astype(np.float32)[:, None]
    nodes = [
        node("MatMul", "q k", "s", "scores"),
        node("Add", "s mask", "t"),
        node("Softmax", "t", "p"),
        node("MatMul", "p v", "y", "mix"),
    ]
    sizes = {"q": (64, 3, 343, 8), "k": (64, 3, 8, 343), "v": (64, 3, 343, 8)}
    return FLOAT_REWRITES["head_size"](build(nodes, sizes, {"mask": mask})).model


def swin() -> Model:
    """x and a product of it -> shortcut -> norm -> rolled by three -> windows of 7 x 7 -> MatMul -> y."""
    tensors = {"g": normal(96), "b": normal(96), "w": normal(96, 96) * 0.1, "v": normal(96, 288), "c": normal(288)}
    tensors |= {"three": np.array([3]), "end": np.array([56]), "zero": np.array([0]), "one": np.array([1])}
    tensors |= {"two": np.array([2]), "flat": np.array([-1, 96]), "apart": np.array([8, 8, 7, 8, 7, 96])}
    tensors |= {"back": np.array([8, 56, 56, 96]), "rows": np.array([512, 49, 96])}
    nodes = [
        node("Reshape", "x flat", "f", "flat"),
        node("MatMul", "f w", "p", "before"),
        node("Reshape", "p back", "s"),
    ]
    nodes += [node("Add", "x s", "r", "shortcut"), node("LayerNormalization", "r g b", "n", "norm")]
    last = "n"
    for axis, name in ((1, "one"), (2, "two")):
        nodes += [node("Slice", f"{last} three end {name}", f"tail{axis}", f"tail{axis}")]
        nodes += [node("Slice", f"{last} zero three {name}", f"head{axis}", f"head{axis}")]
        last = f"rolled{axis}"
        nodes.append(node("Concat", f"tail{axis} head{axis}", last, last, axis=axis))
    nodes += [node("Reshape", f"{last} apart", "a", "apart"), node("Transpose", "a", "t", perm=[0, 1, 3, 2, 4, 5])]
    nodes += [
        node("Reshape", "t rows", "q", "rows"),
        node("MatMul", "q v", "m", "after"),
        node("Add", "m c", "y", "add_c"),
    ]
    nodes.append(node("Relu", "r", "z"))
    return build(nodes, {"x": (8, 56, 56, 96)}, tensors, outputs=("y", "z"))


WRITTEN = {
    "attention_scale": causal,
    "flatten": lambda: feed_forward((8, 56, 56, 96), "Erf"),
    "gelu": feed_forward,
    "layer_norm": bert,
    "norm_late": swin,
    "window_mask": masked_windows,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_move_less(name: str) -> None:
    """A ViT of 8 images of 196 tokens of 384 values; a Swin stage of 56 x 56 tokens; SwinUNETR."""
    model = WRITTEN[name]()
    before, after = (rtx.build(convert(m).model.proto).table for m in (model, FLOAT_REWRITES[name](model).model))
    assert before.bytes_moved and after.bytes_moved
    assert after.bytes_moved < 0.95 * before.bytes_moved
