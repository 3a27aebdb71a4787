"""What one kernel has to do, from its own tensors: bytes, multiply-adds, and the form of its product.

Layer (+ multiply-adds as the audit counts them) -> `Work`
The kernel's tensors hold every true size, also where ONNX's shape inference stops; only where they do not tell what is
multiplied are the audit's multiply-adds taken. Must not know a GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engines.backends.layers import BITS, KernelTensor, Layer

PRODUCT, GROUPED, DEPTHWISE, ATTENTION, POINTWISE = "product", "grouped", "depthwise", "attention", "pointwise"
_CONVOLUTION = re.compile(r"correlation|deconv|conv", re.IGNORECASE)
_CONVOLVED = re.compile(r"Corr|Deco")
_TRANSPOSED = re.compile(r"deconv|Deco", re.IGNORECASE)
_MULTIPLIED = re.compile(r"Fc|Gemm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kernel.

    Attributes:
        form: 'product', 'grouped', 'depthwise' (convolutions), 'attention' (fused), or 'pointwise' for all else.
        read: bytes of activations that it reads.
        written: bytes that it writes.
        weights: bytes of constants that it reads; of a table that it gathers from, no more than it writes.
        m: positions of the output: rows of the product, of all batches.
        n: channels of the output: columns of the product.
        k: length of each sum, of a grouped convolution within one group; 0 without a product.
        batch: products side by side, such as heads, in each of which m / batch rows meet columns of their own.
        groups: of a convolution, in each of which m rows meet n / groups columns.
        spatial: axes that a convolution slides along; 0 for every other kernel.
    """

    form: str
    read: float
    written: float
    weights: float
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    batch: float = 1.0
    groups: float = 1.0
    spatial: int = 0

    @property
    def macs(self) -> float:
        """Multiply-adds that the kernel does, those of padding among them."""
        return self.m * self.n * self.k

    def scaled(self, factor: float) -> Work:
        """The same kernel on `factor` times the batch, or the area: what is read and written grows, weights do not."""
        batch = self.batch * factor if self.batch > 1 else self.batch
        return replace(self, read=self.read * factor, written=self.written * factor, m=self.m * factor, batch=batch)


def work_of(layer: Layer, macs: int | None = None) -> Work:
    """The work of a kernel whose sizes are known.

    Args:
        layer: the kernel, at fixed shapes.
        macs: multiply-adds of its nodes where they are known; used where its tensors do not tell.
    """
    written = _bytes(layer.outputs)
    most = max(map(_size, layer.outputs), default=0.0)
    gathers = "Gath" in layer.name
    weights = sum(min(_size(t), most) if gathers else _size(t) for t in layer.constants)
    read = _bytes(_distinct(layer.inputs))
    plain = Work(form=POINTWISE, read=read, written=written, weights=weights)
    if not layer.outputs:
        return plain
    if "_gemm_mha" in layer.name:
        return _attention(layer, plain, macs)
    named = layer.name if layer.name.startswith("__myl") else ""  # other names are those of nodes
    if _CONVOLUTION.search(layer.kind) or _CONVOLVED.search(named):
        found = _convolution(layer, plain, transposed=bool(_TRANSPOSED.search(layer.kind + named)))
    elif "gemm" in layer.kind.lower() or _MULTIPLIED.search(named) or macs:
        found = _product(layer, plain)
    else:
        found = None
    return found or (_counted(layer, plain, macs) if macs else plain)


def _convolution(layer: Layer, plain: Work, *, transposed: bool) -> Work | None:
    """A convolution whose weights are among what it reads; None where they are not told."""
    out = layer.outputs[0]
    stored, given = ([t for t in ts if len(t.shape) == len(out.shape) > 2] for ts in (layer.constants, layer.inputs))
    channels = max(out.shape[1], 1) if len(out.shape) > 1 else 1
    fitting = [t for t in stored or given[1:] if transposed or t.shape[0] == channels < math.prod(t.shape)]
    weight = max(fitting, key=_elements, default=None)
    if weight is None or not given:
        return None
    source = given[0]
    per_group = weight.shape[1]
    window = math.prod(weight.shape[2:])
    m = _elements(out) / channels
    if transposed:
        groups = channels / max(per_group, 1)
        k = _elements(source) * per_group * window / max(m * channels, 1)
    else:
        groups = source.shape[1] / max(per_group, 1)
        k = float(per_group * window)
    one = 1 if BITS[weight.dtype] > 8 else 4  # 8-bit depthwise weights are padded to four channels
    form = PRODUCT if groups <= 1 else DEPTHWISE if per_group <= one else GROUPED
    found = replace(plain, form=form, m=m, n=float(channels), k=k, groups=max(groups, 1.0))
    return replace(found, spatial=len(out.shape) - 2)


