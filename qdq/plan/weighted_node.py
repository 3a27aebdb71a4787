"""`WeightedNode`: one convolution, Gemm or MatMul whose weight a plan quantizes, and what every later stage asks of it.

Model + Plan -> `weighted_nodes` -> measure, solve, assemble: none of them looks up the axes or operands of such a node
in the graph again. It must not read the values of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnx import NodeProto

from engines.core.operators import CONVOLUTIONS
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute, attribute_value, input_axis, ints, weight_axis
from qdq.plan.plan import Plan, Point
from qdq.plan.spec import Spec

Weight = tuple[str, int | None]  # tensor and axis of its scales: one tensor may be read along either axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Where the kernel of a convolution lies on its data, with ONNX's meaning; one number per spatial axis, two of
    `pads`."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedNode:
    """One node that multiplies data by a constant weight that the plan quantizes.

    Attributes:
        name: of the node.
        op_type: one of `WEIGHTED`.
        data: the tensor of operand 0, whose channels the weight reads.
        weight: the constant of operand 1.
        bias: the tensor of operand 2, "" where there is none.
        output: the tensor that the node makes.
        shape: of the weight, of rank 2 at least.
        output_axis: the axis of the weight that runs over output channels.
        input_axis: the axis of the weight that runs over the input channels of one group.
        groups: of a convolution, else 1.
        data_transposed: a Gemm's transA: its sum runs over the first axis of the data.
        alpha: a Gemm's factor of the product, else 1.
        beta: a Gemm's factor of the bias, else 1.
        window: of a Conv, else None.
        spec: how the weight is quantized.
        data_spec: how the data are quantized; None leaves them in float.
        trained: the codes of the weight are those that the model came with.
    """

    name: str
    op_type: str
    data: str
    weight: str
    bias: str
    output: str
    shape: tuple[int, ...]
    output_axis: int
    input_axis: int
    groups: int
    data_transposed: bool
    alpha: float
    beta: float
    window: Window | None
    spec: Spec
    data_spec: Spec | None
    trained: bool = False

    @property
    def key(self) -> Weight:
        """What the codes of the weight are known by."""
        return self.weight, self.spec.axis

    @property
    def channel_axis(self) -> int:
        """The axis of the data, and of the output, that runs over channels."""
        return 1 if self.op_type in CONVOLUTIONS else -1

    @property
    def channels(self) -> int:
        """How many channels of the data the weight reads."""
        return self.groups * self.shape[self.input_axis]

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether data of a shape have these channels: what branches of an If read may have those of another one."""
        return shape[-2 if self.data_transposed else self.channel_axis] == self.channels

    @property
    def spatial(self) -> int:
        """How many axes data and output have behind their channels."""
        return len(self.shape) - 2 if self.op_type in CONVOLUTIONS else 0

    @property
    def columns(self) -> int:
        """Weights per output channel: the length of one row of inputs."""
        return math.prod(self.shape[1:]) if self.window else self.shape[self.input_axis]


def weighted_nodes(model: Model, plan: Plan) -> dict[str, WeightedNode]:
    """Every node whose weight is quantized, by name, in the order of the plan's points.

    Args:
        model: the prepared float model.
        plan: its points; it fits the model (`Plan.check`).

    Raises:
        InputError: an edited plan has a weight that no kernel takes so.
    """
    data = {name: point.spec for point in plan.activations for name, index in point.uses if index == 0}
    found = {}
    for point in plan.weights:
        for name, index in point.uses:
            node = model.node(name)
            if index != 1 or node.op_type not in WEIGHTED:
                raise InputError(
                    f"The plan quantizes {point.tensor!r} as the weight of operand {index} of {name!r} "
                    f"({node.op_type}): weights are operand 1 of {', '.join(WEIGHTED)}. Remove the consumer."
                )
            found[name] = _weighted(node, tuple(model.initializers[point.tensor].dims), point, data.get(name))
            _check(found[name])
    return found


def by_weight(nodes: Iterable[WeightedNode]) -> dict[Weight, list[WeightedNode]]:
    """Each quantized weight and the nodes that read it, in the order of the nodes."""
    found: dict[Weight, list[WeightedNode]] = {}
    for node in nodes:
        found.setdefault(node.key, []).append(node)
    return found


def by_data(nodes: Iterable[WeightedNode]) -> dict[str, list[WeightedNode]]:
    """Each data tensor and the nodes that multiply it, in the order of the nodes."""
    found: dict[str, list[WeightedNode]] = {}
    for node in nodes:
        found.setdefault(node.data, []).append(node)
    return found


def _weighted(node: NodeProto, shape: tuple[int, ...], point: Point, data: Spec | None) -> WeightedNode:
    rank = len(shape)
    return WeightedNode(
        name=node.name,
        op_type=node.op_type,
        data=node.input[0],
        weight=node.input[1],
        bias=node.input[2] if len(node.input) > 2 else "",
        output=node.output[0],
        shape=shape,
        output_axis=weight_axis(node, rank),
        input_axis=input_axis(node, rank),
        groups=attribute(node, "group", 1),
        data_transposed=bool(attribute(node, "transA", 0)),
        alpha=attribute_value(node, "alpha", 1.0),
        beta=attribute_value(node, "beta", 1.0),
        window=_window(node, rank - 2) if node.op_type == "Conv" else None,
        spec=point.spec,
        data_spec=data,
        trained=point.trained,
    )


def _window(node: NodeProto, axes: int) -> Window:
    return Window(
        strides=tuple(ints(node, "strides", [1] * axes)),
        dilations=tuple(ints(node, "dilations", [1] * axes)),
        pads=tuple(ints(node, "pads", [0] * 2 * axes)),
        auto_pad=attribute_value(node, "auto_pad", b"NOTSET").decode(),
    )


def _check(node: WeightedNode) -> None:
    """Refuse what an edited plan may say of a weight and no kernel takes."""
    spec = node.spec
    axis, what = (node.input_axis, "reduction") if spec.block else (node.output_axis, "output channels")
    whole = spec.axis is None and spec.block is None  # one scale is right for any product
    if spec.axis != axis and not whole:
        raise InputError(
            f"The plan quantizes {node.weight!r} along axis {spec.axis}, but the {what} of "
            f"{node.name!r} lie on axis {axis}. Set the axis to {axis}."
        )
    if (spec.block or spec.weight_only) and (node.op_type in CONVOLUTIONS or spec.shift):
        raise InputError(
            f"The plan gives the weight {node.weight!r} of {node.name!r} ({node.op_type}) blocks or no quantized "
            "data: TensorRT has kernels for that in Gemm and MatMul only. Set an axis of output channels."
        )
    if spec.compute_format and len(node.shape) != 2:
        raise InputError(
            f"The plan gives the batched weight {node.weight!r} of {node.name!r} two levels: they need a matrix."
        )
