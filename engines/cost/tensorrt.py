"""What TensorRT makes of a network, derived from the kernels that TensorRT-RTX makes of it in float16.

Layers and kernels of a float engine -> `Regions`: which tensors are of one type (`Net`), and what each kernel does then
`Regions` + the products in INT8 -> the kernels of TensorRT's engine, quantizers of their own among them

Of a float network both compilers make much the same kernels; TensorRT writes concatenations and slices where they
belong, and its attention takes queries, keys and values as the products write them. In INT8 it fuses bias, activation,
shortcut and the next quantizer into the product, where TensorRT-RTX writes floats:

| a tensor that | is |
|---|---|
| INT8 products write and read, and nothing else | INT8: Q and DQ are in both kernels (2.1) |
| one float kernel reads, or is an output | float16; one Q kernel of its own serves its INT8 readers (2.2) |
| a float product writes, or is an input | the same (2.1: only an INT8 convolution takes a Q) |
| a pointwise kernel or fused attention writes | INT8 where all its readers want that: the kernel takes the Q |
| an INT8 product adds (a shortcut) | of the type that it writes: where that is float, behind a DQ kernel (2.1, 2.2) |
| a pool, Concat, Slice or another mover reads or writes | of one type on both sides (1.1, 2.1) |
| another pointwise kernel reads, writes | three quarters of float16, if the products at its ends are INT8 |

INT8 carries half of float16; fused attention stays in float. Not known, and assumed: that a pointwise kernel takes a Q,
and that a pool whose scales differ costs nothing. Each tensor and pointwise kernel is INT8 by an AND of products. What
that saves, and what Q kernels cost (an OR of readers, less the AND of the tensor), is submodular in the set of INT8
products, so the best set is a minimum cut (`qdq.tune.exact.cut`).
Must not be taken for measured: it is a derivation, held against published latencies by tools/bench_cost.py.
Source: ../shared/docs/cost.md sections 2 and 3; numbers in brackets, ../shared/docs/tensorrt_int8.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from engines.backends.layers import BITS, KernelTensor, Layer
from engines.cost.kernel import Kernel
from engines.cost.work import ATTENTION, POINTWISE, Work

_INT8_BITS = 8
_PLACED = {"Conc", "Slic", "Resh", "Move"}  # what only moves values, in the names that the compiler gives its kernels
_POOLS = ("maxpool", "avgpool")  # kinds of kernels that take INT8 as it comes
_NEAR = 5  # kernels before an attention that may be its transposes
_MEANS = {"Mean", "Sqrt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """Tensors that are of one type.

    Attributes:
        ends: products that must all be in INT8 for these tensors to be; None where nothing makes them INT8.
        writers: products that write one of them.
        movers: kernels that read and write them as they are, and are kernels of their own.
        adders: products that add one of them to their sum.
        read: bytes, elements and readers of each tensor that products multiply or add.
    """

    ends: frozenset[int] | None
    writers: tuple[int, ...]
    movers: tuple[int, ...]
    adders: frozenset[int]
    read: tuple[tuple[float, int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """A float engine as TensorRT would quantize it.

    Attributes:
        kernels: of the float engine, by index.
        gone: indices of those that TensorRT does not need.
        nets: groups of tensors.
        pointwise: kernel that computes without a product -> the products at its ends.
        shortcuts: product -> bytes of what it adds to its sum.
        share: INT8's of the bytes of the float type that most products have.
    """

    kernels: Sequence[Kernel]
    gone: frozenset[int]
    nets: tuple[Net, ...]
    pointwise: Mapping[int, frozenset[int]]
    shortcuts: Mapping[int, float]
    share: float

    @classmethod
    def of(cls, layers: Sequence[Layer], kernels: Sequence[Kernel], *, attention: bool = False) -> Regions:
        """What an engine's tensors and names tell.

        Args:
            layers: of an engine that TensorRT-RTX compiled in float16 or float32; no synchronization among them. A
                tensor is known by its name.
            kernels: the work of each.
            attention: fused attention reads INT8 too, as with Q and DQ before its products, or in a plugin.
        """
        gone = {i for i, layer in enumerate(layers) if kernels[i].work.form == POINTWISE and _only_places(layer)}
        gone |= set(_transposes(layers, kernels))
        flow = _Flow(layers, kernels, gone, attention)
        pointwise = {i: flow.products_at(i) for i in range(len(layers)) if flow.pointwise(i)}
        return cls(
            kernels=tuple(kernels),
            gone=frozenset(gone),
            nets=tuple(flow.net(names, pointwise) for names in flow.groups.values()),
            pointwise=pointwise,
            shortcuts=flow.shortcuts,
            share=_INT8_BITS / BITS[Counter(kernels[i].dtype for i in flow.products or (0,)).most_common(1)[0][0]],
        )

    def product(self, index: int, *, through: bool, apart: bool = False) -> Kernel:
        """A product in INT8; `through`: what it writes is INT8 too; `apart`: what it adds is float."""
        work, added = self.kernels[index].work, self.shortcuts.get(index, 0.0)
        read = (work.read - added) * self.share + added * (1.0 if apart else self.share)
        written = work.written * (self.share if through else 1.0)
        return Kernel(work=replace(work, read=read, written=written, weights=work.weights * self.share), dtype="int8")

    def dequantizer(self, index: int) -> Kernel:
        """The kernel before a product that adds INT8 values and writes float ones."""
        size = self.shortcuts[index]
        return Kernel(
            work=Work(form=POINTWISE, read=size * self.share, written=size, weights=0.0),
            dtype=self.kernels[index].dtype,
        )

    def mover(self, index: int) -> Kernel:
        """A kernel that moves INT8 values."""
        return self._carrying(index, self.share)

    def between(self, index: int) -> Kernel:
        """A pointwise kernel with INT8 on one side: of float16 it carries three quarters."""
        return self._carrying(index, (1 + self.share) / 2)

    def _carrying(self, index: int, share: float) -> Kernel:
        work = self.kernels[index].work
        return replace(self.kernels[index], work=replace(work, read=work.read * share, written=work.written * share))

    def ends(self, net: Net, apart: Container[int] = ()) -> frozenset[int] | None:
        """The products that must all be in INT8 for a net to be; None where nothing makes it so.

        Args:
            apart: products whose shortcut reads the float tensor: they write floats, as they are float readers of it.
        """
        held = {*net.adders, *(i for i in net.writers if i in self.shortcuts)}
        return None if any(i in apart for i in held) else net.ends

    def readers(self, net: Net, apart: Container[int] = ()) -> list[tuple[float, int, tuple[int, ...]]]:
        """Bytes, elements and INT8 readers of each tensor of a net that products read."""
        found = [
            (size, n, tuple(i for i in some if not (i in net.adders and i in apart))) for size, n, some in net.read
        ]
        return [(size, n, some) for size, n, some in found if some]

    def of_tensorrt(
        self, quantized: Container[int] = (), *, apart: Container[int] = ()
    ) -> list[tuple[int, Kernel, bool]]:
        """The kernels of TensorRT's engine where some products are in INT8.

        Args:
            quantized: indices of these products.
            apart: as of `ends`.

        Returns:
            The index of the layer that it comes from, the kernel, and whether that is one of a Q or DQ before it.
        """
        ends = [self.ends(net, apart) for net in self.nets]
        through = [some is not None and all(i in quantized for i in some) for some in ends]
        chosen = [net for net, passes in zip(self.nets, through, strict=True) if passes]
        written = {i for net in chosen for i in net.writers}
        moved = {i for net in chosen for i in net.movers}
        found = []
        for index, kernel in enumerate(self.kernels):
            if index in self.gone:
                continue
            if index in quantized:
                alone = index in apart and index in self.shortcuts
                if index in self.shortcuts and index not in written and not alone:
                    found.append((index, self.dequantizer(index), True))
                kernel = self.product(index, through=index in written, apart=alone)
            elif index in moved:
                kernel = self.mover(index)
            elif (between := self.pointwise.get(index)) and all(i in quantized for i in between):
                kernel = self.between(index)
            found.append((index, kernel, False))
        for net in (net for net, passes in zip(self.nets, through, strict=True) if not passes):
            for size, elements, readers in self.readers(net, apart):
                if wants := [i for i in readers if i in quantized]:
                    found.append((wants[0], quantizer(size, elements), True))
        return found


def quantizer(size: float, elements: int) -> Kernel:
    """A kernel that reads a tensor of so many bytes and writes it in INT8."""
    return Kernel(work=Work(form=POINTWISE, read=size, written=elements, weights=0.0), dtype="float16")


@dataclass(slots=True)
class _Flow:
    """Who writes and reads which tensor, and which tensors are of one type."""

    layers: Sequence[Layer]
    kernels: Sequence[Kernel]
    gone: Container[int]
    attention: bool
    shortcuts: dict[int, float] = field(default_factory=dict)
    _writers: dict[str, list[int]] = field(default_factory=dict)
    _readers: dict[str, list[int]] = field(default_factory=dict)
    _size: dict[str, float] = field(default_factory=dict)
    _parent: dict[str, str] = field(default_factory=dict)
    _multiplied: dict[int, str] = field(default_factory=dict)
    _added: dict[str, list[int]] = field(default_factory=dict)
    _aside: set[str] = field(default_factory=set)
    _groups: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            for tensors, ends in ((layer.outputs, self._writers), (layer.inputs, self._readers)):
                for t in tensors:
                    ends.setdefault(t.name, []).append(index)
                    self._size[t.name] = max(self._size.get(t.name, 0.0), float(t.nbytes or 0))
                    self._parent.setdefault(t.name, t.name)
        for index, layer in enumerate(self.layers):
            outputs = [t.name for t in layer.outputs]
            if self._moves(index):
                self._join([*outputs, *(t.name for t in layer.inputs)])
            elif self.kernels[index].work.form != POINTWISE:
                self._join(outputs)
            if self.multiplies(index):
                self._operands(index, layer)

    @property
    def products(self) -> list[int]:
        """The products that may be INT8."""
        return [i for i in range(len(self.kernels)) if self.multiplies(i)]

    def multiplies(self, index: int) -> bool:
        """Whether a kernel is a product that may be INT8."""
        return self.kernels[index].work.form not in (POINTWISE, ATTENTION)

    def pointwise(self, index: int) -> bool:
        """Whether a kernel computes, without a product."""
        return self.kernels[index].work.form == POINTWISE and not self._moves(index)

    def _moves(self, index: int) -> bool:
        """Whether a kernel gives the values that it reads, as they are or pooled."""
        return index in self.gone or (self.kernels[index].work.form == POINTWISE and self.layers[index].kind in _POOLS)

    def _operands(self, index: int, layer: Layer) -> None:
        """Which input a product multiplies (the one written last if several fit), and what it adds."""
        inputs = list({t.name: t for t in layer.inputs}.values())
        if not inputs or not layer.outputs:
            return
        work, size = self.kernels[index].work, _elements(layer.outputs[0])
        vectors = [t for t in inputs if work.m > 1 and _elements(t) <= work.k]
        alike = [t for t in inputs if _elements(t) == size]
        others = [t for t in inputs if t not in alike and t not in vectors]
        last = {t.name: max((w for w in self._writers.get(t.name, ()) if w < index), default=-1) for t in inputs}
        main = max(others or alike or inputs, key=lambda t: (_elements(t) if others else 0, last[t.name]))
        self._multiplied[index] = main.name
        for t in (t for t in inputs if t is not main):
            if t in alike:
                self._added.setdefault(t.name, []).append(index)
                self.shortcuts[index] = self.shortcuts.get(index, 0.0) + float(t.nbytes or 0)
            else:
                self._aside.add(t.name)

    def products_at(self, index: int) -> frozenset[int]:
        """The products that write what a pointwise kernel reads, or multiply what it writes."""
        layer, groups = self.layers[index], self.groups
        before, behind = ({self._root(t.name) for t in ends} for ends in (layer.inputs, layer.outputs))
        writing = (i for root in before for name in groups[root] for i in self._writers.get(name, ()))
        reading = (i for root in behind for name in groups[root] for i in self._readers.get(name, ()))
        return frozenset(i for i in (*writing, *reading) if self.multiplies(i))

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Tensors of one type together, by one of them."""
        if not self._groups:
            for name in self._parent:
                self._groups.setdefault(self._root(name), []).append(name)
        return self._groups

    def net(self, names: Sequence[str], pointwise: Mapping[int, frozenset[int]]) -> Net:
        """A group of tensors with its ends."""
        writers = {i for name in names for i in self._writers.get(name, ())}
        readers = {i for name in names for i in self._readers.get(name, ())}
        ends = {i for i in writers | readers if self.multiplies(i)}
        computing = [i for i in readers if i in pointwise]
        ends = ends.union(*(pointwise[i] for i in computing))
        pinned = (
            any(self.kernels[i].work.form == ATTENTION and not self.attention for i in readers)
            or any(not pointwise[i] for i in computing)
            or any(name not in self._readers or name not in self._writers or name in self._aside for name in names)
        )
        multiplied = {
            name: tuple(
                i
                for i in self._readers.get(name, ())
                if self._multiplied.get(i) == name or i in self._added.get(name, ())
            )
            for name in names
        }
        shapes = {t.name: _elements(t) for i in readers for t in self.layers[i].inputs}
        return Net(
            ends=None if pinned or not ends else frozenset(ends),
            writers=tuple(sorted(i for i in writers if self.multiplies(i))),
            movers=tuple(sorted(i for i in writers & readers if self._moves(i) and i not in self.gone)),
            adders=frozenset(i for name in names for i in self._added.get(name, ())),
            read=tuple((self._size[name], shapes[name], found) for name, found in multiplied.items() if found),
        )

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def _join(self, names: Iterable[str]) -> None:
        first, *others = (self._root(name) for name in names) if names else ("",)
        for other in others:
            self._parent[other] = first


def _elements(tensor: KernelTensor) -> int:
    return math.prod(max(size, 1) for size in tensor.shape)


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
