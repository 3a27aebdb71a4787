"""A small decoder as Hugging Face's exports have it: one step of Llama with a cache of keys and values; a lookup."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import node, normal
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdq.model import storage
from qdq.model.model import Model
from qdq.passes.prepare import prepare

ROWS, WIDTH = 600, 128  # of `lookup`


def llama(
    *, layers: int = 2, heads: int = 4, groups: int = 2, size: int = 16, words: int = 50, past: int | None = None
) -> onnx.ModelProto:
    """input_ids, attention_mask, position_ids and past keys and values -> logits, present keys and values.

    RMSNorm in primitives, rotary positions, grouped queries, a causal mask of the least float, a gated unit. All of
    it in FP32 and opset 21, with dynamic batch, length and past; `past` fixes the length of the cache, and reads one
    token at a time.
    """
    wide, kept, inner = heads * size, groups * size, 2 * heads * size
    angles = 1 / 100 ** (np.arange(size // 2, dtype=np.float32) * 2 / size)
    tensors: dict[str, np.ndarray] = {
        "embedding": normal(words, wide, seed=1),
        "frequencies": angles[None, None],
        "head": normal(wide, words, seed=2) / 4,
        "apart": np.array([0, 0, -1, size]),
        "joined": np.array([0, 0, wide]),
        "repeat": np.array([1, 1, heads // groups, 1, 1]),
        "all": np.array([0, heads, -1, size]),
        "root": np.float32([size**-0.5]),
        "epsilon": np.float32([1e-5]),
        "square": np.float32([2]),
        "lowest": np.array(np.finfo(np.float32).min),
        "nothing": np.array(0, np.float32),
        "start": np.array(0),
        "step": np.array(1),
        "last": np.array([-1]),
        "first": np.array([1]),
        "second": np.array([2]),
        "heads": np.array([1, 2]),
    }
    nodes = [node("Gather", "embedding input_ids", "h0", "embed"), *_positions(), *_mask()]
    ends = []
    for i in range(layers):
        sizes = {"q": (wide, wide), "k": (wide, kept), "v": (wide, kept), "o": (wide, wide)}
        sizes |= {"gate": (wide, inner), "up": (wide, inner), "down": (inner, wide)}
        tensors |= {f"{n}{i}": normal(*s, seed=10 * i + j) / s[0] ** 0.5 for j, (n, s) in enumerate(sizes.items())}
        tensors |= {f"{n}{i}": 1 + normal(wide, seed=3) / 9 for n in ("before", "behind")}
        nodes += _layer(i)
        ends += [f"present.{i}.key", f"present.{i}.value"]
    tensors["final"] = 1 + normal(wide, seed=4) / 9
    nodes += [*_norm(f"h{layers}", "final", "n"), node("MatMul", "n head", "logits", "lm_head")]
    batch, length = ("batch", "length") if past is None else (1, 1)
    cache, total = ("past", "total") if past is None else (past, past + 1)
    starts = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, length]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [batch, total]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, [batch, length]),
    ]
    starts += [
        helper.make_tensor_value_info(f"past_key_values.{i}.{n}", TensorProto.FLOAT, [batch, groups, cache, size])
        for i in range(layers)
        for n in ("key", "value")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, length, words])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, groups, total, size]) for name in ends]
    stored = [numpy_helper.from_array(np.ascontiguousarray(a).reshape(a.shape), name) for name, a in tensors.items()]
    graph = helper.make_graph(nodes, "llama", starts, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def step(past: int, length: int, *, batch: int = 1, layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """What `llama` reads: some new tokens behind a cache of normal values."""
    rng = np.random.default_rng(seed)
    sample: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 50, (batch, length)),
        "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.arange(past, past + length)[None].repeat(batch, 0),
    }
    for i in range(layers):
        for name in ("key", "value"):
            sample[f"past_key_values.{i}.{name}"] = rng.normal(size=(batch, 2, past, 16)).astype(np.float32)
    return sample


def _positions() -> list[NodeProto]:
    """The cosine and sine of every position and pair of values, (batch, 1, length, size)."""
    return [
        node("Cast", "position_ids", "places", to=TensorProto.FLOAT),
        node("Unsqueeze", "places last", "columns", "column"),
        node("Mul", "columns frequencies", "half", "angles"),
        node("Concat", "half half", "whole", "both", axis=-1),
        node("Unsqueeze", "whole first", "turns", "by_head"),
        node("Cos", "turns", "cos"),
        node("Sin", "turns", "sin"),
    ]


def _mask() -> list[NodeProto]:
    """0 where a token may look, else the least float, (batch, 1, length, total)."""
    return [
        node("Shape", "attention_mask", "sizes"),
        node("Gather", "sizes step", "total", "of_all"),
        node("Range", "start total step", "places_of_all", "range"),
        node("Unsqueeze", "position_ids last", "own", "own_column"),
        node("GreaterOrEqual", "own places_of_all", "seen", "causal"),
        node("Cast", "attention_mask", "there", "kept", to=TensorProto.BOOL),
        node("Unsqueeze", "there first", "there_rows", "row"),
        node("And", "seen there_rows", "may"),
        node("Where", "may nothing lowest", "added", "penalty"),
        node("Unsqueeze", "added first", "mask", "mask_by_head"),
    ]


def _norm(source: str, gain: str, output: str) -> list[NodeProto]:
    return [
        node("Pow", f"{source} square", f"{output}_s", f"{output}_pow"),
        node("ReduceMean", f"{output}_s last", f"{output}_m", f"{output}_mean"),
        node("Add", f"{output}_m epsilon", f"{output}_e", f"{output}_add"),
        node("Sqrt", f"{output}_e", f"{output}_r", f"{output}_root"),
        node("Div", f"{source} {output}_r", f"{output}_d", f"{output}_div"),
        node("Mul", f"{output}_d {gain}", output, f"{output}_gain"),
    ]


def _turned(source: str) -> list[NodeProto]:
    """Rotary positions: x cos + rotated x sin."""
    return [
        node("Split", source, f"{source}_a {source}_b", f"{source}_halves", axis=-1, num_outputs=2),
        node("Neg", f"{source}_b", f"{source}_n", f"{source}_neg"),
        node("Concat", f"{source}_n {source}_a", f"{source}_r", f"{source}_rotated", axis=-1),
        node("Mul", f"{source} cos", f"{source}_c", f"{source}_times_cos"),
        node("Mul", f"{source}_r sin", f"{source}_i", f"{source}_times_sin"),
        node("Add", f"{source}_c {source}_i", f"{source}_t", f"{source}_turned"),
    ]


def _layer(i: int) -> list[NodeProto]:
    nodes = _norm(f"h{i}", f"before{i}", f"n{i}")
    for part in "qkv":
        name = f"{part}h{i}"
        nodes += [
            node("MatMul", f"n{i} {part}{i}", f"{part}m{i}", f"{part}_proj_{i}"),
            node("Reshape", f"{part}m{i} apart", f"{part}s{i}", f"{part}_apart_{i}"),
            node("Transpose", f"{part}s{i}", name, f"{part}_turn_{i}", perm=[0, 2, 1, 3]),
        ]
    nodes += [*_turned(f"qh{i}"), *_turned(f"kh{i}")]
    for new, kind, part in ((f"kh{i}_t", "key", "k"), (f"vh{i}", "value", "v")):
        present = f"present.{i}.{kind}"
        nodes += [
            node("Concat", f"past_key_values.{i}.{kind} {new}", present, f"{part}_cache_{i}", axis=2),
            node("Unsqueeze", f"{present} second", f"{part}u{i}", f"{part}_groups_{i}"),
            node("Expand", f"{part}u{i} repeat", f"{part}e{i}", f"{part}_expand_{i}"),
            node("Reshape", f"{part}e{i} all", f"{part}a{i}", f"{part}_all_{i}"),
        ]
    return [
        *nodes,
        node("Transpose", f"ka{i}", f"kt{i}", f"keys_turned_{i}", perm=[0, 1, 3, 2]),
        node("Mul", f"qh{i}_t root", f"qr{i}", f"scale_{i}"),
        node("MatMul", f"qr{i} kt{i}", f"sc{i}", f"scores_{i}"),
        node("Add", f"sc{i} mask", f"sm{i}", f"masked_{i}"),
        node("Softmax", f"sm{i}", f"p{i}", f"weights_{i}"),
        node("MatMul", f"p{i} va{i}", f"mx{i}", f"mix_{i}"),
        node("Transpose", f"mx{i}", f"mt{i}", f"mix_turned_{i}", perm=[0, 2, 1, 3]),
        node("Reshape", f"mt{i} joined", f"mj{i}", f"merge_{i}"),
        node("MatMul", f"mj{i} o{i}", f"ao{i}", f"o_proj_{i}"),
        node("Add", f"h{i} ao{i}", f"r{i}", f"attended_{i}"),
        *_norm(f"r{i}", f"behind{i}", f"f{i}"),
        node("MatMul", f"f{i} gate{i}", f"ga{i}", f"gate_proj_{i}"),
        node("Sigmoid", f"ga{i}", f"gs{i}", f"sigmoid_{i}"),
        node("Mul", f"ga{i} gs{i}", f"gg{i}", f"silu_{i}"),
        node("MatMul", f"f{i} up{i}", f"ua{i}", f"up_proj_{i}"),
        node("Mul", f"gg{i} ua{i}", f"gu{i}", f"gated_{i}"),
        node("MatMul", f"gu{i} down{i}", f"dn{i}", f"down_proj_{i}"),
        node("Add", f"r{i} dn{i}", f"h{i + 1}", f"out_{i}"),
    ]


def lookup(
    *,
    head: str = "",
    rows: int = ROWS,
    width: int = WIDTH,
    body: bool = False,
    second: bool = False,
    beside: str = "",
) -> Model:
    """ids -> rows of a table -> LayerNormalization -> product; with `head` a last product by the same table.

    Args:
        head: "turned" multiplies by a transposed copy, "gemm" by the table itself (transB).
        rows: of the table.
        width: of a row.
        body: the Gather stands in a branch of an If.
        second: another Gather reads the table.
        beside: an operator that reads the table too.
    """
    table = normal(rows, width)
    tensors = {"table": table, "w": normal(width, width, seed=1) / width**0.5}
    tensors["gain"] = np.ones(width, np.float32)
    starts = [helper.make_tensor_value_info("ids", TensorProto.INT64, [4])]
    nodes = [node("Gather", "table ids", "x", "read")]
    if body:
        starts.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
        inner = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, width]) for name in ("r", "zero")]
        picked = helper.make_graph([node("Gather", "table ids", "r", "read")], "a", [], inner[:1])
        none = [node("Expand", "nothing size", "zero", "none")]
        tensors |= {"nothing": np.zeros(1, np.float32), "size": np.array([4, width])}
        other = helper.make_graph(none, "b", [], inner[1:])
        nodes = [node("If", "which", "x", "choice", then_branch=picked, else_branch=other)]
    if second:
        starts.append(helper.make_tensor_value_info("more", TensorProto.INT64, [4]))
        nodes += [node("Gather", "table more", "x2", "again"), node("Add", "x x2", "x3", "both")]
    nodes.append(node("LayerNormalization", "x3 gain" if second else "x gain", "n", "norm"))
    nodes += [node("MatMul", "n w", "h", "layer"), node("Relu", "h", "y", "relu")]
    if head == "turned":
        tensors["turned"] = np.ascontiguousarray(table.T)
        nodes.append(node("MatMul", "y turned", "z", "head"))
    if head == "gemm":
        nodes.append(node("Gemm", "y table", "z", "head", transB=1))
    if beside:
        nodes.append(node(beside, "table", "z", "beside"))
    ends = ["z"] if head or beside else ["y"]
    stored = [numpy_helper.from_array(a, name) for name, a in tensors.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends]
    if beside:
        outputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "words", starts, outputs, stored)
    return prepare(storage.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)))
