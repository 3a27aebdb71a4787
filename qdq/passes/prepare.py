"""Bring a float model into the one form that every later pass expects, with the same outputs.

    every node has a name, initializers are no longer inputs -> opset 21
    constants, shapes, BatchNormalization and automatic padding folded; identities, unused nodes and tensors dropped
    bodies of If, Loop and Scan named and their constants lifted; the branch of a constant condition taken
    sequences written as tensors, FP64 made FP32, composite operators without a kernel written out, shapes inferred
    Einsum in small letters, products without a weight on the right and what the compiler refuses in another form
    -> Model (IR version 10)

It must not change what the model computes beyond float rounding, make dynamic dimensions static, rename inputs, outputs
or named nodes, or need a runtime.
"""

from __future__ import annotations

import math
from string import ascii_letters, ascii_lowercase

from onnx import NodeProto, helper

from qdq.core.disk.cache import remembered
from qdq.core.errors import ModelError
from qdq.model.as_bytes import identity, packed, unpacked
from qdq.model.graphsurgeon import ModelSource, called
from qdq.model.made_for import made_for
from qdq.model.model import Model, dtype_name
from qdq.model.nodes import all_nodes, attribute_value, controlled_nodes
from qdq.model.opset import is_same
from qdq.model.storage import is_quantized, load, quantized_nodes
from qdq.passes.bodies import lift_bodies, name_bodies, show_bodies, simplify_bodies, take_branches
from qdq.passes.composites import write_out
from qdq.passes.doubles import has_doubles, single_precision
from qdq.passes.draft import Draft, assign
from qdq.passes.fold import fold_batch_norms, fold_constants, fold_shapes
from qdq.passes.rewrites import PREPARED_REWRITES
from qdq.passes.sequences import write_out_sequences
from qdq.passes.trained import computes_codes, floated
from qdq.passes.transposes import merge_transposes


def load_float(source: ModelSource) -> Model:
    """A float model, prepared: what every stage starts from. It is a path, a ModelProto or an onnx_graphsurgeon.Graph.

    Quantizers that it came with are taken out; `Model.trained` has what they say.

    Raises:
        ModelError: it is no model, or one that is quantized already in a way that cannot be read back.
        InputError: see `storage.load`.
    """
    model = load(source)
    if is_quantized(model) and made_for(model.proto):
        raise ModelError(f"{called(source)} is quantized already, by qdq. Give the float model that it was made from.")
    if is_quantized(model):
        model = floated(_folded(model) if computes_codes(model) else model)
    if is_quantized(model):
        raise ModelError(
            f"{called(source)} is quantized already, in a way that cannot be read back, as by "
            f"{quantized_nodes(model)[0]}: integer operators, operators of another domain than ONNX's, QuantizeLinear "
            "or DequantizeLinear in bodies, of inputs or outputs, or with scales that are computed as it runs. Give "
            "the float model that it was made from."
        )
    return remembered(
        "prepared",
        lambda: identity(model),
        lambda: prepare(model),
        pack=packed,
        unpack=lambda parts: unpacked(parts, model),
    )


OLDEST_OPSET = 7  # as in ONNX Runtime


def prepare(model: Model) -> Model:
    """Normalize a float model; the same model always gives the same bytes.

    Opset 7 to 20 becomes 21; a newer one stays. Nodes have names, weights are initializers and no inputs, tensors
    have their inferred types and shapes. Inputs and outputs are those of `model`, dynamic sizes included.

    Raises:
        ModelError: the opset is too old or too new, or an operator has no equivalent in opset 21.
    """
    if 0 < model.opset < OLDEST_OPSET and not is_same(model.proto, OLDEST_OPSET):
        raise ModelError(
            f"Cannot use this model: it is of opset {model.opset}, and qdq takes {OLDEST_OPSET} or newer, as ONNX "
            "Runtime does. Export it again with opset 17 to 21."
        )
    draft = Draft(model)
    write_out_axes(draft)
    draft.name_nodes()
    draft.lift_constants()
    draft.raise_opset()
    draft.name_nodes()
    name_bodies(draft)
    simplify(draft)
    if write_out_sequences(draft):
        simplify(draft)
    if has_doubles(draft):
        draft = Draft(single_precision(draft.finish()))
        simplify(draft)
    if write_out(draft, low=True):
        simplify(draft)
    fold_batch_norms(draft)
    pad_explicitly(draft)
    write_small_letters(draft)
    show_bodies(draft)
    return _acceptable(draft.finish())


def _folded(model: Model) -> Model:
    """The model with its constants computed, and nothing else."""
    draft = Draft(model)
    draft.name_nodes()
    simplify(draft)
    return draft.finish()


def simplify(draft: Draft) -> None:
    """Fold what does not depend on the inputs, in the main graph and in bodies, until nothing is left to fold."""
    draft.lift_constants()
    draft.drop_unused()
    while draft.infer() and (
        fold_shapes(draft) | fold_constants(draft) | lift_bodies(draft) | take_branches(draft) | drop_identities(draft)
        or simplify_bodies(draft, simplify)
    ):
        draft.drop_unused()


def _acceptable(model: Model) -> Model:
    """The model after the rewrites that are always done; what they leave superfluous is dropped."""
    done = model
    for rewrite in PREPARED_REWRITES.values():
        done = rewrite(done).model
    if done is model:
        return model
    draft = Draft(done)
    draft.infer()
    merge_transposes(draft)
    drop_identities(draft)
    return draft.finish()


def write_out_axes(draft: Draft) -> None:
    """Give MeanVarianceNormalization its axes: without them onnx's own check refuses what it stands for."""
    for node in all_nodes(draft.graph):
        if node.op_type == "MeanVarianceNormalization" and not any(a.name == "axes" for a in node.attribute):
            node.attribute.append(helper.make_attribute("axes", [0, 2, 3]))


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
    for node in (*draft.graph.node, *controlled_nodes(draft.graph)):
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