def _product(layer: Layer, plain: Work) -> Work | None:
    """A matrix product of activations with weights, or of two activations; None where its operands are not told."""
    out = layer.outputs[0]
    matrices = [t for t in layer.constants if sum(d > 1 for d in t.shape) > 1]
    activations = sorted((t for t in layer.inputs if _elements(t) > 1), key=_elements, reverse=True)
    if matrices and activations:
        weight = max(matrices, key=_elements)
        for source in activations:
            inner = math.sqrt(_elements(source) * _elements(weight) / _elements(out))
            if _divides(inner, source) and _divides(inner, weight):
                n = _elements(weight) / inner
                return replace(plain, form=PRODUCT, m=_elements(out) / n, n=n, k=inner)
        return None
    if len(activations) < 2 or len(out.shape) < 2:
        return None
    a, b = activations[:2]
    for batch in dict.fromkeys((math.prod(out.shape[:-2]), 1)):
        inner = math.sqrt(_elements(a) * _elements(b) / _elements(out) / batch)
        if _divides(inner, a) and _divides(inner, b):
            n = float(out.shape[-1])
            return replace(plain, form=PRODUCT, m=_elements(out) / n, n=n, k=inner, batch=float(batch))
    return None


def _divides(inner: float, tensor: KernelTensor) -> bool:
    """Whether a tensor has an axis of this length, or axes of that product."""
    whole = round(inner)
    sizes = {
        math.prod(tensor.shape[i:j]) for i in range(len(tensor.shape)) for j in range(i + 1, len(tensor.shape) + 1)
    }
    return abs(inner - whole) < 1e-6 * inner and whole in sizes


def _attention(layer: Layer, plain: Work, macs: int | None) -> Work:
    """Two products in one kernel: n is the head's size, k twice the length of keys."""
    out = layer.outputs[0]
    batch, head = math.prod(out.shape[:-2]), max(out.shape[-1], 1)
    m = _elements(out) / head
    operands = [t for t in layer.inputs if len(t.shape) == len(out.shape) and t.dtype not in ("bool", "int32", "int64")]
    lengths = [_elements(t) / (batch * head) for t in operands]
    k = 2 * max(lengths) if len(lengths) > 2 else (macs or 0) / max(m * head, 1)
    return replace(plain, form=ATTENTION, m=m, n=float(head), k=k, batch=float(max(batch, 1)))


def _counted(layer: Layer, plain: Work, macs: int) -> Work:
    """A product that only the audit tells: channels are the last axis of its output, or axis 1 of a convolution's."""
    out = layer.outputs[0]
    axis = 1 if _CONVOLUTION.search(layer.kind) and len(out.shape) > 2 else -1
    n = max(out.shape[axis], 1) if out.shape else 1
    m = _elements(out) / n
    return replace(plain, form=PRODUCT, m=m, n=float(n), k=macs / (m * n))


def _distinct(tensors: Sequence[KernelTensor]) -> list[KernelTensor]:
    """Tensors without one that stands twice: a kernel reads it once."""
    return list({(t.name or i, t.dtype, t.shape): t for i, t in enumerate(tensors)}.values())


def _bytes(tensors: Sequence[KernelTensor]) -> float:
    return sum(map(_size, tensors))


def _size(tensor: KernelTensor) -> float:
    return float(tensor.nbytes or 0)


def _elements(tensor: KernelTensor) -> int:
    return math.prod(max(d, 1) for d in tensor.shape)
