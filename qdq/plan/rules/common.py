"""Rules of placement: what one node says about the quantization of its tensors, without data.

A rule sees a model, a node and the settings, and returns decisions: Want, Veto, Tie. Rules do not see each other.
Sources: NVIDIA's placement advice, what TensorRT-RTX 1.7.1 compiled from about 90 small graphs (SM89), and the facts of
the compiler's profile.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from onnx import NodeProto

from engines.backends.profile import Profile
from engines.core.operators import CONVOLUTIONS, LAST_AXIS_NORMS, MEAN_POOLS, NORMS, PICKERS, SOFTMAXES, family
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute, bodies, controlled_nodes, controls, input_axis, weight_axis
from qdq.passes.rewrites.attention.scores import attends
from qdq.plan.block_length import best
from qdq.plan.choice import FLOAT, FLOATS as UNQUANTIZED, FP32
from qdq.plan.scheme import Scheme
from qdq.plan.settings import AUTO, WHOLE, WORTH, Settings
from qdq.plan.spec import Spec

FEWEST_TOKENS = 32  # of attention that TensorRT-RTX 1.7.1 fuses in FP8, whatever the heads (SM89, SM120)
MOST_PADDING = 1 / 8  # zeros added to fill the last block, as a share of the real elements
FLOATS = ("float32", "float16", "bfloat16")

# Why an operator without weights stays in float. The compiler fuses what it can into the kernels of its neighbours.
_FLOAT_OPS = {
    NORMS | LAST_AXIS_NORMS: "normalization stays in float: its statistics need the range, and no integer kernel "
    "exists for it",
    SOFTMAXES: "softmax stays in float: INT8 around it breaks the fused attention kernel",
    PICKERS | {"Resize", "Upsample"}: "it moves or picks values; a quantizer behind it is hoisted above it by the "
    "compiler",
    family(
        "Shape Size Cast ConstantOfShape Range NonZero Constant OneHot TopK ArgMax ArgMin EyeLike"
    ): "it handles shapes, indices or types, not data",
    family(
        "LSTM GRU RNN"
    ): "recurrent operators have no INT8 kernel in TensorRT; the compiler computes the product with "
    "their inputs for all steps at once, in float",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A rule wants the tensor at one operand of the node quantized.

    Attributes:
        tensor: its name.
        index: of the operand.
        role: of a weighted node "activation" (its data) or "weight"; of any other "operand" quantizes the tensor, and
            "shortcut" reads the quantized tensor where another node wants it, and "table" stores it as codes.
        spec: how; a node without weights takes that of the weighted ones.
        rule: who says so.
        reason: why, where it is not what the settings ask for, or the node has no weights.
    """

    tensor: str
    index: int
    role: Literal["activation", "weight", "operand", "shortcut", "table"]
    spec: Spec
    rule: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Veto:
    """A rule forbids quantizers on the node's operands."""

    rule: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A rule asks for one scale for several tensors, as far as they are quantized at all."""

    tensors: tuple[str, ...]
    rule: str


Decision = Want | Veto | Tie
Rule = Callable[[Model, NodeProto, Settings], list[Decision]]


def weighted(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want what the node's scheme says of the data and the constant weight of a convolution, Gemm or MatMul."""
    if node.op_type not in WEIGHTED or len(node.input) < 2 or not model.is_constant(node.input[1]):
        return []
    weight = model.info(node.input[1])
    if weight is None or weight.shape is None or len(weight.shape) < 2 or 0 in weight.shape:
        return []
    scheme, convolution = settings.scheme_of(node.name), node.op_type in CONVOLUTIONS
    if scheme.name in UNQUANTIZED:  # `kept_float` says so
        return []
    settings = settings.of(node.name)
    outputs, inputs = weight_axis(node, len(weight.shape)), input_axis(node, len(weight.shape))
    block, reason, fallback = None, "", False
    if settings.lengths(scheme.weight) and not convolution and settings.block not in WHOLE:
        block, reason = _block(model, node, settings, scheme, weight.shape)
        fallback = block is None
    data = settings.activation(scheme, convolution=convolution)
    spec = (
        Spec(format=scheme.unblocked, axis=outputs, weight_only=scheme.data is None)
        if fallback
        else settings.weight(scheme, outputs=outputs, inputs=inputs, block=block, convolution=convolution)
    )
    if spec is None and scheme.data is None:
        reason = f"{scheme.name} is for weights alone, and a convolution would dequantize its weight in an extra kernel"
        return [Veto(rule="weight_only", reason=reason)]
    if spec is None:
        return [Veto(rule="format", reason=f"TensorRT has no convolution of {scheme.weight} data")]
    if data is not None and FORMATS[data.format].blocks:
        lacking = _no_data_blocks(model, node) or (reason if fallback else "")
        if lacking:
            return [Veto(rule="format", reason=lacking)]
    wants: list[Decision] = []
    if data is not None:
        wants.append(Want(tensor=node.input[0], index=0, role="activation", spec=data, rule="weighted"))
    return [*wants, Want(tensor=node.input[1], index=1, role="weight", spec=spec, rule="weighted", reason=reason)]


