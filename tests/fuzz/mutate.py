"""Inputs that are almost right: a valid file with one to three hostile changes, made where its form is known.

kind of file + Random -> `files` writes a folder -> the command line that reads it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from models import assemble, constant, save_samples, segmenter
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

INTEGERS = [0, 1, -1, 2, 3, 7, 255, 4096, 1 << 31, 1 << 40, -(1 << 40), (1 << 63) - 1, -(1 << 63)]
TEXTS = ["", "x", "a\0b", "../up", "/etc/passwd", "\u202e\ud55c\uae00", "n" * 5000, "image", "%s{0}", "nan", "1e999"]
OPERATORS = [
    *("Add", "Concat", "Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Reshape", "Transpose", "Slice", "Gather"),
    *("Split", "Resize", "Pad", "Cast", "Constant", "If", "Loop", "Scan", "LSTM", "BatchNormalization", "TopK"),
    *("LayerNormalization", "Softmax", "MaxPool", "Einsum", "NonZero", "Shape", "Expand", "Tile", "Identity"),
    *("Dropout", "QuantizeLinear", "DequantizeLinear", "Attention", "NoSuchOperator", "SequenceConstruct"),
    *("OptionalGetElement", "StringNormalizer"),
]


def network() -> ModelProto:
    """A product, a branch with a body, a convolution, in one graph of few nodes."""
    rng = np.random.default_rng(3)
    body = helper.make_graph(
        [helper.make_node("Add", ["r", "bias"], ["then"])],
        "then",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Relu", ["r"], ["else"])],
        "else",
        [],
        [helper.make_tensor_value_info("else", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Relu", ["p"], ["r"], name="relu"),
        helper.make_node("If", ["yes"], ["q"], name="branch", then_branch=body, else_branch=other),
        helper.make_node("Reshape", ["q", "shape"], ["s"], name="reshape"),
        helper.make_node("Conv", ["s", "k"], ["t"], name="conv", pads=[1, 1, 1, 1], strides=[1, 1], group=1),
        helper.make_node("Softmax", ["t"], ["y"], name="softmax", axis=1),
    ]
    tensors = [
        constant("w", rng.normal(size=(8, 16)).astype(np.float32)),
        constant("bias", rng.normal(size=16).astype(np.float32)),
        constant("k", rng.normal(size=(4, 4, 3, 3)).astype(np.float32)),
        constant("yes", np.array(True)),
        constant("shape", np.array([0, 4, 2, 2], np.int64)),
    ]
    return assemble(nodes, {"x": ("n", 8)}, {"y": ("n", 4, 2, 2)}, tensors, opset=18)


# ---- models


def _attribute(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    if not node.attribute:
        node.attribute.append(
            helper.make_attribute(random.choice(["axis", "group", "to", "perm"]), random.choice(INTEGERS))
        )
        return
    held = random.choice(node.attribute)
    if held.type == AttributeProto.INTS and held.ints:
        held.ints[random.randrange(len(held.ints))] = random.choice(INTEGERS)
    elif held.type == AttributeProto.INT:
        held.i = random.choice(INTEGERS)
    else:
        held.type = random.choice([0, 1, 2, 3, 4, 5, 6, 7, 11])


def _operator(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    node.op_type = random.choice(OPERATORS)
    if random.random() < 0.2:
        node.domain = random.choice(["ai.onnx", "com.microsoft", "trt", "", "a\0b"])


def _edge(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    names = [name for n in model.graph.node for name in (*n.input, *n.output)] + TEXTS
    side = random.choice([node.input, node.output])
    if side and random.random() < 0.8:
        side[random.randrange(len(side))] = random.choice(names)
    else:
        side.append(random.choice(names))


def _nodes(model: ModelProto, random: Random) -> None:
    nodes = list(model.graph.node)
    if random.random() < 0.5:
        nodes.pop(random.randrange(len(nodes)))
    else:
        nodes.append(random.choice(nodes))
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _name(model: ModelProto, random: Random) -> None:
    held = random.choice([_node(model, random), model.graph, *model.graph.initializer, *model.graph.input])
    held.name = random.choice(TEXTS)


def _tensor(model: ModelProto, random: Random) -> None:
    tensor = random.choice(model.graph.initializer)
    what = random.randrange(5)
    if what == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(INTEGERS)
    elif what == 1:
        tensor.data_type = random.choice([0, 1, 2, 6, 7, 8, 10, 11, 14, 16, 17, 22, 23, 26, 999])
    elif what == 2:
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
    elif what == 3:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": random.choice([*TEXTS, "samples/000.npz", "pipe"]), "offset": str(random.choice(INTEGERS))}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
    else:
        size = len(tensor.raw_data) // 4
        fill = random.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0])
        tensor.raw_data = np.full(size, fill, np.float32).tobytes() + tensor.raw_data[4 * size :]


def _value(model: ModelProto, random: Random) -> None:
    values = random.choice([model.graph.input, model.graph.output])
    what = random.randrange(6)
    if what == 0 or not values:
        values.append(
            random.choice([*model.graph.input, *model.graph.output]) if values else onnx.ValueInfoProto(name="v")
        )
        return
    value = random.choice(values)
    shape = value.type.tensor_type.shape
    if what == 1 and shape.dim:
        shape.dim[random.randrange(len(shape.dim))].dim_value = random.choice(INTEGERS)
    elif what == 2:
        value.type.tensor_type.elem_type = random.choice([0, 1, 7, 8, 9, 10, 11, 14, 16, 999])
    elif what == 3:
        value.type.Clear()
    elif what == 4:
        shape.dim.add(dim_value=random.choice(INTEGERS))
    else:
        values.remove(value)


def _stated(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    if node.output:
        dims = [random.choice([*INTEGERS, "n"]) for _ in range(random.randrange(5))]
        dims = [d if isinstance(d, str) else max(min(d, 1 << 62), -1) for d in dims]
        model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], random.choice([1, 7, 10]), dims))


def _versions(model: ModelProto, random: Random) -> None:
    what = random.randrange(4)
    if what == 0:
        model.ir_version = random.choice([0, -1, 1, 3, 14, 999])
    elif what == 1:
        model.opset_import[0].version = random.choice([0, -1, 1, 6, 7, 9, 12, 25, 28, 29, 999])
    elif what == 2:
        model.opset_import.append(helper.make_opsetid(random.choice(["", "ai.onnx", "x"]), random.choice([1, 17, 999])))
    else:
        del model.opset_import[:]


def _functions(model: ModelProto, random: Random) -> None:
    """Functions that call each other twice, so that they stand for very many nodes; sometimes in a circle."""
    depth = random.choice([1, 2, 5, 25])
    for level in range(depth):
        inner = f"f{level - 1}" if level else random.choice(["Relu", "NoSuchOperator", f"f{depth - 1}"])
        domain = "mine" if inner.startswith("f") else ""
        calls = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
        model.functions.append(helper.make_function("mine", f"f{level}", ["a"], ["c"], calls, imports))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    node = _node(model, random)
    node.op_type, node.domain = f"f{depth - 1}", "mine"


def _node(model: ModelProto, random: Random) -> NodeProto:
    nodes = list(model.graph.node)
    inner = [n for node in nodes for a in node.attribute if a.HasField("g") for n in a.g.node]
    return random.choice([*nodes, *inner]) if nodes or inner else model.graph.node.add()


MODEL: tuple[Callable[[ModelProto, Random], None], ...] = (
    *(_attribute, _operator, _edge, _nodes, _name, _tensor, _value, _stated, _versions, _functions),
)


def model(random: Random) -> bytes:
    """An ONNX file."""
    made = random.choice([network, segmenter])()
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        try:
            random.choice(MODEL)(made, random)
        except (IndexError, ValueError, TypeError):  # an earlier change took away what this one needs
            continue
    return _bytes(made.SerializeToString(), random) if random.random() < 0.1 else made.SerializeToString()


def _bytes(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice([1, 2, 20])):
        if changed:
            changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed[: random.randrange(len(changed) + 1)] if random.random() < 0.3 else changed)


# ---- JSON and YAML

PLAIN: list[Any] = [None, True, "", "nan", 1e308, -1e308, 0, -1, 1 << 70, [], {}, [[]], {"a": 1}, "x" * 3000, 0.5]


def document(text: str, random: Random) -> str:
    """A JSON file."""
    if random.random() < 0.1:
        return _bytes(text.encode(), random).decode(errors="replace")
    if random.random() < 0.05:
        return random.choice(["[" * 100_000, '{"a":' * 50_000, "1" * 100_000, "[1e999999]", "", "\0", '"\ud800"'])
    content = json.loads(text)
    for _ in range(random.choice([1, 1, 2, 4])):
        _plain(content, random)
    return json.dumps(content)


def _plain(content: Any, random: Random) -> None:
    """Change one value somewhere inside."""
    place = content
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = random.choice(keys)
        inside = place[key]
        if not (isinstance(inside, dict | list) and inside) or random.random() < 0.2:
            what = random.randrange(5)
            if what == 0:
                del place[key]
            elif what == 1 and isinstance(inside, int | float) and not isinstance(inside, bool):
                place[key] = random.choice([-inside, inside + 1, inside * 1e300, inside / 3, *INTEGERS])
            elif what == 2 and isinstance(place, dict):
                place[random.choice(["format", "extra", "name", ""])] = copy.deepcopy(inside)
            elif what == 3 and isinstance(place, list):
                place.append(copy.deepcopy(inside))
            else:
                place[key] = copy.deepcopy(random.choice(PLAIN))
            return
        place = inside


RECIPE = {
    "scheme": "int8",
    "calibrator": "entropy",
    "exclude": ["*conv*"],
    "target": ["sm86"],
    "shape": ["x:1x8:2x8:4x8"],
    "min_sqnr_db": 20,
    "gpu": ["a10"],
    "tune": "off",
    "percentile": 99.9,
    "block": 64,
    "time_limit": 3,
}
YAML = [
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nscheme: [*b,*b,*b,*b,*b]",
    "min_sqnr_db: 2024-13-45",
    "scheme: " + "[" * 3000,
    "? [a, b]\n: c",
    "{a: 1}: 2",
    "scheme: !!python/object/apply:os.system [ls]",
    "scheme: !!binary x",
    "<<: {scheme: int8}",
    "min_sqnr_db: 0x" + "f" * 5000,
    "min_sqnr_db: " + "9" * 5000,
    "shape: x:" + "9" * 5000,
    "--- a\n--- b",
    "time_limit: .inf",
    "exclude: ['[', '*', '']",
    "tune: 1:2:3",
]


def recipe(random: Random) -> str:
    """A YAML file."""
    if random.random() < 0.3:
        return random.choice(YAML)
    content = {key: value for key, value in RECIPE.items() if random.random() < 0.6}
    text = json.dumps(content)  # YAML too
    return document(text, random) if content else ""


# ---- samples


def sample(random: Random) -> tuple[str, bytes]:
    """A .npy or .npz file: its suffix and content."""
    data = io.BytesIO()
    shape = random.choice([(1, 8), (2, 8), (8,), (0, 8), (1, 9), (), (1, 8, 1)])
    dtype = random.choice(
        ["<f4", "<f4", "<f4", "<f8", ">f4", "<f2", "<i8", "|b1", "<c8", "<U3", "|S2", "<M8[s]", "|V4"]
    )
    np.save(data, np.zeros(shape, dtype), allow_pickle=False)
    content = data.getvalue()
    if random.random() < 0.5:
        header = random.choice(
            [
                "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -8), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }",
                "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 8), }",
                "{'descr': '|O', 'fortran_order': False, 'shape': (1, 8), }",
                "{'descr': [('a', '<f4'), ('b', '<i8')], 'fortran_order': False, 'shape': (1,), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 8",
                "{'descr': '''",
                "(" * 500,
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1.5, 8), }",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8), }",
                "__import__('os')",
            ]
        )
        text = header.ljust(1013) + "\n"
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(32)
    if random.random() < 0.3:
        content = _bytes(content, random)
    if random.random() < 0.4:
        return ".npy", content
    archive = io.BytesIO()
    kind = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(archive, "w", kind) as opened:
        for name in random.choice([["x.npy"], ["x.npy", "y.npy"], ["y.npy"], [], ["../x.npy"], ["x"], ["x.npy/"]]):
            opened.writestr(name, content)
    packed = archive.getvalue()
    return ".npz", _bytes(packed, random) if random.random() < 0.3 else packed


# ---- whole folders

Made = dict[str, bytes]  # what valid runs wrote
QUANTIZE = ["quantize", "model.onnx", "--data", "samples", "-o", "q.onnx", "--bias-correction", "off"]


ENGINE = ("m.engine", "m.engine.json", "m.engine.manifest.json", "q.onnx")
NEEDED = {
    "plan": ("plan.json",),
    "table": ("plan.json", "table.json"),
    "m.engine": ENGINE,
    "m.engine.manifest": ENGINE,
}


def valid(folder: Path, samples: int = 2) -> None:
    """A model and samples that fit."""
    onnx.save(network(), folder / "model.onnx")
    rng = np.random.default_rng(0)
    save_samples(folder / "samples", [{"x": rng.normal(size=(1, 8)).astype(np.float32)} for _ in range(samples)])


def files(kind: str, folder: Path, made: Made, random: Random) -> list[str]:
    """Write the files of one run, one of them hostile; the command line."""
    valid(folder)
    if kind == "model":
        (folder / "model.onnx").write_bytes(model(random))
        verbs = [
            ["quantize", "model.onnx", "--random-data", "2", "-o", "q.onnx"],
            ["quantize", "model.onnx", "--random-data", "2", "-o", "q.onnx", "--scheme", "int4", "--rest", "fp16"],
            ["plan", "model.onnx", "-o", "p.json"],
            ["lint", "model.onnx"],
            ["explain", "model.onnx", "conv"],
        ]
        return random.choice(verbs)
    if kind == "samples":
        suffix, content = sample(random)
        for old in (folder / "samples").iterdir():
            old.unlink()
        (folder / "samples" / f"0{suffix}").write_bytes(content)
        return random.choice([QUANTIZE, [*QUANTIZE[:3], f"samples/0{suffix}", *QUANTIZE[4:]]])
    if kind == "recipe":
        (folder / "recipe.yaml").write_text(recipe(random), encoding="utf-8", errors="replace")
        return ["plan", "model.onnx", "--recipe", "recipe.yaml", "-o", "p.json"]
    for name in NEEDED[kind]:
        (folder / name).write_bytes(made[name])
    hostile = document(made[f"{kind}.json"].decode(), random)
    (folder / f"{kind}.json").write_text(hostile, encoding="utf-8", errors="replace")
    if kind == "m.engine":  # else the manifest's hash refuses it before it is read
        manifest = json.loads(made["m.engine.manifest.json"])
        manifest["layers"] = hashlib.sha256((folder / "m.engine.json").read_bytes()).hexdigest()
        (folder / "m.engine.manifest.json").write_text(json.dumps(manifest))
    return {
        "plan": [*QUANTIZE, "--plan", "plan.json"],
        "table": [*QUANTIZE, "--plan", "plan.json", "--table", "table.json"],
        "m.engine": ["audit", "m.engine"],
        "m.engine.manifest": ["audit", "m.engine"],
    }[kind]


KINDS = ("model", "model", "model", "samples", "recipe", "plan", "table", "m.engine", "m.engine.manifest")
