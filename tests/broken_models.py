"""Quantized models, each broken in one way: the material of the lint tests, built in code.

`BROKEN` maps a name to the rule that must find it, the node it must name, and the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


class Net:
    """Collects nodes and initializers; every method that adds a node returns the name of its output."""

    def __init__(self, *, opset: int = 21, seed: int = 0, elem: int = FLOAT) -> None:
        """An empty graph."""
        self.opset, self.elem = opset, elem
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inits: list[onnx.TensorProto] = []

    def init(self, name: str, array: Any) -> str:
        """One initializer."""
        self.inits.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name))
        return name

    def op(self, op_type: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """One node; its outputs are `<name>.out`, `<name>.out1`, ..."""
        names = [f"{name}.out{i or ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        return names[0]

    def normal(self, name: str, shape: Sequence[int], scale: float = 0.3) -> str:
        """A float initializer of normal values."""
        dtype = np.float16 if self.elem == HALF else np.float32
        return self.init(name, (self.rng.normal(size=shape) * scale).astype(dtype))

    def params(self, name: str, scale: Any = 0.02, zero: Any = 0, dtype: Any = np.int8) -> list[str]:
        """Scale and zero point initializers; `zero` None: no zero point."""
        kind = np.float16 if self.elem == HALF else np.float32
        scale = np.asarray(scale)
        scale = scale.astype(kind) if scale.dtype in (np.float64, np.int64) else scale
        names = [self.init(name + ".scale", scale)]
        if zero is not None:
            zero = np.asarray(zero)
            full = np.full(scale.shape, zero) if zero.ndim == 0 and not isinstance(zero, np.ndarray) else zero
            names.append(self.init(name + ".zero", np.broadcast_to(full, full.shape).astype(dtype)))
        return names

    def qdq(self, x: str, name: str, scale: Any = 0.02, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> str:
        """`<name>.Q` and `<name>.DQ` on a float tensor."""
        if np.ndim(scale) and np.ndim(zero) == 0 and zero is not None:
            zero = np.full(np.shape(scale), zero)
        params = self.params(name, scale, zero, dtype)
        q = self.op("QuantizeLinear", [x, *params], name + ".Q", **attributes)
        return self.op("DequantizeLinear", [q, *params], name + ".DQ", **attributes)

    def dq(self, codes: Any, name: str, scale: Any = 0.01, zero: Any = 0, **attributes: Any) -> str:
        """`<name>.DQ` on stored codes."""
        if np.ndim(scale) and np.ndim(zero) == 0 and zero is not None:
            zero = np.full(np.shape(scale), zero)
        params = self.params(name, scale, zero, codes.dtype)
        return self.op("DequantizeLinear", [self.init(name + ".codes", codes), *params], name + ".DQ", **attributes)

    def codes(self, shape: Sequence[int], dtype: Any = np.int8, low: int = -100, high: int = 100) -> np.ndarray:
        """Random codes."""
        return self.rng.integers(low, high, size=shape).astype(dtype)

    def done(
        self, y: str | Sequence[str], x_shape: Sequence[int], y_shape: Sequence[int], *, elem: int = 0
    ) -> onnx.ModelProto:
        """The model from input x to the tensors y."""
        ends = [y] if isinstance(y, str) else list(y)
        graph = helper.make_graph(
            self.nodes,
            "broken",
            [helper.make_tensor_value_info("x", self.elem, list(x_shape))],
            [helper.make_tensor_value_info(name, elem or self.elem, list(y_shape)) for name in ends],
            self.inits,
        )
        domains = sorted({n.domain for n in self.nodes} - {""})
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


Part = Callable[[Net], str]
X, ROWS = [1, 16, 8, 8], [32, 128]


def full(size: int | Sequence[int], value: float = 0.01, dtype: Any = np.float64) -> np.ndarray:
    """Equal scales; float64 stands for the float type of the graph."""
    return np.full(size, value, dtype)


def data(g: Net) -> str:
    """A good activation quantizer, `a`."""
    return g.qdq("x", "a")


def plain(g: Net) -> str:
    """No quantizer."""
    return "x"


def float_kernel(g: Net) -> str:
    """A float convolution weight."""
    return g.normal("w", [16, 16, 3, 3])


def float_matrix(g: Net) -> str:
    """A float matrix."""
    return g.normal("w", [128, 64])


def kernel(scale: Any = None, zero: Any = 0, dtype: Any = np.int8, name: str = "w", **attributes: Any) -> Part:
    """A stored convolution weight, `w`."""
    low, high = (-100, 100) if np.dtype(dtype).kind == "i" else (0, 255)
    scale = full(16) if scale is None else scale
    attributes = attributes or {"axis": 0}
    return lambda g: g.dq(g.codes([16, 16, 3, 3], dtype, low, high), name, scale, zero, **attributes)


def matrix(scale: Any = None, dtype: Any = np.int8, shape: Sequence[int] = (128, 64), **attributes: Any) -> Part:
    """A stored matrix, `w`."""
    low, high = (-7, 7) if np.dtype(dtype) == ml_dtypes.int4 else (-100, 100)
    scale = full(shape[-1]) if scale is None else scale
    return lambda g: g.dq(
        g.rng.integers(low, high, size=shape).astype(dtype), "w", scale, 0, **(attributes or {"axis": 1})
    )


def conv(
    a: Part = data,
    w: Part | None = None,
    bias: Part | None = None,
    tail: Callable[[Net, str], str] | None = None,
    op: str = "Conv",
    elem: int = FLOAT,
    opset: int = 21,
) -> onnx.ModelProto:
    """One convolution `conv` of 16 channels on 8x8, quantized unless a part says otherwise."""
    g = Net(opset=opset, elem=elem)
    y = g.op(op, [a(g), (w or kernel())(g), *([bias(g)] if bias else [])], "conv", pads=[1] * 4)
    return g.done(tail(g, y) if tail else y, X, X)


def product(
    a: Part = data, w: Part | None = None, op: str = "MatMul", elem: int = FLOAT, opset: int = 21, **attributes: Any
) -> onnx.ModelProto:
    """One product `product` of (32, 128) and (128, 64)."""
    g = Net(opset=opset, elem=elem)
    y = g.op(op, [a(g), (w or matrix())(g)], "product", **attributes)
    return g.done(y, ROWS, [32, 64])


def pair(mid: Callable[[Net, str], str], first: Part = data) -> onnx.ModelProto:
    """Convolution `conv`, something between, quantizer `b`, convolution `conv2`."""
    g = Net()
    y = g.op("Conv", [first(g), kernel()(g)], "conv", pads=[1] * 4)
    y = g.op("Conv", [mid(g, y), kernel(name="w2")(g)], "conv2", pads=[1] * 4)
    return g.done(y, X, X)


def act(scale: Any = 0.02, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> Part:
    """The activation quantizer `a` with other parameters."""
    return lambda g: g.qdq("x", "a", scale, zero, dtype, **attributes)


def dead(value: float, size: int = 16, dtype: Any = np.float32) -> np.ndarray:
    """Scales of which one has another value."""
    scale = np.full(size, 0.01, dtype)
    scale[3] = value
    return scale


def computed(g: Net) -> str:
    """A scale computed from the input: max |x| / 127."""
    largest = g.op("ReduceMax", [g.op("Abs", ["x"], "abs")], "largest", keepdims=0)
    scale = g.op("Div", [largest, g.init("c", np.float32(127))], "scale")
    zero = g.init("z", np.int8(0))
    q = g.op("QuantizeLinear", ["x", scale, zero], "a.Q")
    return g.op("DequantizeLinear", [q, scale, zero], "a.DQ")


def computed_zero(g: Net) -> str:
    """A zero point computed from the input."""
    zero = g.op("Cast", [g.op("ReduceMax", ["x"], "largest", keepdims=0)], "z", to=TensorProto.INT8)
    q = g.op("QuantizeLinear", ["x", g.init("s", np.float32(0.02)), zero], "a.Q")
    return g.op("DequantizeLinear", [q, "s", zero], "a.DQ")


def typed(dtype: int, zero: bool) -> Part:
    """A quantizer with output_dtype, with and without an INT8 zero point."""

    def make(g: Net) -> str:
        names = g.params("a", zero=0 if zero else None)
        q = g.op("QuantizeLinear", ["x", *names], "a.Q", output_dtype=dtype)
        return g.op("DequantizeLinear", [q, *names], "a.DQ")

    return make


def quantized_first(g: Net) -> tuple[str, list[str]]:
    """INT8 codes of the input, and their scale and zero point."""
    names = g.params("a")
    return g.op("QuantizeLinear", ["x", *names], "a.Q"), names


def qlinear_conv() -> onnx.ModelProto:
    """QLinearConv with an INT32 bias between Q and DQ."""
    g = Net()
    codes, names = quantized_first(g)
    w, b = g.init("w", g.codes([16, 16, 3, 3])), g.init("b", g.codes([16], np.int32))
    out = g.params("o", 0.1)
    y = g.op("QLinearConv", [codes, *names, w, *g.params("wp", full(16), np.zeros(16)), *out, b], "qconv", pads=[1] * 4)
    return g.done(g.op("DequantizeLinear", [y, *out], "o.DQ"), X, X)


def integer_op(op: str, *, domain: str = "", two: bool = False) -> onnx.ModelProto:
    """An elementwise operator on codes."""
    g = Net()
    codes, names = quantized_first(g)
    out = g.params("o")
    inputs = [codes, *names] * (2 if two else 1) + out
    y = g.op(op, inputs, "integer", domain=domain)
    return g.done(g.op("DequantizeLinear", [y, *out], "o.DQ"), X, X)


def qlinear_matmul() -> onnx.ModelProto:
    """QLinearMatMul between Q and DQ."""
    g = Net()
    codes, names = quantized_first(g)
    out = g.params("o", 0.1)
    y = g.op("QLinearMatMul", [codes, *names, g.init("w", g.codes([128, 64])), *g.params("wp"), *out], "qmatmul")
    return g.done(g.op("DequantizeLinear", [y, *out], "o.DQ"), ROWS, [32, 64])


def integer_product(op: str) -> onnx.ModelProto:
    """ConvInteger or MatMulInteger, cast to float."""
    g = Net()
    codes, _ = quantized_first(g)
    is_conv = op == "ConvInteger"
    w = g.init("w", g.codes([16, 16, 3, 3] if is_conv else [128, 64]))
    y = g.op(op, [codes, w], "integer", **({"pads": [1] * 4} if is_conv else {}))
    y = g.op("Cast", [y], "cast", to=FLOAT)
    return g.done(y, X if is_conv else ROWS, X if is_conv else [32, 64])


def dynamic() -> onnx.ModelProto:
    """DynamicQuantizeLinear."""
    g = Net()
    g.op("DynamicQuantizeLinear", ["x"], "dynamic", 3)
    return g.done(g.op("DequantizeLinear", ["dynamic.out", "dynamic.out1", "dynamic.out2"], "d"), X, X)


def matmul_nbits() -> onnx.ModelProto:
    """com.microsoft MatMulNBits."""
    g = Net()
    codes, scale = g.init("b", g.codes([64, 4, 16], np.uint8, 0, 255)), g.init("s", np.full([256], 0.01, np.float32))
    y = g.op("MatMulNBits", ["x", codes, scale], "nbits", domain="com.microsoft", K=128, N=64, bits=4, block_size=32)
    return g.done(y, ROWS, [32, 64])


def attention(*, elem: int = HALF) -> onnx.ModelProto:
    """softmax(q k) v with every operand quantized."""
    g = Net(elem=elem)
    q, k, v = (g.op("MatMul", ["x", g.normal(f"w{n}", [64, 64])], f"m{n}") for n in "qkv")
    keys = g.op("Transpose", [g.qdq(k, "k")], "keys", perm=[0, 1, 3, 2])
    soft = g.op("Softmax", [g.op("MatMul", [g.qdq(q, "q"), keys], "scores")], "softmax", axis=-1)
    y = g.op("MatMul", [g.qdq(soft, "s", 1 / 127), g.qdq(v, "v")], "mix")
    return g.done(y, [1, 4, 64, 64], [1, 4, 64, 64])


def added_constant(codes: np.ndarray, zero: int = 0) -> onnx.ModelProto:
    """x + a dequantized constant."""
    g = Net()
    return g.done(g.op("Add", ["x", g.dq(codes, "k", 0.01, zero)], "add"), X, X)


def gathered(scale: Any = 0.01, **attributes: Any) -> onnx.ModelProto:
    """Rows of stored codes, picked and then dequantized."""
    g = Net()
    codes = g.init("codes", g.rng.integers(-127, 128, (64, 32)).astype(np.int8))
    rows = g.op("Gather", [codes, g.op("ArgMax", ["x"], "pick", axis=1, keepdims=0)], "rows")
    real = g.op("DequantizeLinear", [rows, *g.params("r", scale, np.zeros(np.shape(scale)))], "r.DQ", **attributes)
    return g.done(g.op("Add", [real, g.normal("k", [32])], "add"), X, [1, 8, 8, 32])


def norm(g: Net, y: str) -> str:
    """Q/DQ, InstanceNormalization, Q/DQ."""
    y = g.op("InstanceNormalization", [g.qdq(y, "m"), g.normal("n.s", [16]), g.normal("n.b", [16])], "norm")
    return g.qdq(y, "b")


def floats(g: Net, op: str, y: str) -> str:
    """Q/DQ `m`, a pointwise operator, Q/DQ `b`."""
    return g.qdq(g.op(op, [g.qdq(y, "m")], op.lower()), "b")


def head(tail: Callable[[Net, str], str]) -> onnx.ModelProto:
    """A quantized product with something behind it."""
    g = Net()
    y = g.op("MatMul", [data(g), matrix()(g)], "product")
    return g.done(tail(g, y), ROWS, [32, 64])


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A model that one rule must find at one node."""

    rule: str
    node: str
    build: Callable[[], onnx.ModelProto]
    fixed: bool = True