def _block(
    model: Model, node: NodeProto, settings: Settings, scheme: Scheme, shape: Sequence[int | str | None]
) -> tuple[int | None, str]:
    """Elements per block, and why they are not as many as asked for; None and the reason where no block fits."""
    blocks, most = settings.lengths(scheme.weight), MOST_PADDING if settings.profile.padding else 0
    size, whole = shape[input_axis(node, len(shape))], f"{scheme.unblocked} per channel"
    if scheme.compute_format and len(shape) > 2:
        return None, f"{whole}: {scheme.weight} blocks that are read as {scheme.compute_format} need a matrix"
    fitting = [b for b in blocks if isinstance(size, int) and -size % b <= most * size]
    if not fitting or not isinstance(size, int):
        return None, f"{whole}: its {size} inputs do not fill blocks of {min(blocks)}"
    block = fitting[0]
    if len(blocks) == 1:
        reasons = []
    elif settings.block in (AUTO, WORTH):
        block = best(model.array(node.input[1]), input_axis(node, len(shape)), fitting, FORMATS[scheme.weight])
        reasons = ["the block of least error per bit that it saves against INT8"]
    else:
        block = max((b for b in fitting if b <= int(settings.block)), default=min(fitting))
        reasons = [] if block == settings.block else [f"blocks of {settings.block} do not divide its {size} inputs"]
    if missing := -size % block:
        reasons.append(f"padded with {missing} zeros")
    return block, "; ".join(reasons)


def _no_data_blocks(model: Model, node: NodeProto) -> str:
    """Why the data of a product cannot be cut into blocks along its sum, "" where its form allows them."""
    if model.rank(node.input[0]) not in (2, 3) or model.rank(node.input[1]) != 2:
        return "TensorRT quantizes data in blocks for matrices and batches of them only, times one matrix"
    if attribute(node, "transA", 0):
        return "its sum does not run over the last axis of its data, along which blocks lie"
    return ""


