"""Forms of one model as they were timed on a GPU, beside what was predicted of them: what reports and lines hold.

kernels of the profiler, layer table, predicted kernels -> pairs; forms -> `Timings`, rows, a JSON line each.
Must not time anything, nor choose.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from engines.backends.layers import SYNCHRONIZATION, LayerTable
from engines.core.documents import Document, Part
from engines.timing.timer import KernelTime
from qdq.build.cost import Kernel
from qdq.build.pricing.pricer import signature

WORST = 10  # kernels of a form that are kept: those whose prediction is furthest off, in microseconds


class TimedKernel(Part, frozen=True, kw_only=True):
    """A kernel that was predicted and measured, or kernels of the same nodes: by the profiler, one at a time."""

    kernel: str
    predicted_us: float
    measured_us: float

    @property
    def off_us(self) -> float:
        """How far the prediction is off."""
        return abs(self.measured_us - self.predicted_us)


class TimedForm(Document, frozen=True, kw_only=True):
    """One form of a model: built, run, or left out, with what is needed to read the line alone.

    Attributes:
        model: sha256 of the float model as it is prepared.
        gpu, target: that it ran on, by the driver's name.
        compiler, version: that built it.
        name: like 'FP16', 'INT8 everywhere', 'INT8, choice 1', 'as built'.
        operands: what quantized nodes hold and read.
        quantized_nodes: how many.
        unquantized_type: of what is not quantized.
        predicted_us: microseconds; None where it is predicted not to compile.
        measured_us: median microseconds of one inference at the usual shapes; None where it was left out.
        spread_us: distance of the quartiles.
        intervals: how many were timed.
        graph: whether a captured graph was replayed; else kernels were launched one by one.
        why: why it was left out; '' where it was not.
        kernels: the worst predicted, the worst first.
        unpaired: kernels of the profiler that no prediction is of.
    """

    FORMAT: ClassVar[str] = "qdq.timed/1"
    MAKE: ClassVar[str] = "qdq deploy --judge measured"

    model: str
    gpu: str
    target: str
    compiler: str
    version: str
    name: str
    operands: str
    quantized_nodes: int
    unquantized_type: str
    predicted_us: float | None
    measured_us: float | None = None
    spread_us: float | None = None
    intervals: int = 0
    graph: bool = True
    why: str = ""
    kernels: tuple[TimedKernel, ...] = ()
    unpaired: int = 0

    @property
    def line(self) -> str:
        """All of it as one line of JSON."""
        return json.dumps(self.to_mapping(), ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        """Like 'FP16 102.3 us (predicted 95.0)'."""
        predicted = "not to compile" if self.predicted_us is None else f"{self.predicted_us:.1f}"
        return f"{self.name} {self.measured_us or 0.0:.1f} us (predicted {predicted})"


class Timings(Document, frozen=True, kw_only=True):
    """The forms of a model that were built for one GPU, and which of them was taken.

    Attributes:
        least_gain: share of the float form's time that a quantized one must gain, beyond the spread of both.
        together: whether they took turns; else each ran alone, because they do not fit on the GPU together.
        chosen: name of the form that was taken.
        unquantized: name of the fastest with nothing quantized; '' where none ran.
        forms: in the order in which they were built.
    """

    FORMAT: ClassVar[str] = "qdq.timings/1"
    MAKE: ClassVar[str] = "qdq tune --judge measured"

    least_gain: float
    together: bool
    chosen: str
    unquantized: str
    forms: tuple[TimedForm, ...]

    def form(self, name: str) -> TimedForm:
        """The form of that name."""
        return next(form for form in self.forms if form.name == name)

    @property
    def shipped(self) -> TimedForm:
        """The form that was taken, as it was built in the end where that was timed."""
        taken = self.form(self.chosen)
        last = self.forms[-1]
        same = last.name == AS_BUILT and last.quantized_nodes == taken.quantized_nodes
        return last if same and last.measured_us is not None else taken

    @property
    def label(self) -> str:
        """What the times are of."""
        return f"measured on {self.shipped.gpu} with {self.shipped.compiler} {self.shipped.version}"

    @property
    def gain(self) -> str:
        """What was taken, beside every other form that ran."""
        form = self.shipped
        first = f"{form.measured_us or 0.0:.1f} us (quartiles {form.spread_us or 0.0:.1f} apart), {self.chosen}"
        others = [
            f"{(form.measured_us or 0.0) / other.measured_us:.2f} of {other.name} ({other.measured_us:.1f})"
            for other in self.forms
            if other.measured_us and other.name not in (form.name, self.chosen)
        ]
        predicted = "" if form.predicted_us is None else f"; predicted {form.predicted_us:.1f} us"
        return ", ".join([first, *others]) + predicted

    @property
    def left_out(self) -> list[str]:
        """A sentence for each form that was left out."""
        return [f"{form.name} was left out: {form.why}" for form in self.forms if form.why]


AS_BUILT = "as built"  # the calibrated model that is shipped


def paired(
    seen: Iterable[KernelTime], table: LayerTable, predicted: Sequence[Kernel]
) -> tuple[tuple[TimedKernel, ...], int]:
    """The kernels of an engine, predicted and measured, and how many measured ones no prediction is of.

    Kernels of the same signature are compared, where the table is of the compiler that times are predicted of. What is
    left is compared by its ONNX nodes: kernels that share some, directly or through others, together.

    Args:
        seen: of the profiler, by the names of the table.
        table: of the engine.
        predicted: of the same model.
    """
    measured: dict[str, float] = defaultdict(float)
    for kernel in seen:
        measured[kernel.name] += kernel.us
    known = {layer.name: layer for layer in table.layers}
    signed = {layer.name: signature(layer) for layer in table.layers if layer.kind not in SYNCHRONIZATION}
    own: dict[str, float] = defaultdict(float)
    for each in predicted:
        own[each.signature] += each.us
    pairs, rest, used = list[TimedKernel](), list[str](), set[str]()
    groups: dict[str, list[str]] = defaultdict(list)
    for name in measured:
        groups[signed.get(name, "")].append(name)
    for text, names in groups.items():
        if text in own:
            used.add(text)
            pairs.append(_pair(names, own[text], measured))
        else:
            rest += names
    free = [each for each in predicted if each.signature not in used]
    nodes = {name: known[name].onnx_nodes for name in rest if name in known}
    left = len(rest)
    for names, kernels in _components(nodes, free):
        pairs.append(_pair(names, sum(k.us for k in kernels), measured))
        left -= len(names)
    return tuple(sorted(pairs, key=lambda p: -p.off_us)), left


def _pair(names: Sequence[str], predicted_us: float, measured: Mapping[str, float]) -> TimedKernel:
    first = max(names, key=lambda name: measured[name])
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    us = sum(measured[name] for name in names)
    return TimedKernel(kernel=f"{first}{more}", predicted_us=predicted_us, measured_us=us)


def _components(
    nodes: Mapping[str, Sequence[str]], predicted: Iterable[Kernel]
) -> list[tuple[list[str], list[Kernel]]]:
    """Measured names and predicted kernels that share ONNX nodes, directly or through others; both sides at least."""
    root: dict[str, str] = {}

    def find(node: str) -> str:
        while root.setdefault(node, node) != node:
            node = root[node]
        return node

    some = [kernel for kernel in predicted if kernel.nodes]
    for group in (*nodes.values(), *(kernel.nodes for kernel in some)):
        for node in group[1:]:
            root[find(node)] = find(group[0])
    found: dict[str, tuple[list[str], list[Kernel]]] = defaultdict(lambda: ([], []))
    for name, group in nodes.items():
        if group:
            found[find(group[0])][0].append(name)
    for kernel in some:
        found[find(kernel.nodes[0])][1].append(kernel)
    return [both for both in found.values() if all(both)]
