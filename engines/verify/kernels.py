"""Which kernels of an engine multiply for an ONNX node, and in which type.

Layers -> those that name the node -> the ones that multiply (`multiplying`) -> the type of what they multiply.
Must not guess: where a kernel's tensors and name leave several answers, the answer is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from engines.backends.layers import KernelTensor, Layer
from engines.core.quantizers import LOW

_NO_FACTORS = ("bool", "int32", "int64")  # masks and indices
_BODY = r"\((If|Loop|Scan)\)$"  # a node inside a graph of another: 'node | choice (If)'
_PRODUCT = re.compile(r"Fc|Corr|Deco|Gemm|Sum")


def multiplying(layers: Sequence[Layer], node: str) -> tuple[Layer, ...]:
    """The kernels that multiply for a node, among the several that name it; the one that reads most first.

    | kernel | rank |
    |---|---|
    | correlation, deconv, gemm, Cask convolution or gemm | 0 |
    | runtime_fusion, fused attention (`_gemm_mha_v2`): a product inside a fusion | 1 |
    | kgen with a product in its name (a matrix with one row is `Mul..Sum`) | 2 |
    | any other: padding, scaling or requantizing around the product; if one alone multiplies, the product itself | 3 |

    Those of the best rank are given. Source: layer dumps of tensorrt_rtx 1.7.1 (the first two ranks never name a node
    that they do not compute).
    """
    named = [la for la in layers if node in la.onnx_nodes]
    named = named or [
        la for la in layers if any(map(re.compile(rf"{re.escape(node)} \| .*{_BODY}").match, la.onnx_nodes))
    ]
    if not any(_rank(la) < 2 for la in named):  # metadata is missing on some kernels, the name is not
        named += [la for la in layers if not la.onnx_nodes and _rank(la) < 2 and _in_name(node, la.name)]
    best = min(map(_rank, named), default=3)
    found = [la for la in named if _rank(la) == best and (best < 3 or "Mul" in la.name)]
    if best == 3 and len(found) > 1:
        return ()
    if best < 3:  # every kernel of a loop names the node that ends its body
        found = [la for la in found if _in_name(node, la.name)] or found
    return tuple(sorted(found, key=lambda la: -sum(map(_elements, (*la.inputs, *la.constants)))))


def compute_kernel(layers: Sequence[Layer], node: str) -> Layer | None:
    """The kernel that multiplies for a node; None where none is known to."""
    return next(iter(multiplying(layers, node)), None)


def consumed_dtype(kernel: Layer, stated: str = "") -> str:
    """The type in which a kernel multiplies, or 'unknown'.

    It is the type of the first factor where a second operand (input or constant) has it too. A fusion that casts before
    it multiplies ('CastMul..Fc') multiplies in a floating type, and one that rounds right before ('RounCastCorr') in
    the only type of codes it reads. Of several floating types it is `stated`, the one that the graph states: the
    network is strongly typed.
    """
    operands = [t for t in (*kernel.inputs, *kernel.constants) if t.dtype not in _NO_FACTORS]
    if "_gemm_mha" in kernel.name:  # masks come before or after the queries, and may be codes or floats themselves
        operands = [
            t for t in kernel.inputs if t.dtype not in _NO_FACTORS and len(t.shape) == len(kernel.outputs[0].shape)
        ]
        return _only({t.dtype for t in operands}, stated)
    if not operands:
        return "unknown"
    product = _PRODUCT.search(kernel.name)
    before = kernel.name[: product.start()] if product else ""
    codes = {t.dtype for t in operands if t.dtype in LOW}
    if before.endswith(("Roun", "RounCast")) and codes:
        return _only(codes, "")
    first = next((t for t in operands if _elements(t) > 1), operands[0])
    others = [t for t in operands if t is not first]
    if "Cast" not in before and (not others or any(t.dtype == first.dtype for t in others)):
        return first.dtype
    floats = {t.dtype for t in (*kernel.outputs, *operands) if "float" in t.dtype and t.dtype not in LOW}
    return _only(floats or {first.dtype}, stated)


def _only(found: set[str], stated: str) -> str:
    """The one type of several."""
    return stated if stated in found else next(iter(found)) if len(found) == 1 else "unknown"


def _rank(layer: Layer) -> int:
    kind = layer.kind.lower()
    if re.search(r"correlation|conv|gemm|matrix", kind):
        return 0
    if "fusion" in kind or "gemm" in layer.name.lower() or "myelin" in kind:
        return 1
    return 2 if re.search(r"Mul\w*Sum|Fc|Gemm|Corr|Deco", layer.name) else 3


def _in_name(node: str, kernel: str) -> bool:
    """Whether a kernel's name ('/wk/MatMul+/wq/MatMul_myl0_1') lists a node."""
    listed = re.sub(r"_myl\d+_\d+$|\$\$myelin\$\$([^^]*\^)?", "", kernel)
    return listed == node or node in re.split(r" ?\+ ?", listed)


def _elements(tensor: KernelTensor) -> int:
    """Elements, with 1 for a dimension that only the run decides."""
    return math.prod(max(d, 1) for d in tensor.shape)