def _broken(rule: str, node: str, build: Callable[[], onnx.ModelProto], fixed: bool = True) -> Broken:
    return Broken(rule=rule, node=node, build=build, fixed=fixed)


FP8, E5M2, INT4, UINT4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.uint4


def e4m3(g: Net) -> str:
    """An FP8 matrix."""
    return g.dq(g.rng.normal(size=[128, 64]).astype(FP8), "w", 0.01)


BROKEN: dict[str, Broken] = {
    "qlinear conv": _broken("operator", "qconv", qlinear_conv),
    "qlinear matmul": _broken("operator", "qmatmul", qlinear_matmul),
    "qlinear add": _broken(
        "operator", "integer", lambda: integer_op("QLinearAdd", domain="com.microsoft", two=True), False
    ),
    "qlinear sigmoid": _broken(
        "operator", "integer", lambda: integer_op("QLinearSigmoid", domain="com.microsoft"), False
    ),
    "conv integer": _broken("operator", "integer", lambda: integer_product("ConvInteger"), False),
    "matmul integer": _broken("operator", "integer", lambda: integer_product("MatMulInteger"), False),
    "dynamic quantize": _broken("operator", "dynamic", dynamic, False),
    "matmul nbits": _broken("operator", "nbits", matmul_nbits, False),
    "bias per channel": _broken(
        "int32-bias", "b.DQ", lambda: conv(bias=lambda g: g.dq(g.codes([16], np.int32), "b", full(16, 2e-4), axis=0))
    ),
    "bias one scale": _broken(
        "int32-bias", "b.DQ", lambda: conv(bias=lambda g: g.dq(g.codes([16], np.int32), "b", 2e-4))
    ),
    "int8 zero point 5": _broken("asymmetric", "a.Q", lambda: conv(a=act(zero=5))),
    "int8 zero point -128": _broken("asymmetric", "a.Q", lambda: product(a=act(zero=-128))),
    "uint8 zero point 128": _broken("asymmetric", "a.Q", lambda: conv(a=act(zero=128, dtype=np.uint8))),
    "weight uint8 zero point 128": _broken("asymmetric", "w.DQ", lambda: conv(w=kernel(zero=128, dtype=np.uint8))),
    "weight uint8 zero points": _broken(
        "asymmetric", "w.DQ", lambda: conv(w=kernel(zero=np.arange(16) * 9, dtype=np.uint8))
    ),
    "added uint8 constant": _broken(
        "asymmetric", "k.DQ", lambda: added_constant(np.arange(16, dtype=np.uint8).reshape(1, 16, 1, 1), 7)
    ),
    "uint8 activation": _broken("unsigned", "a.Q", lambda: conv(a=act(dtype=np.uint8))),
    "uint8 weight": _broken("unsigned-codes", "w.DQ", lambda: conv(w=kernel(dtype=np.uint8))),
    "uint8 weight without zero point": _broken(
        "unsigned-codes", "w.DQ", lambda: conv(w=kernel(zero=None, dtype=np.uint8))
    ),
    "no zero point": _broken("no-zero-point", "a.Q", lambda: conv(a=act(zero=None))),
    "no zero point, matmul": _broken("no-zero-point", "a.Q", lambda: product(a=act(zero=None))),
    "int16 activation": _broken("code-type", "a.Q", lambda: conv(a=act(0.0001, dtype=np.int16))),
    "uint16 activation": _broken("code-type", "a.Q", lambda: conv(a=act(0.0001, dtype=np.uint16))),
    "int16 weight": _broken("code-type", "w.DQ", lambda: conv(w=kernel(dtype=np.int16))),
    "uint4 activation": _broken("code-type", "a.Q", lambda: conv(a=act(0.3, dtype=UINT4))),
    "int4 activation": _broken("code-type", "a.Q", lambda: conv(a=act(0.3, dtype=INT4))),
    "e5m2 activation": _broken("code-type", "a.Q", lambda: conv(a=act(dtype=E5M2)), False),
    "output_dtype uint8": _broken("output-dtype", "a.Q", lambda: conv(a=typed(TensorProto.UINT8, False))),
    "output_dtype against zero point": _broken("output-dtype", "a.Q", lambda: conv(a=typed(TensorProto.UINT8, True))),
    "computed zero point": _broken("computed-zero-point", "a.Q", lambda: conv(a=computed_zero), False),
    "computed scale, conv": _broken("computed-scale", "a.Q", lambda: conv(a=computed), False),
    "computed scale, matmul": _broken("dynamic-scale", "a.Q", lambda: product(a=computed), False),
    "weight scale 0": _broken("scale-value", "w.DQ", lambda: conv(w=kernel(dead(0)))),
    "weight scale below 0": _broken("scale-value", "w.DQ", lambda: conv(w=kernel(dead(-0.01)))),
    "weight scale nan": _broken("scale-value", "w.DQ", lambda: conv(w=kernel(dead(np.nan))), False),
    "activation scale 0": _broken("scale-value", "a.Q", lambda: conv(a=act(0.0))),
    "activation scale below 0": _broken("scale-value", "a.Q", lambda: product(a=act(-0.02))),
    "weight scale infinite": _broken("scale-range", "w.DQ", lambda: conv(w=kernel(dead(np.inf))), False),
    "activation scale subnormal": _broken("scale-range", "a.Q", lambda: conv(a=act(1e-40))),
    "activation scale subnormal in half": _broken("scale-range", "a.Q", lambda: product(a=act(6e-8), elem=HALF)),
    "activation scale infinite": _broken("scale-range", "a.Q", lambda: conv(a=act(np.inf)), False),
    "float scale in half": _broken("scale-type", "w.DQ", lambda: conv(w=kernel(full(16, 0.01, np.float32)), elem=HALF)),
    "half scale in float": _broken("scale-type", "w.DQ", lambda: product(w=matrix(full(64, 0.01, np.float16)))),
    "axis outside": _broken("scale-shape", "w.DQ", lambda: conv(w=kernel(axis=4))),
    "axis of another size": _broken("scale-shape", "w.DQ", lambda: conv(w=kernel(axis=3))),
    "scale of rank 3": _broken("scale-shape", "w.DQ", lambda: conv(w=kernel(full([16, 1, 1]), 0)), False),
    "scalar zero point [1]": _broken("zero-point-shape", "w.DQ", lambda: conv(w=kernel(zero=np.zeros(1)))),
    "vector zero point": _broken("zero-point-shape", "a.Q", lambda: conv(a=act(zero=np.zeros(16)))),
    "ragged blocks": _broken(
        "block-shape", "w.DQ", lambda: product(plain, matrix(full([3, 64]), INT4, axis=0, block_size=48))
    ),
    "blocks on two axes": _broken(
        "block-shape", "w.DQ", lambda: product(plain, matrix(full([2, 2]), INT4, axis=0, block_size=64))
    ),
    "odd int4": _broken("odd-codes", "w.DQ", lambda: odd_codes()),
    "gathered codes": _broken("gathered-codes", "r.DQ", lambda: gathered()),
    "gathered codes, scale per column": _broken(
        "gathered-codes", "r.DQ", lambda: gathered(np.linspace(0.01, 0.02, 32), axis=-1)
    ),
    "scalar codes": _broken("scalar-codes", "k.DQ", lambda: added_constant(np.int8(5))),
    "fp8 and int8": _broken("mixed-types", "product", lambda: product(w=e4m3), False),
    "int8 and fp8": _broken("mixed-types", "product", lambda: product(a=act(dtype=FP8)), False),
    "int4 blocks and int8": _broken(
        "block-product", "w.DQ", lambda: product(w=matrix(full([2, 64]), INT4, axis=0, block_size=64))
    ),
    "int8 blocks and int8": _broken(
        "block-product", "w.DQ", lambda: product(w=matrix(full([2, 64]), axis=0, block_size=64))
    ),
    "conv axis 1": _broken("weight-axis", "w.DQ", lambda: conv(w=kernel(axis=1))),
    "matmul axis 0": _broken("weight-axis", "w.DQ", lambda: product(w=matrix(full(128), axis=0))),
    "gemm transB axis 1": _broken(
        "weight-axis", "w.DQ", lambda: product(w=matrix(full(128), shape=(64, 128), axis=1), op="Gemm", transB=1)
    ),
    "per channel activation": _broken(
        "activation-axis", "a.Q", lambda: conv(a=act(np.linspace(0.01, 0.03, 16), axis=1))
    ),
    "per feature activation": _broken(
        "activation-axis", "a.Q", lambda: product(a=act(np.linspace(0.01, 0.03, 128), axis=1))
    ),
    "scale of shape [1]": _broken("one-element-scale", "a.Q", lambda: conv(a=act(full(1, 0.02)))),
    "float kernel": _broken("unpaired-activation", "conv", lambda: conv(w=float_kernel)),
    "float matrix": _broken("unpaired-activation", "product", lambda: product(w=float_matrix)),
    "weight-only conv": _broken("unpaired-weight", "conv", lambda: conv(plain), False),
    "transposed conv": _broken("transposed", "conv", lambda: conv(op="ConvTranspose", w=kernel(axis=1))),
    "transposed weight-only": _broken("transposed", "conv", lambda: conv(plain, op="ConvTranspose", w=kernel(axis=1))),
    "int8 in blocks": _broken(
        "slow-weight", "w.DQ", lambda: product(plain, matrix(full([2, 64]), axis=0, block_size=64))
    ),
    "int4 per channel": _broken("slow-weight", "w.DQ", lambda: product(plain, matrix(full(64), INT4, axis=1))),
    "int4 one scale": _broken("slow-weight", "w.DQ", lambda: product(plain, matrix(0.01, INT4))),
    "attention": _broken("attention", "scores", attention),
    "output of conv": _broken("output", "o.Q", lambda: conv(tail=lambda g, y: g.qdq(y, "o"))),
    "output of matmul": _broken("output", "o.Q", lambda: head(lambda g, y: g.qdq(y, "o"))),
    "before relu": _broken("before-float", "m.Q", lambda: pair(lambda g, y: floats(g, "Relu", y))),
    "before sigmoid": _broken("before-float", "m.Q", lambda: pair(lambda g, y: floats(g, "Sigmoid", y))),
    "before normalization": _broken("before-float", "m.Q", lambda: pair(norm)),
    "float weight": _broken(
        "float-weight", "w.Q", lambda: conv(w=lambda g: g.qdq(float_kernel(g), "w", full(16), axis=0))
    ),
    "float matrix, one scale": _broken(
        "float-weight", "w.Q", lambda: product(w=lambda g: g.qdq(float_matrix(g), "w", 0.01))
    ),
    "default axis": _broken(
        "default-axis", "w.DQ", lambda: product(w=lambda g: g.dq(g.codes([128, 64]), "w", full(64)))
    ),
}


def odd_codes() -> onnx.ModelProto:
    """A weight of 127 x 63 INT4 codes."""
    g = Net()
    y = g.op("MatMul", ["x", matrix(full([1, 63]), INT4, (127, 63), axis=0, block_size=127)(g)], "product")
    return g.done(y, [32, 127], [32, 63])
