"""What really ran: for every weighted node, the type it asks for and the type its kernel consumes.

Q/DQ model -> requested type and multiply-adds per node; LayerTable -> the kernels of each node; both -> `Audit`.
Must not trust that a model builds: a badly quantized layer builds too, and runs in float. Must not guess: what neither
the model nor the kernels say is 'unknown', with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import onnx
from onnx import TensorProto

from engines.backends.compiler import ShapeRange
from engines.backends.layers import DTYPES, LayerTable
from engines.core.documents import Document, Part, replace
from engines.core.errors import EngineError
from engines.core.load import load_graph
from engines.core.macs import macs_in_all
from engines.core.nodes import label
from engines.core.operators import COMPOUNDS, RECURRENCES
from engines.core.quantizers import LOW, Operand, Product, QuantizedGraph, code_bits, code_name, read_graph
from engines.verify.kernels import compute_kernel, consumed_dtype, multiplying

__all__ = ["Audit", "NodeAudit", "audit", "compute_kernel", "consumed_dtype", "requested"]


UNCOUNTED = "how often its body runs depends on values, so its multiply-adds are counted for one turn"
UNSIZED = "a size of what it reads depends on data, or on an input without a shape: see --shape"


class NodeAudit(Part, frozen=True, kw_only=True):
    """One node that multiplies and adds.

    Attributes:
        node: its name.
        op_type: its operator.
        macs: multiply-adds of one inference; None where a size that they depend on is not known.
        turns: how often the node runs in one inference, more than once in a body of Loop or Scan; None where that
            depends on values, and `macs` is of one turn.
        requested: '' (float), a low-precision type, or 'weight-only <type>' / 'activation-only <type>'.
        consumed: the type both operands have where the kernel multiplies them, or 'unknown'.
        kernel: the name of the kernel that multiplies, '' where none is known.
        cause: why the node was missed, is suspect or is unknown; else ''.
    """

    node: str
    op_type: str
    macs: int | None
    requested: str
    consumed: str
    kernel: str
    cause: str
    turns: int | None = 1

    @property
    def missed(self) -> bool:
        """Asked for a low-precision product and ran in another type (weight-only asks for none)."""
        return bool(self.requested) and not self.requested.startswith("weight-only") and self.consumed != self.requested

    @property
    def unknown(self) -> bool:
        """Whether its type or its multiply-adds are not known."""
        return self.consumed == "unknown" or not self.counted

    @property
    def counted(self) -> bool:
        """Whether its multiply-adds of a whole inference are known."""
        return self.macs is not None and self.turns is not None


class TableAudit(Part, frozen=True, kw_only=True):
    """One Gather that reads rows of a constant behind a DequantizeLinear.

    Attributes:
        node: its name.
        requested: the type of the codes.
        stored: the type of the constant that the kernel of the Gather reads, or 'unknown'.
        elements: of the table.
        nbytes: of the constant, without scales; None where it is not known.
    """

    node: str
    requested: str
    stored: str
    elements: int
    nbytes: int | None

    @property
    def missed(self) -> bool:
        """Whether the engine is known to hold it in another type."""
        return self.stored not in (self.requested, "unknown")


class Audit(Document, frozen=True, kw_only=True):
    """The nodes of one model and the totals of one engine. `bytes_moved` is None with dynamic shapes."""

    FORMAT: ClassVar[str] = "qdq.audit/3"
    MAKE: ClassVar[str] = "qdq audit --json"
    COMPUTED: ClassVar[Mapping[str, str]] = {
        "macs": "macs",
        "int8_share": "int8_share",
        "low_precision_share": "low_precision_share",
        "missed": "missed_names",
        "suspect": "suspect_names",
        "unknown": "unknown_names",
    }

    nodes: tuple[NodeAudit, ...]
    kernels: int
    bytes_moved: int | None
    weight_bytes: int
    activation_bytes: int
    engine_bytes: int
    targets: tuple[str, ...]
    backend: str
    version: str
    tables: tuple[TableAudit, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds of one inference, of the nodes whose are known; of one turn where their number is not."""
        return sum(n.macs or 0 for n in self.nodes)

    def share(self, *dtypes: str) -> float:
        """Fraction of the known multiply-adds whose kernel consumes one of these types; 0 for a model without any."""
        return sum(n.macs or 0 for n in self.nodes if n.consumed in dtypes) / max(self.macs, 1)

    @property
    def int8_share(self) -> float:
        """Fraction of all multiply-adds that run in INT8."""
        return self.share("int8")

    @property
    def low_precision_share(self) -> float:
        """Fraction of all multiply-adds that run in a type of 8 bits or fewer."""
        return self.share(*LOW)

    @property
    def missed(self) -> tuple[NodeAudit, ...]:
        """Nodes that asked for low precision and did not get it, each with a likely cause."""
        return tuple(n for n in self.nodes if n.missed)

    @property
    def suspect(self) -> tuple[NodeAudit, ...]:
        """Nodes that run as asked, in a form the compiler is known to get wrong."""
        return tuple(n for n in self.nodes if n.cause and not n.missed and not n.unknown)

    @property
    def unknown(self) -> tuple[NodeAudit, ...]:
        """Nodes whose type or multiply-adds are not known, each with the reason; none of those that were missed."""
        return tuple(n for n in self.nodes if n.unknown and not n.missed)

    @property
    def missed_names(self) -> tuple[str, ...]:
        """Names of the missed nodes."""
        return tuple(n.node for n in self.missed)

    @property
    def suspect_names(self) -> tuple[str, ...]:
        """Names of the suspect nodes."""
        return tuple(n.node for n in self.suspect)

    @property
    def unknown_names(self) -> tuple[str, ...]:
        """Names of the unknown nodes."""
        return tuple(n.node for n in self.unknown)


