"""Bring a float model into the one form that every later pass expects, with the same outputs.

    functions inlined, node names unique, initializers no longer inputs -> opset 21
    constants, shapes, BatchNormalization and automatic padding folded; identities, unused nodes and tensors dropped
    Einsum in small letters, shapes of all tensors inferred -> Model (IR version 10)

It must not change what the model computes beyond float rounding, touch the bodies of If, Loop and Scan, make dynamic
dimensions static, rename inputs, outputs or named nodes, or need a runtime.
"""

from __future__ import annotations

import math
from string import ascii_letters, ascii_lowercase

from onnx import NodeProto, helper

from qdq.core.errors import ModelError
from qdq.model.graphsurgeon import ModelSource, called
from qdq.model.model import Model, dtype_name
from qdq.model.nodes import attribute_value
from qdq.model.storage import is_quantized, load
from qdq.passes.draft import Draft, assign
from qdq.passes.fold import fold_batch_norms, fold_constants, fold_shapes


def load_float(source: ModelSource) -> Model:
    """A float model, prepared: what every stage starts from. It is a path, a ModelProto or an onnx_graphsurgeon.Graph.

    Raises:
        ModelError: it is no model, or one that is quantized already.
        InputError: see `storage.load`.
    """
    model = load(source)
    if is_quantized(model):
        raise ModelError(
            f"{called(source)} is quantized already: it holds QuantizeLinear, DequantizeLinear or integer operators. "
            "Give the float model that it was made from."
        )
    return prepare(model)


OLDEST_OPSET = 9
NEWEST_OPSET = 25  # 22 to 25 are kept and tested; ONNX Runtime 1.31 itself takes 26


def prepare(model: Model) -> Model:
    """Normalize a float model; the same model always gives the same bytes.

    Opset 9 to 25 becomes 21 (22 to 25 stay). Nodes have unique names, weights are initializers and no inputs, tensors
    have their inferred types and shapes. Inputs and outputs are those of `model`, dynamic sizes included.

    Raises:
        ModelError: the opset is too old or too new, or an operator has no equivalent in opset 21.
    """
    if model.opset and not OLDEST_OPSET <= model.opset <= NEWEST_OPSET:
        raise ModelError(
            f"Cannot use this model: it is of opset {model.opset}, qdq takes opset {OLDEST_OPSET} to {NEWEST_OPSET}. "
            "Export it again with opset 17 to 21."
        )
    draft = Draft(model)
    draft.inline_functions()
    draft.name_nodes()
    draft.lift_constants()
    draft.raise_opset()
    draft.name_nodes()
    draft.lift_constants()  # those that the converter made
    draft.drop_unused()
    while draft.infer() and (fold_shapes(draft) | fold_constants(draft) | drop_identities(draft)):
        draft.drop_unused()
    fold_batch_norms(draft)
    pad_explicitly(draft)
    write_small_letters(draft)
    return draft.finish()


def drop_identities(draft: Draft) -> bool:
    """Remove Identity, Dropout in inference and Cast to the same type, unless it makes an output of the model."""
    fixed = draft.output_names | draft.captured_names()
    rename: dict[str, str] = {}
    keep = []
    for node in draft.graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        if _passes_through(draft, node) and node.output[0] not in fixed:
            rename[node.output[0]] = node.input[0]
        else:
            keep.append(node)
    assign(draft.graph.node, keep)
    return bool(rename)


def pad_explicitly(draft: Draft) -> None:
    """Write the padding of Conv nodes that have `auto_pad`, where it does not depend on a dynamic size."""
    for node in draft.graph.node:
        mode = str(attribute_value(node, "auto_pad", b"NOTSET").decode())
        weight = draft.info(node.input[1]) if node.op_type == "Conv" and not node.domain else None
        if weight is None or weight.shape is None or mode not in ("VALID", "SAME_UPPER", "SAME_LOWER"):
            continue
        info = draft.info(node.input[0])
        kernel = weight.shape[2:]
        sizes = info.shape[2:] if info and info.shape else (None,) * len(kernel)
        strides = attribute_value(node, "strides", [1] * len(kernel))
        dilations = attribute_value(node, "dilations", [1] * len(kernel))
        axes = zip(sizes, kernel, strides, dilations, strict=True)
        found = [0 if mode == "VALID" else _same_padding(*axis) for axis in axes]
        totals = [total for total in found if total is not None]
        if len(totals) < len(found):
            continue
        low, high = [total // 2 for total in totals], [total - total // 2 for total in totals]
        kept = [a for a in node.attribute if a.name not in ("auto_pad", "pads")]
        pads = low + high if mode == "SAME_UPPER" else high + low
        assign(node.attribute, [*kept, helper.make_attribute("pads", pads)])


def write_small_letters(draft: Draft) -> None:
    """Give the axes of Einsum small letters: torchvision's MaxViT has capitals, which TensorRT's parser refuses."""
    for node in draft.graph.node:
        equation = str(attribute_value(node, "equation", b"").decode()).replace(" ", "")
        if node.op_type == "Einsum" and not node.domain and equation != equation.lower():
            attribute = next(a for a in node.attribute if a.name == "equation")
            attribute.s = small_letters(equation).encode()


def small_letters(equation: str) -> str:
    """An equation of Einsum without spaces in small letters; as it is where it has more than 26 letters.

    Without an arrow the result has its axes in the order of the letters. The standard does not say whether capitals
    come first, so an equation with both kinds stays as it is.

    >>> small_letters("BQd,BKd->BQK"), small_letters("...BA,...AC"), small_letters("...zA,...BA")
    ('bqd,bkd->bqk', '...ba,...ac', '...zA,...BA')
    """
    letters = sorted(set(equation) & set(ascii_letters))
    if "->" not in equation and any(c.islower() for c in letters):
        return equation
    free = [c for c in ascii_lowercase if c not in letters]
    small = {c: c for c in letters if c.islower()}
    for letter in (c for c in letters if c.isupper()):
        own = letter.lower()
        found = own if own in free else next((c for c in free if c.upper() not in letters), "")
        if not found:
            return equation
        free.remove(found)
        small[letter] = found
    return "".join(small.get(c, c) for c in equation)


def _same_padding(size: object, kernel: object, stride: int, dilation: int) -> int | None:
    """Padding of one axis so that the output has ceil(size / stride) elements; None if it hangs on a dynamic size."""
    if not isinstance(kernel, int) or (stride != 1 and not isinstance(size, int)):
        return None
    reach = (kernel - 1) * dilation + 1
    if stride == 1 or not isinstance(size, int):
        return reach - 1
    return max((math.ceil(size / stride) - 1) * stride + reach - size, 0)


def _passes_through(draft: Draft, node: NodeProto) -> bool:
    """Whether the first output of a node is its first input."""
    if node.domain or not node.input:
        return False
    if node.op_type == "Cast":
        info = draft.info(node.input[0])
        return info is not None and info.dtype == dtype_name(attribute_value(node, "to", 0))
    if node.op_type == "Dropout":
        training = node.input[2] if len(node.input) > 2 else ""
        off = not training or (training in draft.tensors and not draft.array(training).any())
        return off and not any(draft.shown.consumers(m) or draft.shown.is_output(m) for m in node.output[1:])
    return node.op_type == "Identity"
