"""The graphs that show what a GPU does: each has steps of one kernel, and its engine is held to that.

Card -> `probes` -> ONNX graphs of some steps and of more -> compiled -> `claim_failure`: '' where the difference of the
two layer tables is the kernels that the probe is about, and nothing else. The time of a step is the slope.
Must not measure. Layout changes at both ends of a graph, which compilers add, are in both and cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.backends.layers import SYNCHRONIZATION, LayerTable
from engines.cost.kernel import LARGE
from engines.cost.work import PRODUCT, Work
from engines.timing.driver import Card
from engines.verify.kernels import compute_kernel, consumed_dtype

Kind = Literal["chain", "single"]
Array = npt.NDArray[np.generic]
NUMPY: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
}
_CODES = ("int8", "fp8")
# data type -> the first generation whose products run in it; float32 and float16 are everywhere
SINCE = {"int8": 75, "bfloat16": 80, "fp8": 89}
SIZE, CHANNELS, IMAGE = LARGE, 256, (8, 256, 64, 64)
SMALL_CONV = Work(form=PRODUCT, read=25088, written=25088, weights=73728, m=196, n=64, k=576, spatial=2)  # of 3x3
ONES = 8  # output channels of a product whose weights are all one, to see how it accumulates
DRAM_BYTES = 1 << 30
ROW = 1024  # of a sum, whose two inputs and output are rows of FP16
ROW_BYTES = 3 * 2 * ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing to measure.

    Attributes:
        name: of it, unique.
        dtype: in which its steps compute.
        multiplies: its steps are products, which must consume that type in both operands.
        kind: 'chain': its kernels depend on each other, and engines of two lengths differ by steps alone; 'single':
            each engine is one kernel, and the number of steps is how much that one does.
        steps: of each engine, rising.
        make: steps -> the graph, whose nodes 'step0', 'step1', .. are what is measured.
        macs: multiply-adds of a step.
        nbytes: that a step reads and writes.
        repeats: inferences in each interval that is timed.
        seconds: of the run; what reaches the sustained clock takes long.
        rate: its rate is that of products of its type.
    """

    name: str
    dtype: str
    multiplies: bool
    kind: Kind
    steps: tuple[int, ...]
    make: Callable[[int], onnx.ModelProto]
    macs: int = 0
    nbytes: int = 0
    repeats: int = 1
    seconds: float = 0.3
    rate: bool = False