def audit(
    model: Path | str | onnx.ModelProto, table: LayerTable, *, shapes: Mapping[str, ShapeRange] | None = None
) -> Audit:
    """Compares what the Q/DQ nodes of a model ask for with what its engine does.

    Args:
        model: the model the engine was built from; external data is not needed.
        table: the engine's layers.
        shapes: the range of each dynamic input; multiply-adds are counted at `opt`. Those that depend on an input
            which is not here, or on values of an input, are unknown.

    Returns:
        One row per Conv, ConvTranspose, Gemm, MatMul and two-operand Einsum that depends on an input, then one per
        Attention, GRU, LSTM and RNN; and one per Gather of a table of codes.

    Raises:
        BuildError: the file is not ONNX.
        EngineError: a shape has not as many sizes as the input that it is of.
    """
    rows, proto = [], load_graph(model)
    _require_ranks(proto, shapes or {})
    read = read_graph(proto, {k: v.opt for k, v in (shapes or {}).items()})
    for graph, product in read.all_products():
        asked = requested(product.operands)
        if asked.startswith("activation-only") and _shared(graph, product):
            asked = ""  # the tensor is quantized for another consumer: nothing was asked here
        row = _row(graph, product.node, table, {o.elem for o in product.operands}, asked)
        rows.append(replace(row, cause=_cause(row, product, table)))
    for graph in read.all_graphs():
        for node in (n for n in graph.nodes if n.op_type in COMPOUNDS and not graph.is_constant(n.output[0])):
            row = _row(graph, node, table, {graph.elem(name) for name in node.input[:2]})
            if node.op_type in RECURRENCES:  # most of its kernels have no name, and those that do need not multiply
                row = replace(row, consumed="unknown", kernel="", cause="the kernels of a recurrence do not name it")
            rows.append(row if row.cause else replace(row, cause=_why_unknown(row, table)))
    shared = [name for name in Audit.__struct_fields__ if name not in ("nodes", "tables")]
    held = {name: getattr(table, name) for name in shared}
    return Audit(nodes=tuple(rows), tables=tuple(_tables(read, table)), **held)


def _tables(read: QuantizedGraph, table: LayerTable) -> Iterator[TableAudit]:
    """What became of the constants that Gathers read rows of, codes behind a DequantizeLinear."""
    for graph in read.all_graphs():
        for node in graph.nodes:
            dq = graph.by_output.get(node.input[0]) if node.op_type == "Gather" else None
            if dq is None or dq.is_q or not dq.constant or graph.is_constant(node.output[0]):
                continue
            size = math.prod(n or 0 for n in dq.shape or ())
            named = [la for la in table.layers if label(node) in la.onnx_nodes] or table.layers
            sized = [t for la in named for t in la.constants if math.prod(t.shape) == size and size]
            types = {t.dtype for t in sized}
            stored = types.pop() if len(types) == 1 else "unknown"
            nbytes = sized[0].nbytes if stored != "unknown" else None
            asked = code_name(dq.dtype)
            yield TableAudit(node=label(node), requested=asked, stored=stored, elements=size, nbytes=nbytes)


