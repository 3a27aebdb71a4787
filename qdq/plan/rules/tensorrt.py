"""Rules of placement for compilers whose INT8 kernels write INT8, as TensorRT's do: what a Q can fuse into.

Each rule asks the profile of the settings' compiler, never its name, and is silent where the fact it rests on is not
known to hold, or for a veto not known to fail. With such kernels every tensor between two of them is best quantized
once, behind the last operator that fuses into the kernel that makes it; a reader in float keeps that kernel's output
float. Nothing here puts a Q between a convolution and its activation: only readers of a tensor get Q and DQ.

Sources: NVIDIA/TensorRT issues (#n), the layer dumps in NVIDIA's trt-engine-explorer, release notes, NvInfer.h, and
the placement of NVIDIA Model Optimizer 0.47, which is made for TensorRT. Where a rule departs from the latter it says
why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import NodeProto

from engines.core.documents import replace
from engines.core.operators import CONVOLUTIONS, CURVES, MEAN_POOLS, MOVERS, NORMS, RAMPS, family
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute, input_axis, weight_axis
from qdq.plan.rules.common import RULES as COMMON, Decision, Rule, Tie, Veto, Want
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec

NARROW = 16  # channels, rows or summands below which INT8 kernels gain nothing
EIGHTS, FOURS = 8, 4
FP8_TAPS = 32  # of a convolution's kernel that optimised FP8 kernels have
_EPILOGUE = CURVES | RAMPS | MOVERS | family("BatchNormalization Dropout MaxPool")
_BY_CONSTANT = family("Add Div Mul Sub")
_ACTIVATIONS = CURVES | family("Clip Relu")
_GATES = family("HardSigmoid Sigmoid")
_POINTWISE = _EPILOGUE | _BY_CONSTANT
_LINEAR = MOVERS | family("BatchNormalization Dropout")
_SHARING = MEAN_POOLS | family("Add Concat MaxPool Mul ReduceMean Resize")


def quantized_data(model: Model, node: NodeProto, settings: Settings) -> Spec | None:
    """How a node reads its data where every rule lets it be quantized; None where it stays in float."""
    if node.op_type not in WEIGHTED or len(node.input) < 2 or not model.is_constant(node.input[1]):
        return None
    own = settings.of(node.name)
    spec = own.activation(settings.scheme_of(node.name), convolution=node.op_type in CONVOLUTIONS)
    if spec is None or any(isinstance(d, Veto) for rule in _VETOES for d in rule(model, node, settings)):
        return None
    return replace(spec, token=None)


def backbone(model: Model, tensor: str) -> NodeProto | None:
    """The convolution whose kernel makes a tensor, with what fuses behind it: constants, activation, MaxPool, moves.

    Source: fusions seen in NVIDIA's layer dumps; SiLU counts as an activation (#966, #1114), a gate from elsewhere,
    as in squeeze-and-excitation, does not (Model Optimizer, `_is_fusible_mul`).
    """
    node, _ = _backbone(model, tensor)
    return node


def _backbone(model: Model, tensor: str) -> tuple[NodeProto | None, bool]:
    """As `backbone`, and whether all that stands between is linear."""
    linear = True
    while (node := model.producer(tensor)) is not None and node.op_type not in WEIGHTED:
        computed = _computed(model, node)
        if node.op_type == "Mul" and len(set(computed)) == 2:
            inner = _gated(model, computed)
            computed = [] if inner is None else [inner]
        elif node.op_type not in _POINTWISE:
            return None, False
        if len(computed) != 1:
            return None, False
        linear = linear and (node.op_type in _LINEAR or (node.op_type in _BY_CONSTANT and computed == node.input[:1]))
        tensor = computed[0]
    return (node, linear) if node is not None and node.op_type in CONVOLUTIONS else (None, False)


def shortcut(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want Q and DQ on the shortcut of a residual Add behind a quantized convolution, also where nothing else reads it.

    Add and activation are inside the convolution's kernel only where the shortcut has the type that it writes; the
    pair stands on the shortcut alone, so a convolution on it (downsampling) writes INT8 too. The main path is that of a
    convolution without an activation before the Add (with one the Add is another kernel), and of two the one farther
    from what the branches share. Without a quantized reader behind the Add the kernel would write floats and the
    shortcut be dequantized by a kernel of its own.

    Source: #1992; #3861; layer dumps of ResNet-18; Model Optimizer, `build_non_residual_input_map`.
    """
    profile = settings.profile
    main = _main(model, node) if profile.residual and profile.integer_output else None
    if main is None:
        return []
    tensor, conv = node.input[1 - main], backbone(model, node.input[main])
    spec = None if conv is None else quantized_data(model, conv, settings)
    if spec is None or not _quantized_behind(model, node.output[0], settings):
        return []
    reason = "the shortcut is read in the type that the convolution writes, so that the Add is inside its kernel"
    return [Want(tensor=tensor, index=1 - main, role="operand", spec=spec, rule="shortcut", reason=reason)]


