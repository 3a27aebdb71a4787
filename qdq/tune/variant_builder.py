"""One way to write a float model for the compiler: exact rewrites, the nodes in INT8, the float type of the others.

prepared model + Variant -> float rewrites -> plan, restricted -> quick scales and codes -> Q/DQ -> rest -> rewrites
Which kernels are compiled does not depend on scales and codes, so quick ones stand for the calibrated ones: ranges of a
few samples (whether a tensor is shifted, or overflows FP16, does depend on ranges) and weights rounded to nearest.
It must not decide which variant is good.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.core.documents import replace
from qdq.assemble.held_out import comparable, decibels, energies, in_its_types
from qdq.assemble.insert import insert
from qdq.assemble.precision.convert import convert
from qdq.measure.collect import collect
from qdq.measure.histogram import Histogram
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable, widest
from qdq.model.model import Model
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES, applied, why_not_for
from qdq.passes.rewrites.edit import Rewrite
from qdq.plan import placement, tables
from qdq.plan.plan import Plan, Skip
from qdq.plan.rules import common as rules
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.solve import Solution, solve

TUNED = "tuned"  # the rule of the skips that `restricted` adds
KEPT = 8  # rewritten models in memory
MOST_LOSS_DB = 3.0  # more noise of a weight by one scale than by one per channel: as much as its input's adds anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Choices about one model; names that do not exist after its rewrites mean nothing.

    Attributes:
        rewrites: (rewrite, node) pairs; those of the quantized stage apply to nodes in `quantized` only.
        quantized: weighted nodes that are quantized.
        per_tensor: nodes whose weight has one scale for all channels, if they are in `quantized`.
        unshifted: nodes whose input is not shifted, though its range is asymmetric: fewer codes, less to compute.
        float_shortcuts: shortcut operands, "node:index", that read the float tensor although a quantized one exists.
        unquantized_type: the float type of what is not quantized, if another than the builder's first.
    """

    rewrites: frozenset[tuple[str, str]] = frozenset()
    quantized: frozenset[str] = frozenset()
    per_tensor: frozenset[str] = frozenset()
    unshifted: frozenset[str] = frozenset()
    float_shortcuts: frozenset[str] = frozenset()
    unquantized_type: str = ""

    def with_rewrite(self, name: str, nodes: Iterable[str]) -> Variant:
        """The same and a rewrite on some nodes."""
        return replace(self, rewrites=self.rewrites | {(name, node) for node in nodes})

    def without_rewrite(self, name: str, nodes: Iterable[str]) -> Variant:
        """The same without a rewrite on some nodes."""
        return replace(self, rewrites=self.rewrites - {(name, node) for node in nodes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A model after float rewrites, and everything that may be quantized in it."""

    model: Model
    fired: tuple[Rewrite, ...]
    plan: Plan
    table: CalibrationTable
    solution: Solution


@dataclass(slots=True)
class VariantBuilder:
    """Writes variants of one model; what several of them share is made once.

    Attributes:
        model: prepared, in float.
        settings: of the plan; calibrator, rounding and equalization do not matter here.
        unquantized_types: of 'fp16', 'bf16' and 'fp32' those that what is not quantized may have; the first is the
            usual one.
        samples: a few, re-iterable, for the ranges; None assumes that every activation is asymmetric,
            the most expensive case.
    """

    model: Model
    settings: Settings
    unquantized_types: tuple[str, ...]
    samples: Sequence[Sample] | None = None
    _bases: dict[frozenset[tuple[str, str]], Base] = field(default_factory=dict)
    _models: dict[frozenset[tuple[str, str]], tuple[Model, tuple[Rewrite, ...]]] = field(default_factory=dict)
    _histograms: dict[str, Histogram] = field(default_factory=dict)
    _ranges: dict[str, float] = field(default_factory=dict)
    _noises: dict[Variant, float] = field(default_factory=dict)
    _fits: dict[tuple[str, frozenset[tuple[str, str]]], tuple[str, ...]] = field(default_factory=dict)
    _outputs: dict[str, np.ndarray] = field(default_factory=dict)
    _last: tuple[Variant, Model] | None = None
    _usual: Variant | None = None

    def __post_init__(self) -> None:
        """Refuse patterns that match nothing, and overrides that quantize nothing: after rewrites they may, now not.

        Raises:
            InputError: names the pattern.
        """
        rules.check_patterns(self.model, self.settings)
        if self.settings.overrides:
            placement.plan(self.model, self.settings)

    def base(self, variant: Variant) -> Base:
        """The float part of a variant."""
        key = _float_part(variant).rewrites
        if key not in self._bases:
            model, fired = self._rewritten(key)
            placed = placement.placed(model, placement.carried(self.settings, self.model, model))
            full = replace(placed, settings=self.settings)
            table = self._table(model, full)
            solution = solve(model, _quick(full), table)
            self._bases[key] = Base(model=model, fired=fired, plan=full, table=table, solution=solution)
        return self._bases[key]

    def _rewritten(self, pairs: frozenset[tuple[str, str]]) -> tuple[Model, tuple[Rewrite, ...]]:
        """The model after float rewrites; what it was before the last of them is kept, for others to start from."""
        last = next((name for name in reversed(list(FLOAT_REWRITES)) if any(name == other for other, _ in pairs)), None)
        if last is None:
            return self.model, ()
        if pairs not in self._models:
            own = {pair for pair in pairs if pair[0] == last}
            before, done = self._rewritten(pairs - own)
            model, fired = applied(before, own)
            while len(self._models) >= KEPT:
                self._models.pop(next(iter(self._models)))
            self._models[pairs] = model, (*done, *fired)
        return self._models[pairs]

    @property
    def usual(self) -> Variant:
        """Nothing but the rewrites that every plan has."""
        if self._usual is None:
            _, fired = applied(self.model, placement.usual(self.model, self.settings))
            self._usual = Variant(rewrites=frozenset((r.name, node) for r in fired for node in r.nodes))
        return self._usual

    def quantizable(self, variant: Variant) -> tuple[str, ...]:
        """The weighted nodes that the rules would quantize after the variant's rewrites."""
        return self.base(variant).plan.quantized_nodes

    def fit_for_one_scale(self, variant: Variant) -> tuple[str, ...]:
        """The quantizable nodes whose weight may have one scale: its noise grows by `MOST_LOSS_DB` at most."""
        base = self.base(variant)
        spread: dict[str, float] = {}
        for point in base.plan.weights:
            if point.spec.axis is not None and point.spec.block is None:
                scale = base.solution.weights[point.tensor, point.spec.axis].params.scale.astype(np.float64)
                loss = 10 * np.log10(scale.max() ** 2 / np.mean(scale**2))
                spread |= {node: max(spread.get(node, 0.0), float(loss)) for node, _ in point.uses}
        return tuple(node for node, loss in spread.items() if loss <= MOST_LOSS_DB)

    def asymmetric(self, variant: Variant) -> tuple[str, ...]:
        """The quantizable nodes whose input is shifted."""
        base = self.base(variant)
        shifted = [p for p in base.plan.activations if base.solution.activations[p.tensor].zero_point]
        return tuple(dict.fromkeys(node for p in shifted for node, index in p.uses if index == 0))

    def shortcuts(self, variant: Variant) -> tuple[str, ...]:
        """The shortcut operands that the rules would quantize beside the nodes that a variant quantizes."""
        base = self.base(variant)
        stay = placement.remaining(base.model, base.plan, variant.quantized)
        return tuple(operand for operand in _shortcuts(base.plan) if operand in stay)

    def shared(self, variant: Variant) -> frozenset[str]:
        """The nodes without weights that read codes in a variant: those of its shortcuts."""
        base = self.base(variant)
        return frozenset(c.rpartition(":")[0] for c in _shortcuts(restricted(base.model, base.plan, variant, "")))

    def model_of(self, variant: Variant) -> Model:
        """The whole model as it would be compiled, with quick scales and codes."""
        return self._finished(variant)[0]

    def noise(self, variant: Variant) -> float | None:
        """Noise over signal of all outputs, with quick scales and codes; None without samples or numbers.

        sum (y - float y)^2 / sum (float y)^2 of the first sample, with float32 elsewhere. Calibration, second
        moments and bias correction do better than this.
        """
        outputs = comparable(self.model)
        if not self.samples or not outputs:
            return None
        key = replace(_float_part(variant), unquantized_type="")
        if key not in self._noises:
            base = self.base(variant)
            plan = restricted(base.model, base.plan, variant, "")
            session = Session(insert(base.model, plan, solve(base.model, _quick(plan), base.table)), outputs)
            signal, noise = energies(self._expected(outputs), session(self.samples[0]))
            self._noises[key] = noise / max(signal, 1e-300) if math.isfinite(noise) else math.inf
        return self._noises[key]

    def rounding_db(self, variant: Variant) -> float | None:
        """SQNR of all outputs, in dB, of the whole model computed in its float types; None without samples or numbers.

        Of the first sample; infinite where nothing is rounded.
        """
        outputs = comparable(self.model)
        if not self.samples or not outputs:
            return None
        found = in_its_types(self.model_of(variant), outputs)(self.samples[0])
        signal, noise = energies(self._expected(outputs), found)
        return decibels([signal], [noise])

    def _expected(self, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Outputs of the float model of the first sample."""
        assert self.samples
        if not self._outputs:
            self._outputs = dict(Session(self.model, outputs)(self.samples[0]))
        return self._outputs

    def fits(self, name: str, variant: Variant) -> tuple[str, ...]:
        """The nodes that a rewrite would fire on, had it all it could; none where it is not for the compiler."""
        if why_not_for(name, self.settings.profile):
            return ()
        if name in FLOAT_REWRITES:
            rewrites = frozenset(pair for pair in _float_part(variant).rewrites if pair[0] != name)
            if (name, rewrites) not in self._fits:
                model = self.base(replace(variant, rewrites=rewrites)).model
                self._fits[name, rewrites] = FLOAT_REWRITES[name](model).fired
            return self._fits[name, rewrites]
        return QUANTIZED_REWRITES[name](self._typed(variant)).fired

    def plan_of(self, variant: Variant, why: str) -> Plan:
        """The plan of a variant; `why` is the reason of every node that the rules would quantize and it does not."""
        base = self.base(variant)
        plan = restricted(base.model, base.plan, variant, why)
        rewrites = (*base.fired, *self._finished(variant)[1])
        return replace(plan, rewrites=rewrites, unquantized_type=variant.unquantized_type or self.unquantized_types[0])

    def _finished(self, variant: Variant) -> tuple[Model, tuple[Rewrite, ...]]:
        """The whole model, and the rewrites of the quantized stage that fired."""
        wanted = ((name, node) for name, node in variant.rewrites if node in variant.quantized)
        return applied(self._typed(variant), wanted, stage="quantized")

    def _typed(self, variant: Variant) -> Model:
        """The model before the rewrites of the quantized stage; the last one is kept, for several are tried on it."""
        key = _float_part(variant)
        if self._last is None or self._last[0] != key:
            base = self.base(variant)
            plan = restricted(base.model, base.plan, variant, "")
            model = insert(base.model, plan, _adapted(base, plan)) if plan.quantizes else base.model
            unquantized_type = variant.unquantized_type or self.unquantized_types[0]
            fused = bool(self.settings.profile.shift)
            converted = convert(
                model, unquantized_type=unquantized_type, split_biases=fused, table=base.table, fp32=plan.in_fp32
            )
            self._last = key, converted.model
        return self._last[1]

    def _table(self, model: Model, plan: Plan) -> CalibrationTable:
        names = list(dict.fromkeys(p.tensor for p in plan.activations))
        missing = [name for name in names if name not in self._histograms]
        if self.samples is None:
            assumed = Histogram.of(np.linspace(0, 1, 257, dtype=np.float32))
            self._histograms |= dict.fromkeys(missing, assumed)
        elif missing or not self._ranges.keys() >= {
            n for node in model.graph.node for n in node.output if _float(model, n)
        }:
            found = collect(model, plan, self.samples)
            self._histograms |= found.tensors
            self._ranges = widest([self._ranges, found.ranges])
        tensors = {name: self._histograms[name] for name in names}
        return CalibrationTable(
            model_sha256=model.sha256, samples_sha256="", count=0, tensors=tensors, ranges=self._ranges
        )


def _float(model: Model, tensor: str) -> bool:
    """Whether a tensor is known to be float32."""
    info = model.info(tensor)
    return info is not None and info.dtype == "float32"


def _float_part(variant: Variant) -> Variant:
    """The same without rewrites of the quantized stage."""
    return replace(variant, rewrites=frozenset(pair for pair in variant.rewrites if pair[0] in FLOAT_REWRITES))


def _shortcuts(plan: Plan) -> tuple[str, ...]:
    """What nodes without weights read; attention is asked for or not, and only whole it is one kernel."""
    weighted, points = set(plan.quantized_nodes), (p for p in plan.activations if p.rule != "attention")
    return tuple(c for p in points for c in p.consumers if c.rpartition(":")[0] not in weighted)


def _quick(plan: Plan) -> Plan:
    """The plan with settings that need no samples."""
    return replace(plan, settings=plan.settings.quick)


def _adapted(base: Base, plan: Plan) -> Solution:
    """Quick scales of a restricted plan: no codes are right, but there are as many scales, and zero points 0."""
    solution = base.solution
    activations, weights = dict(solution.activations), dict(solution.weights)
    for point in plan.points:
        if point.role == "activation" and not point.spec.shift:
            activations[point.tensor] = replace(activations[point.tensor], zero_point=0)
        elif point.role == "weight" and (point.tensor, point.spec.axis) not in weights:
            old = next(q for (tensor, _), q in weights.items() if tensor == point.tensor)
            one = replace(old.params, scale=np.asarray(old.params.scale.max()), axis=None)
            weights[point.tensor, point.spec.axis] = replace(old, params=one)
    return replace(solution, nodes=weighted_nodes(base.model, plan), activations=activations, weights=weights)


def restricted(model: Model, plan: Plan, variant: Variant, why: str) -> Plan:
    """A plan that quantizes no more than a variant does.

    Each weighted node that is left out gets a Skip of rule 'tuned' with the reason `why`; of the other nodes' operands
    stay those that `placement.remaining` says.
    """
    shortcuts = placement.remaining(model, plan, variant.quantized) - variant.float_shortcuts
    points = []
    for point in plan.points:
        kept = {name for name, _ in point.uses} & variant.quantized
        consumers = tuple(c for c in point.consumers if c.rpartition(":")[0] in kept or c in shortcuts)
        if not consumers:
            continue
        if point.role == "weight":
            spec = replace(point.spec, axis=None) if kept <= variant.per_tensor else point.spec
        else:
            spec = replace(point.spec, shift=False) if kept & variant.unshifted else point.spec
        points.append(replace(point, consumers=consumers, spec=spec))
    ties = Counter(point.tie for point in points)
    points = [replace(p, tie=None) if ties[p.tie] == 1 else p for p in points]
    skips = [
        Skip(node=node, op_type=model.node(node).op_type, rule=TUNED, reason=why)
        for node in plan.quantized_nodes
        if node not in variant.quantized
    ]
    return tables.kept(model, replace(plan, points=tuple(points), skips=(*plan.skips, *skips)))
