"""What TensorRT makes of a network, derived from the kernels that TensorRT-RTX makes of it in float.

Layers and kernels of a float engine (+ which products are in INT8) -> kernels of TensorRT's engine
Of a float network both compilers make much the same kernels; TensorRT writes concatenations and slices where they
belong, and its attention takes queries, keys and values as the products write them. In INT8 it fuses bias, activation,
shortcut and the next quantizer into the product, where TensorRT-RTX writes floats: products read and write half as much
as in float16, pointwise kernels between them three quarters, fused attention stays in float.
Must not be taken for measured: it is a derivation, held against published latencies by tools/bench_cost.py.
Source: ../shared/docs/cost.md sections 2 and 3.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

from engines.backends.layers import Layer
from engines.cost.kernel import Kernel
from engines.cost.work import ATTENTION, POINTWISE, Work

PRODUCT_SHARE, POINTWISE_SHARE = 0.5, 0.75  # of the bytes of float16
_PLACED = {"Conc", "Slic", "Resh", "Move"}  # what only moves values, in the names that the compiler gives its kernels
_NEAR = 5  # kernels before an attention that may be its transposes
_MEANS = {"Mean", "Sqrt"}


def tensorrt_kernels(
    layers: Sequence[Layer], kernels: Sequence[Kernel], *, quantized: Container[int] = ()
) -> list[tuple[int, Kernel]]:
    """The kernels of TensorRT's engine, each with the index of the layer that it comes from.

    Args:
        layers: of an engine that TensorRT-RTX compiled in float16 or float32; no synchronization among them.
        kernels: the work of each.
        quantized: indices of the products that are to run in INT8.
    """
    gone = {i for i, layer in enumerate(layers) if kernels[i].work.form == POINTWISE and _only_places(layer)}
    gone |= set(_transposes(layers, kernels))
    products = [i for i, k in enumerate(kernels) if k.work.form not in (POINTWISE, ATTENTION)]
    kept = ((i, kernel) for i, kernel in enumerate(kernels) if i not in gone)
    return [(i, _derived(i, kernel, products, quantized)) for i, kernel in kept]


def _derived(index: int, kernel: Kernel, products: Sequence[int], quantized: Container[int]) -> Kernel:
    """A kernel as it is where some products are in INT8."""
    work = kernel.work
    if index in quantized:
        lighter = _carrying(work, PRODUCT_SHARE)
        return Kernel(work=replace(lighter, weights=work.weights * PRODUCT_SHARE), dtype="int8")
    if work.form != POINTWISE:
        return kernel
    before = max((i for i in products if i < index), default=None)
    after = min((i for i in products if i > index), default=None)
    ends = [i for i in (before, after) if i is not None]
    between = bool(ends) and all(i in quantized for i in ends)
    return replace(kernel, work=_carrying(work, POINTWISE_SHARE)) if between else kernel


def _carrying(work: Work, share: float) -> Work:
    return replace(work, read=work.read * share, written=work.written * share)


def _words(layer: Layer) -> set[str]:
    """The operations in the name that the compiler gave a kernel ('__myl_AddReshTran_myl0_2'); none of other names."""
    found = re.fullmatch(r"__myl_(\w*?)(?:_myl\d+_\d+)?", layer.name)
    return set(re.findall(r"[A-Z][a-z0-9]*", found[1])) if found else set()


def _only_places(layer: Layer) -> bool:
    """Whether a kernel computes nothing: what reads or writes it can do so in place; a compiler's copy among them."""
    words = _words(layer)
    return bool(words) and words <= _PLACED


def _transposes(layers: Sequence[Layer], kernels: Sequence[Kernel]) -> Iterator[int]:
    """The pointwise kernels that bring queries, keys and values before a fused attention, and its result behind it."""
    for i in (i for i, kernel in enumerate(kernels) if kernel.work.form == ATTENTION):
        before = takewhile(lambda j: kernels[j].work.form == POINTWISE, range(i - 1, max(i - 1 - _NEAR, -1), -1))
        behind = [i + 1] if i + 1 < len(kernels) and kernels[i + 1].work.form == POINTWISE else []
        for j in (*before, *behind):
            if "Tran" in (words := _words(layers[j])) and not words & _MEANS:
                yield j
