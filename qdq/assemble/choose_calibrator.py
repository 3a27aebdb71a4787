"""`--calibrator auto`: the calibrator of each tensor by the error it causes where the tensor is read.

table -> candidate parameters per tensor -> float model with the error of each candidate sent through its consumers,
summed in the graph -> best method per tensor -> whole models: this mixture, and each method alone, all compared as they
would be shipped. With weights rounded to nearest they would compare otherwise: where the ranges matter little, what is
left is how the rounding of the weights turns out with them. This module must not see samples other than those of the
calibration.

It cannot tell how a candidate does beyond the ranges of these samples: the simpler choice stays unless another is
clearly better (`clearly_less`). Simplest is the default for all tensors, then another method for all, then a mixture,
which must also win sample by sample. Fitted closer still, by the error of each tensor at the outputs, mixtures gained
0.6 dB on crops of four images and lost 2.4 dB on crops of a fifth (a 20-layer residual network).
Equalization takes headroom from channels that were small so far: it is done only where it also beats the default
calibrator (without that rule a molecular potential gained 2 dB on its calibration samples and lost 5 dB on others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.core.documents import replace
from qdq.assemble.held_out import HeldOutScore, Split, clearly_less, decibels, ranked
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.core.resources import given_bytes
from qdq.measure import second_moments
from qdq.measure.calibrators import CALIBRATORS
from qdq.measure.inference.memory import at_once
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED
from qdq.passes.rewrites.edit import altered
from qdq.plan.plan import Plan
from qdq.solve.activations import activation_params, tie_notes
from qdq.solve.solve import Solution, solve

METHODS = tuple(sorted(CALIBRATORS, key=lambda name: (CALIBRATORS[name].order, name)))
MARGIN_DB = 0.25  # by which another must beat a simpler one: on samples that the ranges were made from, less is chance
# Standard errors over the samples: a mixture is made of many choices on the same samples, a method of one. Where a few
# samples hold most of the noise no method is certain, and the one with the least is still the best guess.
CERTAIN_METHOD, CERTAIN_MIXTURE = 0.0, 3.0
PICKED_ON = 16  # samples that a tensor's error is summed over, at most
JUDGED_ON = 512  # samples that models are compared on, at most: a few bad samples decide an SQNR

Params = Mapping[str, QParams]
Complete = Callable[[Solution], tuple[Solution, Model]]


def solve_auto(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    *,
    samples: Iterable[Sample],
    complete: Complete,
    on_progress: Progress | None = None,
) -> tuple[Solution, Model]:
    """The solution of the mixture of calibrators, or of one for all tensors, whichever keeps the outputs best.

    Args:
        model: the prepared float model; the plan's settings hold all but the calibrator.
        table: histograms of the plan's activation tensors.
        samples: re-iterable calibration samples.
        complete: makes the model that a solution would be shipped as, and adds its notes.

    Returns:
        The best solution and what `complete` made of it; its notes begin with what was picked and why.

    Raises:
        StaleFileError, InputError: see `solve`.
    """
    params = {m: activation_params(model, plan, table, dict.fromkeys(table.tensors, m)) for m in METHODS}
    if not plan.activations:
        return complete(solve(model, plan, table, samples=samples, params={}, on_progress=on_progress))
    order, few = ranked(samples), second_moments.few(samples)
    judged = Split(samples=samples, fit=order[:PICKED_ON], held=frozenset(order[:JUDGED_ON]))
    mixture = pick(model, plan, params, judged, on_progress=on_progress)
    methods: dict[str, Mapping[str, str]] = {m: dict.fromkeys(mixture, m) for m in METHODS}
    if len(set(mixture.values())) > 1:
        methods["mixed"] = mixture
    tried: dict[str, Params] = {}
    made: dict[str, tuple[Solution, Model]] = {}  # of `tried`, all or, where there is a budget to keep, none

    def built(chosen: Params) -> Solution:
        return solve(model, plan, table, samples=few, params=chosen, on_progress=on_progress)

    def candidates() -> Iterator[Model]:
        known: set[tuple[tuple[str, float, int], ...]] = set()
        bets: frozenset[str] | None = None  # tensors that are equalized beside the default calibrator
        for name, by_tensor in list(methods.items()):
            chosen: Params = {t: params[m][t] for t, m in by_tensor.items()}
            what = tuple((t, float(p.scale), p.zero_point) for t, p in chosen.items())
            if what in known:  # as always where a format has one range for all calibrators
                continue
            known.add(what)
            solution = built(chosen)
            bets = frozenset(solution.divisors) if bets is None else bets
            if odd := chosen.keys() & (solution.divisors.keys() - bets):
                chosen = {**chosen, **{t: params[METHODS[0]][t] for t in odd}}
                methods[name] = {**by_tensor, **dict.fromkeys(odd, METHODS[0])}
                solution = built(chosen)
            tried[name] = chosen
            whole = complete(solution)
            if given_bytes() is None:
                made[name] = whole
            yield whole[1]
            del solution, whole  # before the next are made

    signals, noises = HeldOutScore(model, judged).energies(candidates())
    noise = dict(zip(tried, noises, strict=True))
    best = _best(noise)
    taken = list(methods[best].values())
    counts = ", ".join(f"{taken.count(m)} {m}" for m in METHODS if m in taken)
    listed = ", ".join(f"{name} {decibels(signals, noise[name]):.1f}" for name in tried)
    note = (
        f"calibrator auto took {best} ({counts} of {len(mixture)} tensors): output SQNR in dB on {len(judged.held)} "
        f"calibration samples: {listed}"
    )
    solution, found = made[best] if best in made else complete(built(tried[best]))
    return replace(solution, notes=(note, *tie_notes(plan, table), *solution.notes)), found


def _best(noise: Mapping[str, Sequence[float]]) -> str:
    """The candidate with the least noise of those that clearly beat the simpler ones; noise by candidate and sample."""
    best = METHODS[0]
    for names, certainty in ((METHODS[1:], CERTAIN_METHOD), (("mixed",), CERTAIN_MIXTURE)):
        found = [name for name in names if name in noise]
        better = [n for n in found if clearly_less(noise[n], noise[best], least_db=MARGIN_DB, certainty=certainty)]
        best = min(better, key=lambda name: math.fsum(noise[name]), default=best)
    return best


def pick(
    model: Model,
    plan: Plan,
    params: Mapping[str, Mapping[str, QParams]],
    held: Split,
    *,
    on_progress: Progress | None = None,
) -> dict[str, str]:
    """The method per activation tensor with the least error at its consumers' outputs.

    The error of a consumer is |W (x - x')|^2 / |W x|^2 over the samples to fit, x' the quantized x, W its float weight;
    errors of several consumers add up. Tied tensors share one method, the one with the least sum; of equal errors the
    method named first in METHODS. `params` are method -> tensor -> parameters.
    """
    probe = _Probe(model)
    wanted: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (tensor, method) -> (error, signal) outputs
    points = [point for point in plan.activations if point.tensor not in model.inner_tensors]  # others: the first
    for point in points:
        readers = [model.node(n) for n, i in point.uses if i == 0 and model.node(n).op_type in WEIGHTED]
        signals = [probe.energy(node, point.tensor) for node in readers]
        for method in METHODS:
            error = probe.error(point.tensor, params[method][point.tensor])
            energies = [probe.energy(node, error) for node in readers]
            wanted[point.tensor, method] = list(zip(energies, signals, strict=True))
    session = Session(probe.model(), probe.outputs, threads=1, in_order=True)
    threads = at_once(model, held.fitting(), copies=2)
    sums: dict[str, float] = dict.fromkeys(probe.outputs, 0.0)
    for done, values in enumerate(overlapped(session, held.fitting(), threads), 1):
        for name, value in values.items():
            sums[name] += float(value)
        if on_progress is not None:
            on_progress(done, len(held.fit), "comparing calibrators")
    groups: dict[str, list[str]] = {}
    for point in points:
        groups.setdefault(point.tie or point.tensor, []).append(point.tensor)
    chosen = dict.fromkeys((point.tensor for point in plan.activations), METHODS[0])
    for tensors in groups.values():
        errors = {
            m: sum(sums[e] / max(sums[s], 1e-30) for tensor in tensors for e, s in wanted[tensor, m]) for m in METHODS
        }
        chosen.update(dict.fromkeys(tensors, min(METHODS, key=errors.__getitem__)))
    return chosen


class _Probe:
    """The float model with nodes that compute errors and energies, each made once."""

    def __init__(self, model: Model) -> None:
        self._base = model
        self._proto = ModelProto()
        self._proto.CopyFrom(model.proto)
        self._made: dict[tuple[object, ...], str] = {}

    @property
    def outputs(self) -> list[str]:
        """The energies."""
        return [name for key, name in self._made.items() if key[0] == "energy"]

    def model(self) -> Model:
        """The model so far."""
        return self._base.replace(self._proto)

    def error(self, tensor: str, params: QParams) -> str:
        """The tensor less itself quantized and dequantized."""
        key = ("error", tensor, float(params.scale), params.zero_point)
        if key not in self._made:
            scale = self._constant(np.asarray(params.scale).astype(self._base.dtype(tensor)))
            zero = self._constant(np.asarray(params.zero_point, dtype=FORMATS[params.format].dtype))
            codes = self._add("QuantizeLinear", tensor, scale, zero)
            self._made[key] = self._add("Sub", tensor, self._add("DequantizeLinear", codes, scale, zero))
        return self._made[key]

    def energy(self, node: NodeProto, tensor: str) -> str:
        """Sum of the squares of what a weighted node makes of a tensor in place of its data operand, without bias."""
        key = ("energy", node.name, tensor)
        if key not in self._made:
            copy = altered(node)
            copy.input[:] = [tensor, node.input[1]]
            copy.name = copy.output[0] = self._name()
            self._proto.graph.node.append(copy)
            wide = self._add("Cast", copy.output[0], to=TensorProto.FLOAT)  # squares would overflow float16
            self._made[key] = self._add("ReduceSumSquare", wide, keepdims=0)
        return self._made[key]

    def _name(self) -> str:
        return f"qdq_probe_{len(self._proto.graph.node)}_{len(self._proto.graph.initializer)}"

    def _add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = self._name()
        self._proto.graph.node.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def _constant(self, values: np.ndarray) -> str:
        name = self._name()
        self._proto.graph.initializer.append(numpy_helper.from_array(values, name))
        return name
