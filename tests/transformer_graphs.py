"""Tiny pieces of transformers as exporters write them, for the tests of the rewrites that recognize them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from graphs import build, node, normal
from onnx import TensorProto, helper

from qdq.model.model import Model


def layer_norm(
    form: str = "torch", shape: tuple[int | str, ...] = (2, 5, 8), axes: tuple[int, ...] = (-1,), **changed: object
) -> Model:
    """x -> normalization in the operators of a framework -> y; `changed` replaces constants, or keepdims.

    Forms: 'torch'; 'product' multiplies instead of Pow and Div; 'swapped' has operands the other way round; 'plain'
    has no gain or shift; 'keras' folds the mean into the shift; 'twice' subtracts the mean twice; 'sum' divides sums;
    'rms' subtracts no mean; 'outside' adds epsilon to the deviation.
    """
    gain_shape = [shape[axis] for axis in axes]
    sizes = [size for size in gain_shape if isinstance(size, int)]
    keepdims = changed.pop("keepdims", 1)
    tensors = {"axes": np.array(axes), "two": np.float32([2]), "eps": np.float32([1e-3]), "one": np.float32([1])}
    tensors |= {"g": normal(*sizes, seed=1), "b": normal(*sizes, seed=2), "n": np.float32([np.prod(sizes)])}
    tensors |= {name: np.asarray(value) for name, value in changed.items()}
    mean = [node("ReduceMean", "x axes", "m", "mean", keepdims=keepdims)]
    if form == "sum":
        mean = [node("ReduceSum", "x axes", "t", "sum"), node("Div", "t n", "m", "mean")]
    nodes = [*mean, node("Sub", "x m", "d", "centre")]
    square = ("Mul", "c c") if form == "product" else ("Pow", "c two")
    centred = {"rms": "x", "twice": "d2"}.get(form, "d")
    if form == "twice":
        nodes.append(node("Sub", "x m", "d2", "centre_again"))
    nodes.append(node(square[0], square[1].replace("c", centred), "q", "square"))
    nodes.append(node("ReduceMean", "q axes", "v", "variance", keepdims=keepdims))
    if form == "outside":
        nodes += [node("Sqrt", "v", "r", "root"), node("Add", "r eps", "s", "add_epsilon")]
    else:
        # never eps + v: there ONNX Runtime 1.31 fuses the nodes without epsilon, and is no oracle
        nodes += [node("Add", "v eps", "e", "add_epsilon"), node("Sqrt", "e", "s", "root")]
    data = "x" if form == "rms" else "d"
    if form == "plain":
        nodes.append(node("Div", f"{data} s", "y", "divide"))
    elif form in ("product", "swapped"):
        nodes += [node("Div", "one s", "i", "invert"), node("Mul", "i d", "w", "scale")]
        nodes += [node("Mul", "g w", "z", "times_gain"), node("Add", "b z", "y", "plus_shift")]
    elif form == "keras":
        nodes += [node("Reciprocal", "s", "i", "invert"), node("Mul", "i g", "f", "factor")]
        nodes += [node("Mul", "x f", "w", "scale"), node("Mul", "m f", "o", "offset"), node("Sub", "b o", "p", "left")]
        nodes.append(node("Add", "w p", "y", "plus_shift"))
    else:
        nodes += [node("Div", f"{data} s", "w", "divide"), node("Mul", "w g", "z", "times_gain")]
        nodes.append(node("Add", "z b", "y", "plus_shift"))
    return build(nodes, {"x": shape}, tensors)


def gelu(form: str = "torch", *, output: bool = False, dtype: str = "float32", **changed: float) -> Model:
    """z -> Relu -> GELU of x -> y, all in a float type.

    Forms: 'torch', 'half first' and 'half of erf' with erf; 'tanh', 'cube' (x * x * x) and 'factored' with tanh.
    """
    numbers = {"root": 2**0.5, "one": 1.0, "half": 0.5, "three": 3.0, "c": 0.044715, "k": (2 / np.pi) ** 0.5} | changed
    tensors = {name: np.float32([value]) for name, value in numbers.items()}
    nodes = [node("Relu", "z", "x")]
    if form in ("torch", "half first", "half of erf"):
        nodes += [node("Div", "x root", "a", "divide"), node("Erf", "a", "t", "curve")]
    elif form == "factored":
        nodes += [node("Mul", "x x", "x2", "square"), node("Mul", "c x2", "cx2", "times_c")]
        nodes += [
            node("Add", "one cx2", "p", "sum"),
            node("Mul", "k x", "kx", "times_k"),
            node("Mul", "kx p", "a", "all"),
        ]
    else:
        cube = [node("Pow", "x three", "x3", "cube")]
        if form == "cube":
            cube = [node("Mul", "x x", "x2", "square"), node("Mul", "x2 x", "x3", "cube")]
        nodes += [*cube, node("Mul", "x3 c", "cx3", "times_c"), node("Add", "x cx3", "p", "sum")]
        nodes.append(node("Mul", "k p", "a", "times_k"))
    if form not in ("torch", "half first", "half of erf"):
        nodes.append(node("Tanh", "a", "t", "curve"))
    if form == "half of erf":
        nodes += [
            node("Mul", "t half", "h", "halve"),
            node("Add", "half h", "u", "plus"),
            node("Mul", "u x", "y", "last"),
        ]
    elif form == "half first":
        nodes += [
            node("Add", "one t", "u", "plus"),
            node("Mul", "half x", "h", "halve"),
            node("Mul", "h u", "y", "last"),
        ]
    else:
        nodes += [
            node("Add", "t one", "u", "plus"),
            node("Mul", "x u", "h", "times"),
            node("Mul", "h half", "y", "last"),
        ]
    outputs = ("y", "u") if output else ("y",)
    return build(nodes, {"z": ("n", 3, 8)}, tensors, outputs=outputs, dtype=dtype)


def attention(
    head: int = 8,
    *,
    masked: bool = True,
    softmax: bool = True,
    turned: bool = False,
    scales: str = "",
    value: int | None = None,
    length: int = 7,
) -> Model:
    """softmax(q k + mask) v with heads of a given size; `scales` are on "q", "k" and behind the product, "s"."""
    nodes = [node("Transpose", "kt", "k", "turn", perm=[0, 1, 3, 2])] if turned else []
    left = right = ""
    if "q" in scales:
        nodes.append(node("Mul", "q a", "qs", "scale_q"))
        left = "s"
    if "k" in scales:
        nodes.append(node("Div", "k b", "ks", "scale_k"))
        right = "s"
    nodes.append(node("MatMul", f"q{left} k{right}", "s", "scores"))
    scores = "s"
    if "s" in scales:
        nodes.append(node("Mul", "c s", "sc", "scale_s"))
        scores = "sc"
    nodes += [
        node("Add", f"{scores} mask", "t"),
        node("Softmax" if softmax else "Relu", "t" if masked else scores, "p", name="weights"),
        node("MatMul", "p v", "y", name="mix"),
    ]
    keys = {"kt": ("n", 2, length, head)} if turned else {"k": ("n", 2, head, length)}
    sizes = {"q": ("n", 2, length, head), **keys, "v": ("n", 2, length, value or head)}
    tensors = {
        "mask": normal(1, 2, length, length),
        "a": np.float32([0.5]),
        "b": np.float32([3]),
        "c": np.float32([0.7]),
    }
    return build(nodes, sizes, tensors)


PACKED = ("split", "slice", "gather", "gather_nd", "flat", "interleaved", "multihead", "computed", "first axis")


def packed(form: str = "split", *, heads: int = 2, groups: int = 0, size: int = 16, dynamic: bool = False) -> Model:
    """x (2, 5, C) -> one product for queries, keys and values, cut into heads -> attention -> product -> y.

    Forms: 'split', 'slice'; 'gather' of an axis of three in front (timm, Swin), 'gather_nd' (torch.export); 'flat' on
    matrices (GPT-2); 'interleaved' within each head (GPT-NeoX); 'multihead' with Unsqueeze and Squeeze (PyTorch's own);
    'computed' has shapes computed from the input; 'first axis' joins batch and heads before the cut (ViTDet).

    Args:
        heads: of queries.
        groups: heads of keys and of values, with 'split'; 0 for as many.
        size: values per head.
        dynamic: batch and length are.
    """
    wide, kept = heads * size, (groups or heads) * size
    total, lead = wide + 2 * kept, [0, 0]
    tensors = {"w": normal(wide, total, seed=1) / 4, "b": normal(total, seed=2), "v": normal(wide, wide, seed=3) / 4}
    tensors |= {"parts": np.array([wide, kept, kept]), "flat": np.array([-1, wide]), "root": np.float32([size**-0.5])}
    tensors |= {"heads": np.array([*lead, -1, size]), "five": np.array([*lead, 3, heads, size])}
    tensors |= {"mixed": np.array([*lead, heads, 3 * size]), "joined": np.array([*lead, wide]), "two": np.array([2])}
    nodes = [node("MatMul", "x w", "m", "qkv"), node("Add", "b m", "z", "bias")]
    if form == "flat":
        nodes = [node("Reshape", "x flat", "rows"), node("Gemm", "rows w b", "m", "qkv"), node("Shape", "x", "size")]
        tensors |= {"zero": np.array([0]), "total": np.array([total])}
        nodes += [node("Slice", "size zero two", "front"), node("Concat", "front total", "shape", axis=0)]
        nodes.append(node("Reshape", "m shape", "z", "back"))
    if form in ("split", "flat"):
        nodes.append(node("Split", "z parts", "q0 k0 v0", axis=-1))
    elif form == "slice":
        for index, part in enumerate("qkv"):
            tensors |= {f"from_{part}": np.array([index * wide]), f"to_{part}": np.array([(index + 1) * wide])}
            nodes.append(node("Slice", f"z from_{part} to_{part} two", f"{part}0", f"cut_{part}"))
    elif form == "interleaved":
        nodes += [node("Reshape", "z mixed", "h"), node("Transpose", "h", "t", perm=[0, 2, 1, 3])]
        nodes.append(node("Split", "t", "qh kh vh", axis=-1, num_outputs=3))
    else:
        shape = "five"
        if form == "computed":
            tensors |= {"zero": np.array([0]), "tail": np.array([3, heads, size])}
            nodes += [node("Shape", "x", "size"), node("Slice", "size zero two", "front")]
            nodes.append(node("Concat", "front tail", "shape", axis=0))
            shape = "shape"
        nodes += [
            node("Reshape", f"z {shape}", "h", "apart"),
            node("Transpose", "h", "t", "turn", perm=[2, 0, 3, 1, 4]),
        ]
        last = "t"
        if form == "multihead":
            tensors["front"] = np.array([0])
            nodes += [node("Unsqueeze", "t front", "u"), node("Squeeze", "u front", "s")]
            last = "s"
        if form == "first axis":
            tensors |= {"join": np.array([3, -1, 5, size]), "split_heads": np.array([-1, heads, 5, size])}
            nodes.append(node("Reshape", "t join", "j"))
            last = "j"
        for index, part in enumerate("qkv"):
            name = f"{part}j" if form == "first axis" else f"{part}h"
            if form == "gather_nd":
                tensors |= {f"at_{part}": np.array([[index]]), "front": np.array([0])}
                nodes.append(node("GatherND", f"{last} at_{part}", f"{part}n", f"pick_{part}"))
                nodes.append(node("Squeeze", f"{part}n front", name, f"drop_{part}"))
            else:
                nodes.append(node("Constant", "", f"at_{part}", f"index_{part}", value_int=index))
                nodes.append(node("Gather", f"{last} at_{part}", name, f"pick_{part}", axis=0))
            if form == "first axis":
                nodes.append(node("Reshape", f"{name} split_heads", f"{part}h", f"heads_{part}"))
    if form in ("split", "flat", "slice"):
        for part in "qkv":
            nodes.append(node("Reshape", f"{part}0 heads", f"{part}4", f"heads_{part}"))
            nodes.append(node("Transpose", f"{part}4", f"{part}h", f"turn_{part}", perm=[0, 2, 1, 3]))
    keys, values = "kh", "vh"
    if groups and groups != heads:
        tensors |= {"axis": np.array([2]), "many": np.array([1, 1, heads // groups, 1, 1])}
        tensors["all"] = np.array([0, heads, -1, size])
        for part in "kv":
            nodes += [node("Unsqueeze", f"{part}h axis", f"{part}u", f"apart_{part}")]
            nodes += [node("Expand", f"{part}u many", f"{part}e", f"repeat_{part}")]
            nodes += [node("Reshape", f"{part}e all", f"{part}a", f"all_{part}")]
        keys, values = "ka", "va"
    nodes += [
        node("Transpose", keys, "kt", "turn_keys", perm=[0, 1, 3, 2]),
        node("Mul", "qh root", "qs", "scale"),
        node("MatMul", "qs kt", "s0", "scores"),
        node("Softmax", "s0", "p", "weights"),
        node("MatMul", f"p {values}", "c", "mix"),
        node("Transpose", "c", "ct", "back_turn", perm=[0, 2, 1, 3]),
        node("Reshape", "ct joined", "o", "merge"),
        node("MatMul", "o v", "y", "proj"),
    ]
    return build(nodes, {"x": ("batch", "length", wide) if dynamic else (2, 5, wide)}, tensors)


def windows(count: int = 8, tokens: int = 200) -> Model:
    """Attention in shifted windows: softmax(q k + mask) v, the mask 0 where two tokens have one label, else -100."""
    labels = np.random.default_rng(0).integers(0, 4, (count, tokens)).astype(np.float32)
    tensors = {"r": labels[:, :, None], "c": labels[:, None, :], "axis": np.array([1])}
    tensors |= {"zero": np.array(0, np.float32), "far": np.array(-100, np.float32)}
    nodes = [
        node("Sub", "r c", "d"),
        node("Equal", "d zero", "same"),
        node("Not", "same", "other"),
        node("Where", "other far d", "filled"),
        node("Equal", "d zero", "again", "equal_again"),
        node("Where", "again zero filled", "mask", "where_again"),
        node("Unsqueeze", "mask axis", "masks"),
        node("MatMul", "q k", "s", "scores"),
        node("Add", "s masks", "t"),
        node("Softmax", "t", "p"),
        node("MatMul", "p v", "y", "mix"),
    ]
    sizes = {"q": (count, 3, tokens, 16), "k": (count, 3, 16, tokens), "v": (count, 3, tokens, 16)}
    return build(nodes, sizes, tensors)


def grouped(
    head: int = 8, *, padded: bool = False, turned: bool = False, split: bool = False, bias: str = "", **options: object
) -> Model:
    """softmax(q k + mask) v in 6 windows of 9 tokens, 2 heads; the mask is -100 between groups of tokens.

    Args:
        head: values per head.
        padded: q and k have 8 zeros more at the end of a head.
        turned: k is transposed.
        split: the scores are (1, 6, 2, 9, 9) where the mask is added.
        bias: 'before' or 'behind' the mask, another constant is added.
        options: `overlap`, `deep` (another value below), `low` (the value), `many` groups, `output`, `shared`: the mask
            is larger than the scores.
    """
    low = float(options.get("low", -100))  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    labels = np.arange(9)[None] if options.get("many") else rng.integers(0, 3, (6, 9))
    labels = np.concatenate([labels, labels + 9], axis=1) if options.get("many") else labels
    length = labels.shape[-1]
    mask = np.where(labels[:, :, None] == labels[:, None, :], 0, low).astype(np.float32)
    if options.get("overlap"):
        mask[0] = np.where(np.tri(length) > 0, 0, low)
    if options.get("deep"):
        mask[0, 0, mask[0, 0] != 0] = 2 * low
    tensors = {"mask": mask[None, :, None] if split else mask[:, None], "bias": normal(1, 2, length, length)}
    tensors |= {"five": np.array([1, 6, 2, length, length]), "four": np.array([6, 2, length, length])}
    tensors |= {"pads": np.array([0] * 7 + [8]), "pads_k": np.array([0] * 6 + [8, 0])}
    nodes, query, key = [], "q", "k"
    if turned:
        source = "k"
        if padded:
            nodes.append(node("Pad", "k pads", "kp", "pad_k"))
            source = "kp"
        nodes.append(node("Transpose", source, "kt", "turn", perm=[0, 1, 3, 2]))
        key = "kt"
    elif padded:
        nodes.append(node("Pad", "k pads_k", "kp", "pad_k"))
        key = "kp"
    if padded:
        nodes.append(node("Pad", "q pads", "qp", "pad_q"))
        query = "qp"
    nodes.append(node("MatMul", f"{query} {key}", "s0", "scores"))
    last = "s0"
    if bias == "before":
        nodes.append(node("Add", "s0 bias", "s1", "add_bias"))
        last = "s1"
    if split:
        nodes.append(node("Reshape", f"{last} five", "s2", "apart"))
        last = "s2"
    nodes.append(node("Add", f"mask {last}", "s3", "add_mask"))
    last = "s3"
    if split:
        nodes.append(node("Reshape", "s3 four", "s4", "together"))
        last = "s4"
    if bias == "behind":
        nodes.append(node("Add", f"{last} bias", "s5", "add_bias"))
        last = "s5"
    nodes += [node("Softmax", last, "p", "weights"), node("MatMul", "p v", "y", "mix")]
    count = 1 if options.get("shared") else 6
    sizes = {"q": (count, 2, length, head), "v": (6, 2, length, head)}
    sizes["k"] = (count, 2, length, head) if turned else (count, 2, head, length)
    outputs = ("y", "s0") if options.get("output") else ("y",)
    return build(nodes, sizes, tensors, outputs=outputs)


def mlp(
    shape: tuple[int | str, ...] = (2, 3, 4, 8), *, inner: str = "gelu", output: bool = False, weight: int = 2
) -> Model:
    """x -> MatMul -> Add -> activation -> MatMul -> Add, and x on top; inside, 'sum' adds a tensor, 'grid' a grid."""
    size = shape[-1]
    assert isinstance(size, int)
    tensors = {
        "w": normal(size, 16),
        "b": normal(*[1] * (len(shape) - 1), 16),
        "v": normal(16, size, seed=1),
        "c": normal(size, seed=2),
    }
    tensors |= {"half": np.float32([0.5]), "grid": normal(4, 16, seed=3), "one": np.float32([[1]])}
    if weight == 3:
        tensors |= {"w": normal(4, size, 16), "v": normal(4, 16, size)}
    nodes = [node("MatMul", "x w", "h", "first"), node("Add", "b h", "a", "add_b")]
    if inner == "gelu":
        nodes += [node("Erf", "a", "e"), node("Add", "e one", "f", "plus"), node("Mul", "a f", "g", "times")]
    elif inner == "sum":
        nodes.append(node("Add", "a z", "g", "plus"))
    else:
        nodes.append(node("Add", "a grid", "g", "plus"))
    nodes += [
        node("MatMul", "g v", "i", "second"),
        node("Add", "i c", "j", "add_c"),
        node("Add", "j x", "y", "shortcut"),
    ]
    inputs: dict[str, tuple[int | str, ...]] = {"x": shape}
    if inner == "sum":
        inputs["z"] = (*shape[:-1], 16)
    outputs = ("y", "a") if output else ("y",)
    return build(nodes, inputs, tensors, outputs=outputs)


def partition(
    *,
    pad: int = 1,
    roll: bool = False,
    axis: int = -1,
    channels: int = 8,
    twice: bool = False,
    last: bool = False,
    rows: tuple[int, ...] = (),
) -> Model:
    """x (2, 5, 5, C) -> LayerNormalization -> zeros to 6 x 6 -> rolled -> windows of 3 x 3 -> MatMul -> y.

    Args:
        pad: zeros at the end of both axes, cut off where negative; 0 crops to 3 x 3 by a Slice instead.
        roll: shift the second axis by one, as Slice, Slice and Concat.
        axis: of the norm.
        channels: C.
        twice: something else reads the norm too.
        last: the moves turn the last axis.
        rows: axes of gain and shift in front of C.
    """
    size = 5 + pad if pad else 3
    tensors = {"g": normal(*rows, channels, seed=1), "b": normal(*rows, channels, seed=2), "w": normal(channels, 4)}
    tensors |= {"pads": np.array([0, 0, 0, 0, 0, pad, pad, 0]), "starts": np.array([1, 1]), "ends": np.array([4, 4])}
    tensors |= {"axes": np.array([1, 2]), "one": np.array([1]), "zero": np.array([0]), "end": np.array([9])}
    tensors |= {"apart": np.array([2, size // 3, 3, size // 3, 3, channels]), "rows": np.array([-1, 9, channels])}
    if axis not in (-1, 3):
        tensors |= {"g": normal(5, channels, seed=1), "b": normal(5, channels, seed=2)}
    nodes = [node("LayerNormalization", "x g b", "n", "norm", axis=axis)]
    nodes.append(node("Pad", "n pads", "p") if pad else node("Slice", "n starts ends axes", "p", "crop"))
    windows = "p"
    if roll:
        nodes += [node("Slice", "p one end one", "tail", "tail"), node("Slice", "p zero one one", "head", "head")]
        nodes.append(node("Concat", "tail head", "r", axis=1))
        windows = "r"
    if last:
        nodes += [node("Transpose", windows, "l", "last", perm=[0, 1, 3, 2]), node("MatMul", "v l", "y")]
        tensors["v"] = normal(4, channels)
    else:
        nodes += [
            node("Reshape", f"{windows} apart", "a", "apart"),
            node("Transpose", "a", "t", perm=[0, 1, 3, 2, 4, 5]),
        ]
        nodes += [node("Reshape", "t rows", "q", "rows"), node("MatMul", "q w", "y")]
    outputs = ("y", "z") if twice else ("y",)
    nodes += [node("Relu", "n", "z")] if twice else []
    return build(nodes, {"x": (2, 5, 5, channels)}, tensors, outputs=outputs)


def packed_inside(form: str, outer: str, *, turns: int = 3, dynamic: bool = False, **sizes: int) -> Model:
    """`packed` as the body of a Loop of some turns, which carries x, or as the branch that a positive x takes of an If.

    The input is `start`, the output `z`.
    """
    graph = packed(form, dynamic=dynamic, **sizes).graph
    shape = [d.dim_value or d.dim_param for d in graph.input[0].type.tensor_type.shape.dim]

    def value(name: str, kind: int = TensorProto.FLOAT, dims: Sequence[int | str] = shape) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dims)

    inner = [*graph.node]
    if outer == "Loop":
        given = [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x")]
        ends = [value("on", TensorProto.BOOL, []), value("y")]
        body = helper.make_graph([*inner, node("Identity", "go", "on")], "body", given, ends, graph.initializer)
        nodes = [node("Loop", "turns - start", "z", "loop", body=body)]
    else:
        inner.insert(0, node("Identity", "start", "x", "same"))
        then = helper.make_graph(inner, "then", [], [value("y")], graph.initializer)
        other = helper.make_graph([node("Neg", "start", "n")], "other", [], [value("n")])
        nodes = [node("ReduceMax", "start", "most", keepdims=0), node("Cast", "most", "positive", to=TensorProto.BOOL)]
        nodes += [node("If", "positive", "z", "choice", then_branch=then, else_branch=other)]
    return build(nodes, {"start": shape}, {"turns": np.array(turns)}, outputs=("z",))