def _require_ranks(proto: onnx.ModelProto, shapes: Mapping[str, ShapeRange]) -> None:
    """Refuses the shape of an input that has another number of sizes, as of a damaged manifest."""
    for info in proto.graph.input:
        held = info.type.tensor_type
        if info.name in shapes and held.HasField("shape") and len(shapes[info.name].opt) != len(held.shape.dim):
            raise EngineError(
                f"Input {info.name!r} has {len(held.shape.dim)} sizes in the model, but its shape is said to be "
                f"{shapes[info.name].opt}. Give the shape that the engine was compiled for, or build it again."
            )


def _row(graph: QuantizedGraph, node: onnx.NodeProto, table: LayerTable, elems: set[int], asked: str = "") -> NodeAudit:
    """What is counted and what ran for one node, whose factors have these ONNX types; without a cause."""
    kernels = multiplying(table.layers, label(node))
    stated = DTYPES.get(TensorProto.DataType.Name(elems.pop()).lower(), "") if len(elems) == 1 else ""
    types = {consumed_dtype(kernel, stated) for kernel in kernels}
    return NodeAudit(
        node=label(node),
        op_type=node.op_type,
        macs=macs_in_all(graph, node),
        requested=asked,
        consumed=types.pop() if len(types) == 1 else "unknown",
        kernel=kernels[0].name if kernels else "",
        cause="",
        turns=graph.turns,
    )


def requested(operands: Sequence[Operand]) -> str:
    """The type that the Q/DQ nodes before the two factors of a product ask for.

    '' is float; of two types it is the wider; 'weight-only <type>' or 'activation-only <type>' where one is float.
    """
    found = [o.dq for o in operands if o.dq is not None]
    if found and len(found) == len(operands):
        return code_name(max((q.dtype for q in found), key=code_bits))
    return f"{'weight' if found[0].stored else 'activation'}-only {code_name(found[0].dtype)}" if found else ""


def _shared(graph: QuantizedGraph, product: Product) -> bool:
    """Whether the dequantized operand also feeds something else."""
    return any(graph.uses[o.dq.node.output[0]] > 1 for o in product.operands if o.dq is not None)


def _cause(row: NodeAudit, product: Product, table: LayerTable) -> str:
    """Why a node is unknown or was missed, the most specific reason first; or why its result is suspect; or ''."""
    node, quantized = product.node, [o.dq for o in product.operands if o.dq is not None]
    blocked = any(q.stored and q.blocked and q.count > 1 for q in quantized)
    if row.consumed == "unknown" or not (row.counted or row.missed):
        return _why_unknown(row, table)
    if not row.missed:
        if row.consumed in LOW and blocked and row.consumed != "fp4":
            return "block scales on a low-precision product: the sum over blocks cannot be rescaled afterwards"
        if row.consumed in LOW and any(q.dtype == TensorProto.UINT8 for q in quantized):
            return "unsigned codes are read as int8, so the range is halved: use INT8 codes with zero point 0"
        return ""
    if node.op_type == "ConvTranspose":
        return "a transposed convolution never runs in low precision here: write it as a convolution, or leave it float"
    if row.requested.startswith("activation-only"):
        return "only one operand is quantized: the other is float"
    if any(q.dynamic for q in quantized):
        return "a scale is computed at run time: scales must be initializers"
    if any(q.vector and not q.stored for q in quantized):
        return "the activation has per-channel scales: activations need one scale"
    if blocked:
        return f"block scales on a {node.op_type}: only weight-only MatMul and Gemm can use them"
    for q, needed in ((o.dq, o.output_axis) for o in product.operands):
        if q is not None and q.stored and q.vector and needed is not None and q.axis != needed:
            along = f"the weight is quantized along axis {q.axis}"
            return f"{along}; {node.op_type} needs axis {needed}, its output channels"
    names = [code_name(q.dtype) for q in quantized]
    if len(set(names)) > 1:
        return "the operands have different types: " + " and ".join(names)
    if "sm75" in table.targets and node.op_type == "Conv":
        return "sm75 has no low-precision convolution, and one plan serves all targets: build for sm75 apart"
    return "unknown: see the kernel in the layer table"


def _why_unknown(row: NodeAudit, table: LayerTable) -> str:
    """Why no kernel, no type or no count is known of a node; '' where all are."""
    if row.consumed != "unknown":
        return UNSIZED if row.macs is None else UNCOUNTED if row.turns is None else ""
    named = [layer.name for layer in table.layers if row.node in layer.onnx_nodes]
    if row.kernel:
        return f"its kernel {row.kernel} reads several types and does not say which it multiplies"
    if named:
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        return f"{named[0]}{more} name this node, and none of them says that it multiplies"
    lines = f", or is in one of {len(table.unread)} lines of the dump that cannot be read" if table.unread else ""
    return f"no kernel names this node: it was folded away or fused under another name{lines}"