def residual(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want the shortcut of a residual Add read from the tensor its convolution reads: INT8 traffic, one fused kernel.

    The shortcut is an input of the Add that a weighted operator reads too; the Add's other input is computed. Where
    kernels write INT8, `tensorrt.shortcut` speaks.
    """
    profile = settings.profile
    if node.op_type != "Add" or profile.integer_output or not profile.residual:
        return []
    if any(model.is_constant(t) for t in node.input):
        return []
    wants: list[Decision] = []
    for index, tensor in enumerate(node.input):
        uses = [u.node for u in model.consumers(tensor) if u.index == 0 and u.node.op_type == "Conv"]
        other = model.producer(node.input[1 - index])
        specs = [settings.of(n.name).activation(settings.scheme_of(n.name), convolution=True) for n in uses]
        spec = next(filter(None, specs), None)
        if spec and any(model.is_constant(n.input[1]) for n in uses) and other is not None and other.op_type == "Conv":
            wants.append(Want(tensor=tensor, index=index, role="shortcut", spec=spec, rule="residual"))
    return wants[:1]


def concat(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Tie the output of a Concat with its inputs, so that a branch that is quantized anyway need not be rescaled."""
    if node.op_type != "Concat" or not settings.profile.concat:
        return []
    return [Tie(tensors=(node.output[0], *node.input), rule="concat")]


def transposed(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto ConvTranspose, unless the compiler is known to run it in INT8: else a quantizer on it only adds kernels."""
    if node.op_type != "ConvTranspose" or settings.profile.conv_transpose:
        return []
    return [Veto(rule="transposed", reason=settings.profile.conv_transpose.says)]


def operands(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto products whose operands cannot be quantized: no constant weight on the right, or not a float type."""
    if node.op_type == "Einsum" and len(node.input) == 2 and not any(map(model.is_constant, node.input)):
        return [Veto(rule="operands", reason=settings.profile.attention.says)]
    if node.op_type not in WEIGHTED or len(node.input) < 2:
        return []
    data, weight = (model.is_constant(t) for t in node.input[:2])
    if data:
        reason = "its left operand is the constant one; INT8 kernels want the weight on the right"
    elif not weight and node.op_type == "MatMul":
        if attention(model, node, settings):
            return []
        reason = settings.profile.attention.says
    elif not weight:
        reason = "its weight is computed, so its scale is not known before the engine runs"
    else:
        info = model.info(node.input[1])
        if info is not None and info.dtype not in FLOATS:
            reason = f"its weight is {info.dtype}; quantizers read float32, float16 or bfloat16"
        elif info is not None and info.shape is not None and len(info.shape) < 2:
            reason = "its weight is a vector: a product bound by memory, not by arithmetic"
        elif info is not None and info.shape is not None and 0 in info.shape:
            reason = "its weight is empty"
        else:
            return []
    return [Veto(rule="operands", reason=reason)]


def attention(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want Q, K, V and the output of the Softmax in FP8 where that is asked for: all of them, or the fusion is lost.

    Measured with TensorRT-RTX 1.7.1 on SM89 and SM120: heads of 24 to 128, with and without masks and scales, stay one
    kernel (`_gemm_mha_v2`) of FP8 operands; without the Softmax's quantizer three kernels take its place.
    """
    if settings.attention == FLOAT or node.name in model.inner_nodes or (pair := attends(model, node)) is None:
        return []
    if any(kept_float(model, n, settings) or excluded(model, n, settings) for n in pair):
        return []
    keys = (model.sizes(pair[0].input[1], -1) or (FEWEST_TOKENS,))[0]
    if keys < FEWEST_TOKENS:
        return [Veto(rule="attention", reason=f"of {keys} tokens FP8 attention is not fused: it wants {FEWEST_TOKENS}")]
    names = {n.name for n in pair}
    if any(use.node.name not in names for n in pair for t in n.input for use in model.consumers(t)):
        return [Veto(rule="attention", reason="other nodes read its operands too, in float or as other codes")]
    spec, reason = Spec(format=settings.attention), "FP8 attention: Q, K, V and the Softmax's output are codes"
    return [
        Want(tensor=tensor, index=index, role="operand", spec=spec, rule="attention", reason=reason)
        for index, tensor in enumerate(node.input)
    ]


def excluded(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto what the user excluded by name."""
    names, patterns = _excluded(settings.exclude)
    found = node.name if node.name in names else next((p for p in patterns if fnmatch.fnmatchcase(node.name, p)), "")
    return [Veto(rule="excluded", reason=f"excluded by the pattern {found!r}")] if found else []


@lru_cache(maxsize=8)
def _excluded(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Those that are one name, as a search has by the hundred, and the others."""
    names = frozenset(pattern for pattern in patterns if glob.escape(pattern) == pattern)
    return names, tuple(pattern for pattern in patterns if pattern not in names)


def kept_float(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto what an override leaves in float, under the name of its float type."""
    name = settings.scheme_of(node.name).name if settings.overrides else ""
    if name not in UNQUANTIZED:
        return []
    return [Veto(rule=name, reason=f"an override leaves it in {'FP32' if name == FP32 else name}")]


def containers(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto quantizers on an If, Loop or Scan itself: the nodes of its bodies are planned one by one.

    Measured with TensorRT-RTX 1.7.1 for SM86 and SM89: products in the bodies of If, Loop and Scan run INT8 where Q and
    DQ of the data are in the body, wherever codes and scales lie; behind a DQ outside of an If they run in float.
    Bodies of other operators are their own affair.
    """
    inner = [n for body in bodies(node) for n in body.node]
    if not inner:
        return []
    if controls(node):
        reason = f"it only decides what runs: each of the {len(inner)} nodes in its body has an entry of its own"
    else:
        count = sum(n.op_type in WEIGHTED for n in inner)
        reason = (
            f"the {len(inner)} nodes in its body stay in float, {count} of them weighted: only If, Loop and Scan run "
            "bodies whose values can be observed"
        )
    return [Veto(rule="containers", reason=reason)]


def inner(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto a product in a body whose data have their channels on the first axis, along which its runs are joined."""
    if node.op_type != "Gemm" or not attribute(node, "transA", 0) or node.name not in model.inner_nodes:
        return []
    return [Veto(rule="inner", reason="its data are transposed (transA), and values in a body are joined along rows")]


def foreign(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto operators of other domains than ONNX's own, whatever their names: what they compute is not known here."""
    if node.domain in ("", "ai.onnx"):
        return []
    reason = f"a custom operator (domain {node.domain!r}): what it computes is unknown, and a plugin runs it in float"
    return [Veto(rule="foreign", reason=reason)]


RULES: tuple[Rule, ...] = (
    kept_float,
    weighted,
    attention,
    residual,
    concat,
    transposed,
    operands,
    excluded,
    containers,
    inner,
    foreign,
)


def why_float(op_type: str, profile: Profile) -> tuple[str, str]:
    """Rule name and reason why an operator that no rule wants stays in float."""
    if op_type in MEAN_POOLS:
        return "no_weight", profile.mean_pool.says
    other = "it has no weights; the compiler fuses pointwise operators into the kernel before or after them"
    return "no_weight", next((reason for ops, reason in _FLOAT_OPS.items() if op_type in ops), other)


def check_exclude(model: Model, patterns: tuple[str, ...], what: str = "exclude") -> None:
    """Refuse patterns that match no node; `what` is the setting's name for the message.

    Raises:
        InputError: names the pattern and the nearest node names.
    """
    names = [n.name for n in (*model.graph.node, *controlled_nodes(model.graph))]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3)
            hint = f" Near names: {', '.join(near)}." if near else ""
            raise InputError(
                f"The {what} pattern {pattern!r} matches none of the model's {len(names)} nodes. Patterns are "
                f"matched against whole node names, case-sensitively; use * for any text.{hint}"
            )


def check_patterns(model: Model, settings: Settings) -> None:
    """Refuse exclude and override patterns that match no node; raises as `check_exclude` does."""
    check_exclude(model, settings.exclude)
    check_exclude(model, tuple(settings.overrides), "override")