def pooled(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want the input of a mean pool quantized behind a quantized convolution or in front of a quantized reader.

    With Q and DQ on both sides it runs in INT8. Behind a convolution the Q is worth its place even where nothing
    quantized reads the mean: in float the pool would keep the convolution's output float.

    Source: layer dumps of ResNet-18 with and without Q/DQ at the pool; Model Optimizer, `find_quantizable_nodes`.
    """
    if node.op_type not in MEAN_POOLS or not settings.profile.mean_pool or node.name in model.inner_nodes:
        return []
    spec = _made_quantized(model, node.input[0], settings)
    spec = spec or next(_readers(model, node.output[0], settings, through=MOVERS), None)
    if spec is None:
        return []
    reason = "it runs in INT8 between quantizers, and its input is written in INT8"
    return [Want(tensor=node.input[0], index=0, role="operand", spec=spec, rule="pooled", reason=reason)]


def normalized(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want the input of a LayerNormalization quantized where a quantized convolution makes it, moves allowed between.

    Source: Model Optimizer, `find_conv_to_layernorm_nodes`: the convolution then writes INT8.
    """
    if node.op_type != "LayerNormalization" or not settings.profile.integer_output or node.name in model.inner_nodes:
        return []
    conv = backbone(model, node.input[0])
    spec = None if conv is None else quantized_data(model, conv, settings)
    if spec is None:
        return []
    reason = "it computes in float; the convolution before it writes INT8"
    return [Want(tensor=node.input[0], index=0, role="operand", spec=spec, rule="normalized", reason=reason)]


def shared(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want a float operator to read a tensor as quantized as others read it: else it is written in float too.

    It speaks of sums, gated products, means, joins, maxima and interpolations. The product that ends an
    activation (SiLU, GELU) reads floats: it is inside the kernel that makes the tensor.

    Source: ResNet-18 on A100 with Q/DQ at convolutions only, whose shortcuts read floats, had 12 kernels that only
    quantize and was slower than FP16 (layer dumps); Model Optimizer, `filter_quantizable_kgen_heads`. Unlike there, the
    gate of squeeze-and-excitation and the product that a transformer's sum adds stay float unless something else reads
    them quantized: they save little traffic, and what it would gain is not published.
    """
    if node.op_type not in _SHARING or not settings.profile.integer_output or node.name in model.inner_nodes:
        return []
    spec = settings.activation(settings.scheme_of(node.name), convolution=True)
    if spec is None:
        return []
    computed = _computed(model, node)
    if any(_fused(model, node, tensor) for tensor in computed):
        return []
    main = _main(model, node)
    return [
        Want(tensor=tensor, index=index, role="shortcut", spec=spec, rule="shared")
        for index, tensor in enumerate(node.input)
        if tensor in computed and index != main
    ]


def crossed(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Tie input and output of a MaxPool: a Q behind it moves in front, and meets the DQ there without a conversion.

    Source: NVIDIA's guide to YOLOv7 with Q/DQ (equal scales at MaxPools and Concats: .87 of the speed without).
    """
    if node.op_type != "MaxPool" or not settings.profile.integer_output:
        return []
    return [Tie(tensors=(node.output[0], node.input[0]), rule="crossed")]


def narrow(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto convolutions of few channels, which gain nothing.

    Of fewer than 16 channels in (per group) or out it stays where it is no group, one of them is a multiple of 8 and
    one is at least 16 or the node reads a model input, with a kernel of equal sides; or where it has groups, outputs in
    eights and at least three taps on every side (so a depthwise 3x3).

    Source: Model Optimizer, `find_nodes_from_convs_to_exclude`; #1310: other channels than 32 are padded.
    """
    if settings.profile.narrow.holds is not False or node.op_type != "Conv" or not (shape := _weight(model, node)):
        return []
    outputs, inputs, kernel, groups = shape[0], shape[1], shape[2:], attribute(node, "group", 1)
    if min(outputs, inputs) >= NARROW:
        return []
    first = any(entry.name == node.input[0] for entry in model.inputs)
    if groups == 1:
        eights = outputs % EIGHTS == 0 or inputs % EIGHTS == 0
        fits = (
            eights
            and ((first and settings.profile.first_layer) or max(outputs, inputs) >= NARROW)
            and len(set(kernel)) == 1
        )
    else:
        fits = outputs % EIGHTS == 0 and all(taps >= 3 for taps in kernel)
    says = f"{inputs} channels in{' a group' if groups > 1 else ''}, {outputs} out: {settings.profile.narrow.says}"
    return [] if fits else [Veto(rule="narrow", reason=says)]


def upsampled(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto transposed convolutions that are not the pattern which runs in INT8.

    In 2-D a quantized one fuses with the activation behind it, and not with a normalization; in 3-D it needs the whole
    pattern, quantizers in front, an activation, and the quantizer of a reader, which is not merged through a Concat.

    Source: #3412; #2597, a user; groups build since 10.9 (#1934), and nobody says that they gain. Model Optimizer
    quantizes all.
    """
    if node.op_type != "ConvTranspose" or not settings.profile.conv_transpose:
        return []
    behind = model.only_use(node.output[0])
    after = behind.node if behind is not None else None
    why = ""
    if attribute(node, "group", 1) > 1:
        why = "it has groups, whose speed nobody published"
    elif after is not None and after.op_type in NORMS:
        why = f"{after.op_type} stands behind it"
    elif len(_weight(model, node)) > 4 and (
        after is None
        or after.op_type not in _ACTIVATIONS
        or next(_readers(model, after.output[0], settings), None) is None
    ):
        why = "in 3-D it needs an activation behind it that a quantized node reads"
    return [Veto(rule="upsampled", reason=f"{why}: {settings.profile.conv_transpose.says}")] if why else []


def grouped(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto convolutions with groups whose channels are not in fours; depthwise ones have kernels of their own.

    Source: NvInfer.h 10.0 to 11.1, `setNbGroups`: INT8 wants multiples of four per group, in and out.
    """
    groups = attribute(node, "group", 1)
    if node.op_type != "Conv" or groups == 1 or settings.profile.odd_groups.holds is not False:
        return []
    if not (shape := _weight(model, node)):
        return []
    each = (shape[1], shape[0] // groups)
    if each == (1, 1) and settings.profile.depthwise:
        return []
    says = f"{each[0]} channels in and {each[1]} out per group: {settings.profile.odd_groups.says}"
    return [Veto(rule="grouped", reason=says)] if any(n % FOURS for n in each) else []


def eighths(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto FP8 for convolutions with groups, of more than 32 taps, or of at most 16 channels.

    Source: release notes of TensorRT 10.12 and 10.13, limitations: no optimised FP8 kernels there; Model Optimizer,
    `find_nodes_from_convs_to_exclude`, for the channels.
    """
    scheme = settings.scheme_of(node.name)
    if node.op_type != "Conv" or scheme.convolution != "fp8" or settings.profile.fp8_convolutions.holds is not False:
        return []
    if not (shape := _weight(model, node)):
        return []
    groups, taps = attribute(node, "group", 1), math.prod(shape[2:])
    if groups == 1 and taps <= FP8_TAPS and min(shape[:2]) > NARROW:
        return []
    says = f"{groups} groups, {taps} taps, {shape[1]} channels in and {shape[0]} out"
    return [Veto(rule="eighths", reason=f"{says}: {settings.profile.fp8_convolutions.says}")]


def small(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Veto products with fewer than 16 summands or outputs, and those that are a matrix times one vector.

    Weights alone in low precision are for such products: those stay.

    Source: Model Optimizer, `find_nodes_from_matmul_to_exclude`. Unlike there, a batch that is open is not taken for 1
    because the first sample has 1.
    """
    if node.op_type not in ("Gemm", "MatMul") or settings.profile.small_products.holds is not False:
        return []
    if settings.scheme_of(node.name).data is None:
        return []
    if not (shape := _weight(model, node)) or len(shape) < 2:
        return []
    inputs, outputs = shape[input_axis(node, len(shape))], shape[weight_axis(node, len(shape))]
    made = model.info(node.output[0])
    rows = made.shape[0] if made is not None and made.shape is not None and len(made.shape) == 2 else None
    if rows != 1 and min(inputs, outputs) >= NARROW:
        return []
    what = "one row" if rows == 1 else f"{inputs} summands, {outputs} outputs"
    return [Veto(rule="small", reason=f"a product of {what}: {settings.profile.small_products.says}")]


RULES: tuple[Rule, ...] = (shortcut, pooled, normalized, shared, crossed, narrow, upsampled, grouped, eighths, small)
_VETOES: tuple[Rule, ...] = (
    *(r for r in COMMON if r.__name__ != "weighted"),
    narrow,
    upsampled,
    grouped,
    eighths,
    small,
)


def _computed(model: Model, node: NodeProto) -> list[str]:
    return [name for name in node.input if name and not model.is_constant(name)]


def _gated(model: Model, factors: list[str]) -> str | None:
    """x where the factors are x and a gate of x, as in SiLU."""
    for gate, other in (factors, factors[::-1]) if len(factors) == 2 else ():
        made = model.producer(gate)
        if made is not None and made.op_type in _GATES and made.input[0] == other:
            return other
    return None


def _weight(model: Model, node: NodeProto) -> tuple[int, ...]:
    """Shape of a constant weight, () where there is none."""
    info = model.info(node.input[1]) if len(node.input) > 1 and model.is_constant(node.input[1]) else None
    return tuple(n for n in (info.shape if info and info.shape else ()) if isinstance(n, int))


def _main(model: Model, node: NodeProto) -> int | None:
    """Which input of an Add is a residual block's main path: a convolution's, the farther from what both share."""
    if node.op_type != "Add" or any(model.is_constant(t) or model.producer(t) is None for t in node.input):
        return None
    shapes = [info.shape if (info := model.info(name)) is not None else None for name in node.input]
    (first, plain), (second, also_plain) = (_backbone(model, name) for name in node.input)
    found = [first, second]
    known = None not in shapes
    if (known and shapes[0] != shapes[1]) or not any(found) or found[0] is found[1]:
        return None
    left, right = (_distances(model, name) for name in node.input)
    common = min(left.keys() & right.keys(), key=lambda name: left[name] + right[name], default=None)
    if all(found) and plain != also_plain:
        return 0 if plain else 1
    if all(found):
        return 0 if common is not None and left[common] > right[common] else 1
    main = int(found[0] is None)
    conv = found[main]
    assert conv is not None
    return None if common is not None and common in conv.output else main  # the convolution's own output is both


def _distances(model: Model, tensor: str) -> dict[str, int]:
    """Every computed tensor that one depends on, itself among them -> the fewest nodes between."""
    found, ways = {tensor: 0}, [tensor]
    for name in ways:
        for before in _computed(model, made) if (made := model.producer(name)) is not None else ():
            if before not in found:
                found[before] = found[name] + 1
                ways.append(before)
    return found


def _readers(model: Model, tensor: str, settings: Settings, *, through: frozenset[str] = frozenset()) -> Iterator[Spec]:
    """How weighted nodes read a tensor quantized, directly or behind operators of one data input."""
    for use in model.consumers(tensor):
        if use.index == 0 and (spec := quantized_data(model, use.node, settings)) is not None:
            yield spec
        elif use.index == 0 and use.node.op_type in through:
            yield from _readers(model, use.node.output[0], settings, through=through)


def _quantized_behind(model: Model, tensor: str, settings: Settings) -> bool:
    """Whether a quantizer behind a tensor can fuse into what makes it: in front of a product or a mean pool."""
    for use in model.consumers(tensor):
        node = use.node
        if use.index == 0 and node.op_type in MEAN_POOLS and settings.profile.mean_pool:
            return True
        if use.index == 0 and quantized_data(model, node, settings) is not None:
            return True
        follows = node.op_type in _EPILOGUE or (node.op_type in _BY_CONSTANT and len(_computed(model, node)) == 1)
        gate = node.op_type == "Mul" and _gated(model, _computed(model, node)) == tensor
        if (follows or gate or node.op_type == "Concat") and _quantized_behind(model, node.output[0], settings):
            return True
    return False


def _made_quantized(model: Model, tensor: str, settings: Settings) -> Spec | None:
    """How the convolution whose kernel makes a tensor, a residual Add inside it too, reads its data; None in float."""
    conv = backbone(model, tensor)
    if conv is not None:
        return quantized_data(model, conv, settings)
    while (node := model.producer(tensor)) is not None:
        if (main := _main(model, node)) is not None:
            return _made_quantized(model, node.input[main], settings)
        computed = _computed(model, node)
        if node.op_type not in _POINTWISE or len(computed) != 1:
            return None
        tensor = computed[0]
    return None


def _fused(model: Model, node: NodeProto, tensor: str) -> bool:
    """Whether another operand of a node is computed from a tensor value by value: then the node is its activation."""
    for name in _computed(model, node):
        while name != tensor and (made := model.producer(name)) is not None:
            before = _computed(model, made)
            if made.op_type not in _POINTWISE or len(before) != 1:
                break
            name = before[0]
            if name == tensor:
                return True
    return False