def probes(card: Card, seconds: float = 3.0) -> list[Probe]:
    """What is measured on a GPU, in this order; `seconds` for each product that shows the sustained clock.

    Products come in the types that the generation has.
    """
    sm = int(card.target.removeprefix("sm"))
    types = [t for t in NUMPY if sm >= SINCE.get(t, 0)]
    half: dict[str, Any] = {"dtype": "float16", "kind": "chain"}
    unit = max(card.l2_bytes // 8, 1 << 18) // ROW_BYTES * ROW_BYTES
    dram = min(DRAM_BYTES, card.memory_bytes // 4) // ROW_BYTES * ROW_BYTES
    found = [
        Probe(name="start", **half, multiplies=False, steps=(20, 120), make=pools),
        Probe(name="product_start_3x3", **half, multiplies=True, steps=(10, 40), make=partial(small_convs, kernel=3)),
        Probe(name="product_start_5x5", **half, multiplies=True, steps=(10, 40), make=partial(small_convs, kernel=5)),
        _add("dram", steps=(1,), unit=dram, repeats=4),
        _add("l2", steps=(1, 2), unit=unit, repeats=64),
    ]
    found += [_product(f"{what}_{t}", t, what == "conv", seconds) for t in types for what in ("matmul", "conv")]
    elements = math.prod(IMAGE) * 49 // 64
    found.append(
        Probe(
            name="depthwise_float16",
            **half,
            multiplies=True,
            steps=(1, 5),
            make=depthwise,
            macs=9 * elements,
            nbytes=4 * elements,
        )
    )
    volume = 32 * 48**3
    found.append(
        Probe(
            name="conv3d_float16",
            **half,
            multiplies=True,
            steps=(1, 5),
            make=volumes,
            macs=27 * 32 * volume,
            nbytes=4 * volume,
        )
    )
    return found


def _product(name: str, dtype: str, conv: bool, seconds: float) -> Probe:
    return Probe(
        name=name,
        dtype=dtype,
        multiplies=True,
        kind="chain" if conv else "single",
        steps=(1, 5) if conv else (1,),
        make=partial(convs if conv else matmul, dtype=dtype),
        macs=math.prod(IMAGE) * 9 * CHANNELS if conv else SIZE**3,
        repeats=4,
        seconds=seconds,
        rate=True,
    )


def _add(name: str, *, steps: tuple[int, ...], unit: int, repeats: int) -> Probe:
    return Probe(
        name=name,
        dtype="float16",
        multiplies=False,
        kind="single",
        steps=steps,
        make=partial(add, unit=unit),
        nbytes=unit,
        repeats=repeats,
    )


class Graph:
    """Collects nodes and weights; methods return the name of the tensor that they made."""

    def __init__(self) -> None:
        """Empty; random values come from one seed."""
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """One node with one output."""
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, name: str, array: Array) -> str:
        """One array."""
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, shape: Sequence[int], dtype: str, *, ones_axis: int | None = None) -> str:
        """A weight that keeps the magnitude of what it multiplies, dequantized where it is of codes.

        Its first `ONES` output channels, on that axis, are one throughout in a floating type.
        """
        inputs = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
        values = self.rng.standard_normal(size=math.prod(shape), dtype=np.float32).reshape(shape)
        if dtype not in _CODES:
            values /= math.sqrt(inputs)
            if ones_axis is not None:
                values[(slice(None),) * ones_axis + (slice(ONES),)] = 1
            return self.constant(name, values.astype(NUMPY[dtype]))
        codes = self.constant(f"{name}_codes", codes_of(values, dtype))
        scale = (1 / 40 if dtype == "int8" else 1.0) / math.sqrt(inputs)
        return self.dequantized(codes, name, scale)

    def dequantized(self, codes: str, name: str, scale: float) -> str:
        """Codes as FP16, by one scale: TensorRT-RTX's products then take bias, activation and shortcut with them."""
        factor = self.constant(f"{name}_scale", np.asarray(scale, np.float16))
        return self.add("DequantizeLinear", [codes, factor], name)

    def data(self, dtype: str) -> str:
        """The input in a floating type."""
        return self.dequantized("x", "x_float", 1 / 40 if dtype == "int8" else 1.0) if dtype in _CODES else "x"

    @staticmethod
    def cast(values: Array, dtype: str) -> Array:
        """Values in a data type."""
        return np.asarray(values, NUMPY[dtype])

    def model(
        self, inputs: Sequence[str], shape: Sequence[int], output: str, dtype: str, *, written: Sequence[int] = ()
    ) -> onnx.ModelProto:
        """The model; its output has the shape of the inputs or that of `written`, and codes are read, not written."""
        kind, output_kind = (_elem_type(t) for t in (dtype, "float16" if dtype in _CODES else dtype))
        values = [helper.make_tensor_value_info(name, kind, list(shape)) for name in inputs]
        ends = [helper.make_tensor_value_info(output, output_kind, list(written or shape))]
        graph = helper.make_graph(self.nodes, "probe", values, ends, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def codes_of(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Normal values as codes: INT8 in steps of 1/40, FP8 as they are."""
    return np.clip(np.rint(values * 40), -127, 127).astype(np.int8) if dtype == "int8" else values.astype(NUMPY[dtype])


def _elem_type(dtype: str) -> int:
    return TensorProto.FLOAT8E4M3FN if dtype == "fp8" else helper.np_dtype_to_tensor_dtype(np.dtype(NUMPY[dtype]))


def pools(steps: int) -> onnx.ModelProto:
    """Maxima over 3x3 of (1, 32, 14, 14), one after the other: no compiler fuses two."""
    g, y = Graph(), "x"
    for i in range(steps):
        y = g.add("MaxPool", [y], f"step{i}", kernel_shape=[3, 3], pads=[1] * 4)
    return g.model(["x"], [1, 32, 14, 14], y, "float16")


def small_convs(steps: int, kernel: int) -> onnx.ModelProto:
    """Convolutions of 64 channels on 14x14, one after the other."""
    return _stack(steps, [1, 64, 14, 14], kernel)


def depthwise(steps: int) -> onnx.ModelProto:
    """Depthwise 3x3 convolutions of (8, 256, 56, 56), one after the other."""
    return _stack(steps, [IMAGE[0], CHANNELS, 56, 56], 3, group=CHANNELS)


def volumes(steps: int) -> onnx.ModelProto:
    """3x3x3 convolutions of 32 channels on 48x48x48, one after the other."""
    return _stack(steps, [1, 32, 48, 48, 48], 3)


def _stack(steps: int, shape: Sequence[int], kernel: int, group: int = 1) -> onnx.ModelProto:
    """Convolutions with ReLU in FP16 that keep the shape."""
    g, y, axes = Graph(), "x", len(shape) - 2
    for i in range(steps):
        w = g.weight(f"w{i}", [shape[1], shape[1] // group, *[kernel] * axes], "float16")
        pads = [kernel // 2] * (2 * axes)
        y = g.add("Conv", [y, w], f"step{i}", kernel_shape=[kernel] * axes, pads=pads, group=group)
        y = g.add("Relu", [y], f"relu{i}")
    return g.model(["x"], shape, y, "float16")


def add(steps: int, unit: int) -> onnx.ModelProto:
    """One sum of two tensors that reads and writes `steps` times `unit` bytes."""
    g = Graph()
    y = g.add("Add", ["x", "y"], "step0")
    return g.model(["x", "y"], [steps * unit // ROW_BYTES, ROW], y, "float16")


def matmul(steps: int, dtype: str) -> onnx.ModelProto:
    """One product of (4096, 4096) matrices; in a floating type the first columns of the weight are ones."""
    g = Graph()
    x, w = g.data(dtype), g.weight("w0", [SIZE, SIZE], dtype, ones_axis=1)
    return g.model(["x"], [SIZE, SIZE], g.add("MatMul", [x, w], "step0"), dtype)


def convs(steps: int, dtype: str) -> onnx.ModelProto:
    """3x3 convolutions of one (8, 256, 64, 64) input, each added to the one before.

    One after the other would put kernels between those of codes that write codes.
    """
    g, y = Graph(), ""
    x = g.data(dtype)
    for i in range(steps):
        w = g.weight(f"w{i}", [CHANNELS, CHANNELS, 3, 3], dtype, ones_axis=0 if i == 0 else None)
        z = g.add("Conv", [x, w], f"step{i}", kernel_shape=[3, 3], pads=[1] * 4)
        y = g.add("Relu", [g.add("Add", [z, y], f"add{i}") if y else z], f"relu{i}")
    return g.model(["x"], IMAGE, y, dtype)


def claim_failure(probe: Probe, tables: Sequence[LayerTable]) -> str:
    """What of a probe's compiled engines is not what it claims; '' where all is.

    Each step must be a kernel of its own, that of a product must multiply in the probe's type, and there must be no
    others: none at all in an engine of one kernel, none that come with more steps in a chain.
    """
    for steps, table in zip(probe.steps, tables, strict=True):
        if table.note:
            return table.note
        nodes = [f"step{i}" for i in range(steps if probe.kind == "chain" else 1)]
        found = [compute_kernel(table.layers, node) if probe.multiplies else _only(table, node) for node in nodes]
        names = [layer.name for layer in found if layer is not None]
        if len(set(names)) < len(nodes):
            return f"{len(nodes)} steps are {len(set(names))} kernels of their own"
        others = {consumed_dtype(layer) for layer in found if layer is not None} - {probe.dtype}
        if probe.multiplies and others:
            return f"a product runs in {' and '.join(sorted(others))}, not in {probe.dtype}"
        if probe.kind == "single" and table.kernels != 1:
            return f"the engine has {table.kernels} kernels, not one"
    first, last = tables[0], tables[-1]
    if probe.kind == "chain" and (more := last.kernels - first.kernels) != probe.steps[-1] - probe.steps[0]:
        return f"{probe.steps[-1] - probe.steps[0]} more steps are {more} more kernels"
    if probe.kind == "chain" and _streams(last) != _streams(first):
        return "steps run beside each other, in several streams"
    return ""


def _only(table: LayerTable, node: str) -> Any:
    """The one kernel that names a node, None where there are several or none."""
    found = [layer for layer in table.layers if node in layer.onnx_nodes]
    return found[0] if len(found) == 1 else None


def _streams(table: LayerTable) -> int:
    return sum(layer.kind in SYNCHRONIZATION for layer in table.layers)
