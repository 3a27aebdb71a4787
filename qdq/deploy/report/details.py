"""What a report says node by node, tensor by tensor and kernel by kernel: figures for tables and charts.

plan, solution, `tensor_errors`, prices -> `Details`, part of report.json. Must not measure, and holds no sample data.
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.backends.compiler import ShapeRange
from engines.core.documents import Measured, Part
from engines.core.macs import macs_in_all
from engines.core.quantizers import read_graph
from engines.verify.audit import requested
from qdq.build.cost import Price
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams
from qdq.deploy.costs.errors import TensorErrors
from qdq.deploy.steps.shipped import Made
from qdq.model.model import Model
from qdq.model.nodes import controlled_nodes
from qdq.plan.plan import Point
from qdq.tune.tuned import predicted_on, said_error


class NodeRow(Part, frozen=True, kw_only=True):
    """One node of the network that the plan is of.

    Attributes:
        node: its name.
        op_type: its operator.
        macs: multiply-adds of one inference at the usual shapes; None where it has none, or they are not known.
        asked: what its Q/DQ nodes ask for, as `engines.verify.audit.requested`; '' is float.
    """

    node: str
    op_type: str
    macs: int | None = None
    asked: str = ""


class TensorRow(Part, frozen=True, kw_only=True):
    """One quantized tensor.

    Attributes:
        tensor: its name in the plan.
        role: 'activation' or 'weight'.
        format: of its codes.
        nodes: that read it quantized.
        sqnr_db: signal over its own rounding error; None where it was not measured.
        low, high: the values that the first and the last code stand for; None where scales differ within the tensor.
        scale: of one step; None likewise.
        zero_point: the code of zero.
    """

    tensor: str
    role: str
    format: str
    nodes: tuple[str, ...]
    sqnr_db: Measured | None = None
    low: float | None = None
    high: float | None = None
    scale: float | None = None
    zero_point: int = 0


class KernelRow(Part, frozen=True, kw_only=True):
    """One kernel, in the order of the engine, as predicted.

    Attributes:
        kind: the compiler's own word.
        dtype: that it multiplies in; '' where it multiplies nothing, or that is not known.
        bound: by what its time is bound: 'bandwidth', 'compute' or 'start'.
        us: predicted microseconds, of several GPUs the mean.
        macs: multiply-adds.
        bytes: read and written.
        nodes: ONNX nodes in it.
    """

    kind: str
    dtype: str
    bound: str
    us: float
    macs: int
    bytes: int
    nodes: tuple[str, ...]


class Details(Part, frozen=True, kw_only=True):
    """The rows of a report.

    Attributes:
        nodes: of the network with the plan's rewrites, in order; those in bodies of If, Loop and Scan last.
        tensors: the plan's.
        kernels: none where no time was predicted.
        gpus: that times are predicted for.
        each_us: predicted microseconds on each of them.
        time_error: relative error of these times that two of three keep to; None where it is not known.
        measured_on: evaluation samples that tensors' errors were measured on.
        not_measured: why not; '' where they were.
    """

    nodes: tuple[NodeRow, ...]
    tensors: tuple[TensorRow, ...]
    kernels: tuple[KernelRow, ...] = ()
    gpus: tuple[str, ...] = ()
    each_us: tuple[float, ...] = ()
    time_error: float | None = None
    measured_on: int = 0
    not_measured: str = ""

    @property
    def times(self) -> list[tuple[str, str]]:
        """What is predicted, and the times, for a person: the mean, and of several GPUs those on each."""
        if not (each := self.each_us):
            return []
        mean = f"{sum(each) / len(each):.1f} us; {said_error(self.time_error)}"
        more = zip(self.gpus, each, strict=True) if len(each) > 1 else ()
        return [(predicted_on(self.gpus), mean), *(("", f"{us:.1f} us on {gpu}") for gpu, us in more)]


def details_of(
    made: Made,
    finished: Model,
    errors: TensorErrors,
    *,
    price: Price | None,
    gpus: tuple[str, ...],
    shapes: Mapping[str, ShapeRange],
) -> Details:
    """The rows of one deployment.

    Args:
        finished: the model that is compiled.
        price: of it; None where none was predicted.
        gpus: that it is predicted for.
        shapes: multiply-adds are counted at the usual ones.
    """
    read = read_graph(finished.proto, {name: s.opt for name, s in shapes.items()})
    products = {p.node.name: (macs_in_all(graph, p.node), requested(p.operands)) for graph, p in read.all_products()}
    graph = made.prepared.graph
    nodes = []
    for node in (*graph.node, *controlled_nodes(graph)):
        macs, asked = products.get(node.name, (None, ""))
        nodes.append(NodeRow(node=node.name, op_type=node.op_type, macs=macs, asked=asked))
    return Details(
        nodes=tuple(nodes),
        tensors=tuple(_tensor(point, made, errors) for point in (*made.plan.points, *made.plan.tables)),
        kernels=tuple(
            KernelRow(kind=k.kind, dtype=k.dtype, bound=k.bound, us=k.us, macs=k.macs, bytes=k.bytes, nodes=k.nodes)
            for k in (price.kernels if price else ())
        ),
        gpus=gpus if price and price.kernels else (),
        each_us=price.each if price and price.kernels else (),
        time_error=price.error if price else None,
        measured_on=errors.samples,
        not_measured=errors.why,
    )


def _tensor(point: Point, made: Made, errors: TensorErrors) -> TensorRow:
    role = "activation" if point.role == "activation" else "weight"
    row = TensorRow(
        tensor=point.tensor,
        role=role,
        format=point.spec.format,
        nodes=tuple(dict.fromkeys(name for name, _ in point.uses)),
        sqnr_db=errors.sqnr_db.get((role, point.tensor)),
    )
    params = made.solution.activations.get(point.tensor) if point.role == "activation" else None
    apart = point.spec.residual or point.tensor in (made.solution.tokens | made.solution.beyond)
    if params is None or params.scale.size != 1 or apart or _divided(point, made):
        return row
    return _ranged(row, params)


def _divided(point: Point, made: Made) -> bool:
    """Whether channels are divided before they are quantized, so that one range says nothing of the tensor."""
    return point.tensor in made.solution.divisors or bool(FORMATS[point.spec.format].blocks)


def _ranged(row: TensorRow, params: QParams) -> TensorRow:
    fmt, scale = FORMATS[params.format], float(params.scale)
    return TensorRow(
        tensor=row.tensor,
        role=row.role,
        format=row.format,
        nodes=row.nodes,
        sqnr_db=row.sqnr_db,
        low=(fmt.low - params.zero_point) * scale,
        high=(fmt.high - params.zero_point) * scale,
        scale=scale,
        zero_point=params.zero_point,
    )
