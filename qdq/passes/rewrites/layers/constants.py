"""Constants that `prepare` left to be computed because they are large: computed.

    Where(Equal(Sub(a, b), 0), 0, -100), a and b constant  ->  one initializer       the masks of shifted windows

The compiler computes part of such a chain itself and leaves the rest to a kernel of every inference: for SwinUNETR's
masks of 343 x 343 x 343 the engine holds 120 MB and still writes 80 (TensorRT-RTX 1.7.1, SM89); with the result in the
model it holds 80 and writes nothing. The ONNX file grows by the result. It must not make a tensor above `LIMIT`.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto

from qdq.model.model import Model
from qdq.passes.draft import Draft
from qdq.passes.fold import fold_constants, why_kept
from qdq.passes.rewrites.edit import Rewritten

STAGE, RANK = "float", 25  # before window_mask, which looks for masks that are constants
NOT_FOR = {"tensorrt": "TensorRT's builder is not known to leave such a chain to be computed"}

LIMIT = 1 << 28  # bytes of one tensor


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Compute every node whose inputs are constant, up to `LIMIT`."""
    draft = Draft(model)
    ready = {
        node.name: node
        for node in model.graph.node
        if node.input and all(map(model.is_constant, filter(None, node.input))) and (only is None or node.name in only)
    }
    while draft.infer() and fold_constants(draft, LIMIT, only):
        pass
    left = {node.name for node in draft.graph.node}
    fired = tuple(node.name for node in model.graph.node if node.name not in left)
    unfit = {name: _reason(node) for name, node in ready.items() if name in left}
    return Rewritten(model=draft.finish() if fired else model, fired=fired, unfit=unfit)


def _reason(node: NodeProto) -> str:
    """Why a node whose inputs are constant was not computed."""
    if reason := why_kept(node.op_type, node.domain):
        return f"{node.op_type} is not computed here: {reason}"
    return f"its result is an output, larger than {LIMIT >> 20} MiB, of unknown size, or left to the runtime"
