"""Which nodes must compute in FP32 when the other nodes of a graph become FP16 or BF16, and why.

typed Model (+ CalibrationTable) -> walk in the order of the nodes, three kinds of tensors -> node -> Skip.
This module must not change a graph.

| kind of tensor | what may happen to it |
|---|---|
| ordinary | it is stored in the low type |
| wide | it may overflow or lose what matters (squares, sums, an epsilon, positions): its readers compute in FP32 |
| statistic | one value for many (mean, deviation): the step that applies it computes in FP32, its result is ordinary |

A measured range beats the rules of what may overflow: beyond half of what FP16 holds a tensor is wide, within it is
ordinary. What is lost (an epsilon, positions, a normalization's squares) a range does not tell, and rules decide. Where
nothing was measured, a product (Conv, Gemm, MatMul) makes ordinary values again, unless what it reads was measured to
be wide.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Set

import numpy as np
from onnx import NodeProto

from engines.core.operators import ARITHMETIC, NORMS, SOFTMAXES, family
from qdq.assemble.precision.positions import MOVES, POINTWISE, Positions
from qdq.assemble.precision.refused import refused, together
from qdq.assemble.precision.small import SUMMED, biases, divides, mixes
from qdq.assemble.precision.sums import SUMS, Sums, elements
from qdq.assemble.precision.types import (
    Schema,
    dequantizes_constant_scale,
    filling,
    finfo,
    fits,
    has_body,
    largest_code,
)
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import attribute_value, captured
from qdq.plan.choice import FP32
from qdq.plan.plan import Skip

LIMIT = 2.0**15  # half of what float16 holds: samples are not all that the network will see
TINY = 2.0**-10  # a float16 tensor whose largest value is below has less than bfloat16's 8 bits at 2^-17 and below
MANY = 1 << 16  # values of a constant that count as weights, not as an operand
ORDINARY, WIDE, STATISTIC = "ordinary", "wide", "statistic"

_BOUNDED = SOFTMAXES | family("Atan Cos Erf HardSigmoid Hardmax Log Sigmoid Sign Sin Softsign Tanh")
_BLENDS = ARITHMETIC | family("Clip Max Min Sum Where")  # a constant operand keeps a value from zero
_MIXED = "ONNX has no such node with operands in {}"


def decide(model: Model, low: str, table: CalibrationTable | None, asked: Collection[str] = ()) -> dict[str, Skip]:
    """The nodes of a prepared or quantized model, all tensors typed, that keep computing in FP32, by name.

    `low`: 'float16' or 'bfloat16'; no table, of ranges of some tensors, decides by rules. Nodes `asked` for are kept.
    """
    rules = _Rules(model, low, table, asked)
    for node in model.graph.node:
        rules.visit(node)
    rules.keep_what_float_surrounds()
    return {**rules.kept, **together(model, rules.kept)}


def saturated(model: Model, name: str, low: str) -> float | None:
    """The magnitude at which a constant's larger values are cut, None where nothing is cut.

    Bounds of Clip, Max and Min end at the largest value of the type. A mask that only Softmax will see (added, or put
    in by Where) ends at LIMIT, so that adding a score does not overflow; exp of it is 0 as before.
    """
    uses = model.consumers(name)
    if all(u.node.op_type in ("Clip", "Max", "Min") for u in uses):
        return float(finfo(low).max)
    if all(u.node.op_type in ("Where", "Add", "Sub", "Mul", *MOVES) and masks(model, u.node) for u in uses):
        return LIMIT
    return None


def masks(model: Model, node: NodeProto) -> bool:
    """Whether everything that is computed from a node ends in Softmax, through additions and moves."""
    front, seen = [node], set()
    while front:
        node = front.pop()
        for tensor in node.output:
            if model.is_output(tensor) or not model.consumers(tensor):
                return False
            for use in model.consumers(tensor):
                if use.node.op_type in SOFTMAXES or use.node.name in seen:
                    continue
                if use.node.op_type not in ("Add", "Mul", *MOVES):
                    return False
                seen.add(use.node.name)
                front.append(use.node)
    return True


class _Rules:
    """One walk over the graph: `kind` of each float32 tensor, `kept` nodes."""

    def __init__(self, model: Model, low: str, table: CalibrationTable | None, asked: Collection[str]) -> None:
        self._model, self._low, self._asked = model, low, asked
        self._schema = Schema(model, low)
        self._info = finfo(low)
        held = {} if table is None else {name: h.amax for name, h in table.tensors.items()}
        self._ranges = {**(table.ranges if table is not None else {}), **held}
        self._exact = Positions(model, low, self._ranges).reasons
        self._sums = Sums(model, self._ranges)
        self._masked: set[str] = set()  # tensors whose largest magnitude is a mask's, which is cut
        self._kind: dict[str, str] = {}
        self._why: dict[str, str] = {}  # of wide tensors
        self._measured: set[str] = set()  # wide by measurement
        self._reach: dict[str, float] = {}  # dequantized tensor -> the largest magnitude of its codes
        self._power: dict[str, tuple[str, int]] = {}  # tensor -> the tensor it is a multiple of a power of
        self._lost: set[str] = set()  # nodes kept for what vanishes, not for what overflows
        self._fragile: set[str] = set()  # tensors that hold it
        self._constants: dict[str, float] = {}
        self.kept: dict[str, Skip] = {}
        for fed in model.inputs:
            if self._is_float(fed.name) and (measured := self._range(fed.name)):
                self._mark(fed.name, measured, measured=self._ranges[fed.name] > LIMIT)

    def visit(self, node: NodeProto) -> None:
        """Decide about one node whose inputs are known."""
        floats = [*filter(self._is_float, node.input), *filter(self._is_float, captured(node))]
        made = list(filter(self._is_float, node.output))
        if not floats and not made:
            return
        if self._hides(node):
            self._masked.update(made)
        fp32 = (FP32, "the plan asks for it") if node.name in self._asked else self._rule(node, floats, made)
        if fp32 is not None:
            self.kept[node.name] = Skip(node=node.name, op_type=node.op_type, rule=fp32[0], reason=fp32[1])
        for tensor in made:
            self._classify(node, tensor, floats)

    def keep_what_float_surrounds(self) -> None:
        """Keep light nodes whose neighbours on all sides compute in FP32: casts there and back would cost more."""
        light = {
            n.name
            for n in self._model.graph.node
            if n.op_type in MOVES | POINTWISE and n.name not in self.kept and self._touches_float(n)
            if not self._reads_many(n)
        }
        while leaves := {name for name in light if not self._surrounded(self._model.node(name), light)}:
            light -= leaves
        for name in light:
            reason = "its neighbours compute in FP32: casts there and back would cost more"
            self.kept[name] = Skip(node=name, op_type=self._model.node(name).op_type, rule="neighbours", reason=reason)

    def _is_float(self, tensor: str) -> bool:
        info = self._model.info(tensor)
        return bool(tensor) and info is not None and info.dtype == "float32"

    def _touches_float(self, node: NodeProto) -> bool:
        return any(self._is_float(t) for t in (*node.input, *node.output))

    def _reads_many(self, node: NodeProto) -> bool:
        """Whether it reads a large constant, such as a table of words, which in FP32 takes twice the memory."""
        held = (self._model.info(t) for t in node.input if self._is_float(t) and self._constant(t))
        sizes = (math.prod(n for n in info.shape or () if isinstance(n, int)) for info in held if info is not None)
        return any(size > MANY for size in sizes)

    def _constant(self, tensor: str) -> bool:
        return self._model.is_constant(tensor)

    def _rule(self, node: NodeProto, floats: list[str], made: list[str]) -> tuple[str, str] | None:
        """The rule that keeps a node, and its reason; None for the low type."""
        if has_body(node):
            return "body", "bodies of If, Loop and Scan stay as they are"
        if self._schema.of(node) is None:
            return "unknown operator", f"onnx does not know {node.domain or 'ai.onnx'} {node.op_type}"
        infos = [self._model.info(t) for t in (*node.input, *node.output) if t]
        if any(info is None or info.dtype == "undefined" or info.dtype.endswith("_type") for info in infos):
            return "unknown type", "a value at it is no tensor, or its type cannot be inferred"
        if node.name in self._exact:
            return "positions", self._exact[node.name]
        if node.op_type == "Constant" or (node.op_type in ("Cast", "DequantizeLinear") and not made):
            return None
        lowered = self._schema.lowered(node)
        if lowered is None or not (lowered.inputs or lowered.outputs):
            named = f"ONNX defines {node.op_type} for float32 only" if floats else "it names float32 as its own type"
            return "schema", named if lowered else _MIXED.format(self._low)
        if why := refused(self._low, node):
            return "compiler", why
        if node.op_type == "DequantizeLinear" and self._bad_scale(node):
            return "scale", f"{self._low} cannot hold its scale"
        wide = [t for t in floats if self._kind.get(t) == WIDE]
        free = dequantizes_constant_scale(self._model, node)  # it is written in the types of its readers
        if wide and not free:
            return "wide", f"it reads {wide[0]!r}: {self._why[wide[0]]}"
        if self._shifts(node):
            return "shift", f"codes lie around its offset, where {self._low} resolves a small part of a step too little"
        if node.op_type == "QuantizeLinear" and self._bad_scale(node):
            return "scale", f"{self._low} cannot hold its scale"
        if node.op_type == "DequantizeLinear" and not free and (far := self._too_far(node)):
            return "range", far
        for tensor in made:
            if measured := self._range(tensor):
                return "range", f"it makes {tensor!r}: {measured}"
        if node.op_type not in SUMMED and any(self._kind.get(t) == STATISTIC for t in floats):
            return "statistic", "it applies a mean or deviation, a step of a normalization"
        if node.op_type in SUMS:
            unsafe = self._sums.unsafe(node, LIMIT if self._low == "float16" else math.inf)
            if unsafe is not None:
                return "sum", unsafe or f"it sums many values, and their sum may exceed {self._info.max:.0f}"
        if node.op_type == "LpNormalization":
            return "power", f"it divides by a sum of powers, of which small ones vanish in {self._low}"
        tame = node.op_type != "Exp" and (node.op_type != "Pow" or self._tame_power(node)) and self._degree(node) <= 1
        if not tame and any(self._range(t) is None for t in made):
            return "power", f"powers and exponentials of ordinary values exceed {self._info.max:.0f}"
        if not tame and self._sums.read(node):
            return "power", f"a sum of powers or exponentials is to keep those that vanish in {self._low}"
        return self._constant_rule(node)

    def _constant_rule(self, node: NodeProto) -> tuple[str, str] | None:
        """Keep a node whose constant operand overflows in the low type, or vanishes where it matters."""
        least = float(self._info.smallest_normal)
        epsilon = attribute_value(node, "epsilon", 0.0) if node.op_type in NORMS else 0.0
        if 0 < epsilon < self._info.smallest_subnormal:
            return "constant", f"its epsilon of {epsilon:.3g} vanishes in {self._low}"
        value = filling(node) if node.op_type == "ConstantOfShape" and not masks(self._model, node) else None
        fill = 0.0 if value is None else abs(float(value[0]))
        if fill > float(self._info.max) or 0 < fill < least:
            return "constant", f"{self._low} cannot hold its value of {fill:.3g}"
        for index, tensor in enumerate(node.input):
            if not self._is_float(tensor) or not self._constant(tensor) or node.op_type == "QuantizeLinear":
                continue
            largest = self._largest(tensor)
            if largest > float(self._info.max) and saturated(self._model, tensor, self._low) is None:
                return "constant", f"its constant {tensor!r} of {largest:.3g} exceeds {self._info.max}"
            if 0 < largest < least and not biases(self._model, node, index):
                self._lost.add(node.name)
                return "constant", f"its constant {tensor!r} of {largest:.3g} vanishes in {self._low}"
            if node.op_type in _BLENDS and ((node.op_type == "Div" and index == 1) or divides(self._model, node)):
                values = self._model.array(tensor)
                small = np.abs(values[(values != 0) & (np.abs(values) < least)])
                if small.size and not fits(small, self._low):
                    self._lost.add(node.name)
                    return "constant", f"{small.min():.3g} in its constant {tensor!r} vanishes in {self._low}"
        return None

    def _hides(self, node: NodeProto) -> bool:
        """Whether the largest magnitudes that a node makes are those of a mask that is cut: see `saturated`."""
        if node.op_type == "ConstantOfShape" and (value := filling(node)) is not None:
            return abs(float(value[0])) > LIMIT and masks(self._model, node)
        if node.op_type not in ("Where", *ARITHMETIC, *MOVES) or node.op_type in ("Clip", "Div"):
            return False
        read = [t for t in node.input if t in self._masked or (self._is_float(t) and self._cut(t))]
        return bool(read) and masks(self._model, node)

    def _cut(self, tensor: str) -> bool:
        """Whether a tensor is a constant mask whose values are cut."""
        large = self._constant(tensor) and self._largest(tensor) > LIMIT
        return large and saturated(self._model, tensor, self._low) == LIMIT

    def _largest(self, constant: str) -> float:
        """The largest finite magnitude of a constant."""
        if constant not in self._constants:
            values = self._model.array(constant)
            found = max(float(values.max()), -float(values.min())) if values.size else 0.0  # without a copy
            if not math.isfinite(found):
                found = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
            self._constants[constant] = found
        return self._constants[constant]

    def _range(self, tensor: str) -> str | None:
        """Why a measured tensor is wide, '' if it is ordinary; None where nothing was measured."""
        if tensor in self._masked:
            return ""
        if tensor not in self._ranges:
            return None
        amax = self._ranges[tensor]
        if self._low == "float16" and amax > LIMIT:
            return f"it reached {amax:.4g} on the samples, float16 ends at 65504"
        if self._low == "float16" and 0 < amax < TINY and not (amax > self._info.tiny and mixes(self._model, tensor)):
            return f"it stayed below {amax:.2g} on the samples, where float16 has few bits"
        return ""

    def _classify(self, node: NodeProto, tensor: str, floats: list[str]) -> None:
        measured = self._range(tensor)
        data = [t for t in floats if not self._constant(t)]
        kinds = {self._kind.get(t, ORDINARY) for t in data}
        skip = self.kept.get(node.name)
        self._kind[tensor] = ORDINARY
        self._track_power(node, tensor, data)
        if node.op_type == "DequantizeLinear" and (far := self._too_far(node)):
            self._mark(tensor, far, measured=True)
        elif dequantizes_constant_scale(self._model, node):
            if skip is not None:
                self._mark(tensor, skip.reason)
        elif measured:
            self._mark(tensor, measured, measured=self._ranges[tensor] > LIMIT)
        elif skip is None or skip.rule in ("body", "unknown operator", "unknown type"):
            if node.op_type in MOVES and kinds == {STATISTIC}:
                self._kind[tensor] = STATISTIC
        elif skip.rule == "positions":
            narrow = self._ranges.get(tensor, math.inf) <= 2.0 ** (self._info.nmant + 1)
            if not narrow and node.op_type not in ("Sin", "Cos", "Tan", "GridSample"):
                self._mark(tensor, "positions need whole numbers")
        elif node.op_type in ("Sqrt", "Reciprocal") or (node.op_type == "ReduceMean" and WIDE not in kinds):
            self._kind[tensor] = STATISTIC
        elif node.op_type == "Div" and self._kind.get(node.input[1]) in (WIDE, STATISTIC):
            self._kind[tensor] = STATISTIC if self._constant(node.input[0]) else ORDINARY
        elif node.op_type in _BOUNDED | NORMS:
            pass
        elif self._averages(node):
            self._kind[tensor] = STATISTIC
        elif node.name in self._lost:
            self._mark(tensor, skip.reason)
            self._fragile.add(tensor)
        elif (held := self._fragile.intersection(data)) and node.op_type in MOVES | ARITHMETIC:
            self._mark(tensor, self._why[min(held)])
            self._fragile.add(tensor)
        elif measured == "":
            if kinds == {STATISTIC} and node.op_type not in SUMMED:
                self._kind[tensor] = STATISTIC
        elif node.op_type in SUMS or skip.rule in ("power", "constant"):
            self._mark(tensor, skip.reason)
        elif node.op_type in SUMMED or WIDE not in kinds:
            if wide := [t for t in data if t in self._measured]:
                self._mark(tensor, self._why[wide[0]], measured=True)
            elif kinds == {STATISTIC} and node.op_type not in SUMMED:
                self._kind[tensor] = STATISTIC
        else:
            source = next(t for t in data if self._kind.get(t) == WIDE)
            self._mark(tensor, self._why[source], measured=source in self._measured)

    def _mark(self, tensor: str, why: str, *, measured: bool = False) -> None:
        """Call a tensor wide."""
        self._kind[tensor], self._why[tensor] = WIDE, why
        if measured:
            self._measured.add(tensor)

    def _too_far(self, node: NodeProto) -> str:
        """Why the largest codes of a DequantizeLinear are wide once dequantized, '' if not or if no scale is known."""
        scale = node.input[1]
        largest = self._largest(scale) if self._constant(scale) else self._reach.get(scale, 0.0)
        reach = self._reach[node.output[0]] = largest_code(self._model, node.input[0]) * largest
        far = self._low == "float16" and reach > LIMIT
        return f"its codes reach {reach:.4g}, float16 ends at 65504" if far else ""

    def _bad_scale(self, node: NodeProto) -> bool:
        """Whether an activation's constant scale is lost in the low type; weights are rescaled instead."""
        scale = node.input[1]
        if not self._constant(scale) or (node.op_type == "DequantizeLinear" and self._constant(node.input[0])):
            return False
        return not fits(self._model.array(scale), self._low)

    def _tame_power(self, node: NodeProto) -> bool:
        """Whether Pow has a constant exponent between -1 and 1, like a square root."""
        return self._constant(node.input[1]) and bool((np.abs(self._model.array(node.input[1])) <= 1).all())

    def _degree(self, node: NodeProto) -> int:
        """Above 1 where Mul multiplies multiples of powers of one tensor: x * x, x * (0.04 * x)."""
        if node.op_type != "Mul" or any(self._constant(t) for t in node.input):
            return 1
        (left, a), (right, b) = (self._power.get(t, (t, 1)) for t in node.input)
        return a + b if left == right else 1

    def _shifts(self, node: NodeProto) -> bool:
        """Whether a node is the Sub of a constant before Q, or that Q: the shift of `insert`."""
        sub = self._model.producer(node.input[0]) if node.op_type == "QuantizeLinear" else node
        if sub is None or sub.op_type != "Sub" or not self._constant(sub.input[1]):
            return False
        return all(u.node.op_type == "QuantizeLinear" and u.index == 0 for u in self._model.consumers(sub.output[0]))

    def _averages(self, node: NodeProto) -> bool:
        """Whether a node makes the mean of ordinary values from their ReduceSum: times 1 / n, or divided by n."""
        if node.op_type not in ("Mul", "Div") or len(node.input) != 2:
            return False
        values = [t for t in node.input if not self._constant(t)]
        producer = self._model.producer(values[0]) if len(values) == 1 else None
        factors = [self._model.array(t) for t in node.input if self._constant(t)]
        if producer is None or producer.op_type != "ReduceSum" or len(factors) != 1 or not factors[0].all():
            return False
        if self._kind.get(producer.input[0]) == WIDE:
            return False
        count = elements(self._model.info(producer.input[0])) / elements(self._model.info(producer.output[0]))
        factor = factors[0] if node.op_type == "Mul" else 1 / factors[0]
        return bool((np.abs(factor) * count <= 1.01).all())

    def _track_power(self, node: NodeProto, tensor: str, data: list[str]) -> None:
        if node.op_type in ("Mul", "Div", "Neg", "Abs", "Reshape", "Transpose", "Identity") and len(set(data)) == 1:
            root, degree = self._power.get(data[0], (data[0], 1))
            self._power[tensor] = (root, degree * (2 if len(data) == 2 else 1))
        elif self._degree(node) > 1:
            self._power[tensor] = (self._power.get(node.input[0], (node.input[0], 1))[0], self._degree(node))

    def _surrounded(self, node: NodeProto, light: Set[str]) -> bool:
        """Whether no float neighbour of a light node computes in the low type, except other light nodes."""
        wide, model = self.kept.keys() | light, self._model
        for producer in filter(None, map(model.producer, filter(self._is_float, node.input))):
            free = producer.op_type == "Cast" or dequantizes_constant_scale(model, producer)  # in either type
            if not free and producer.name not in wide:
                return False
        uses = (use.node for tensor in filter(self._is_float, node.output) for use in model.consumers(tensor))
        return all(reader.name in wide or reader.op_type in ("Shape", "Cast") for reader in uses)
