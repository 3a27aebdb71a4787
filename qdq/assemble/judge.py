"""Settings that say 'auto': each option is built and judged on samples that it was not fitted on.

samples -> parts that differ as much as possible -> in turn each part judges, and ranges, divisors and codes are made
from the others -> of each setting the option with the least noise at the outputs: the mean over the turns, in dB.

| setting | first option, kept unless another clearly beats it | others |
|---|---|---|
| calibrator | mse | ample, which may lose a little; max |
| shift | asymmetric codes, moved by a constant | symmetric codes |
| equalize | the scheme's formula, or none | its others |
| rounding | the scheme's rounding, not beaten in any turn by one of weights alone | its others, nearest at last |
| block | of each weight the one worth its bits | the shortest, for all |

One setting after the other, each with those before it decided: at most eight models are built per turn, all but those
of the last two with codes that need no second moments. The rounding of 8-bit weights decides little and takes long, so
it has one turn. Blocks come last, where nothing else can make up for what longer ones lose. What is fitted always gains
on what it has seen; a formula that trusts the ranges of molecules gained 6 dB so and lost 10 dB on others. Turns count
alike: a sum of energies would be that of the loudest samples, of which one turn holds most (EfficientNet-B0 lost 4 dB).

This module must not see samples other than those of the calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engines.core.documents import replace
from qdq.assemble.held_out import HeldOutScore, Split, comparable, decibels, ranked
from qdq.assemble.insert import insert
from qdq.assemble.leave_out import reached
from qdq.core.arrays import along_widest, part
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.measure.collect import collect
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.measure.second_moments import SampleSubset
from qdq.measure.table import CalibrationTable
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.methods import ROUNDINGS
from qdq.plan.plan import Plan, Point
from qdq.plan.settings import AUTO
from qdq.plan.weighted_node import WeightedNode, weighted_nodes
from qdq.solve.equalize import channels, weight_only
from qdq.solve.equalize.channels import Channels
from qdq.solve.shift import shifts
from qdq.solve.solve import solve

PARTS = 3  # with fewer samples as many as there are
MOST = 24  # samples looked at, over all parts
SKETCH = 4096  # values of an output that samples are compared by, at most
MARGIN_DB = 0.25  # by which another option must beat the first
LIMIT_DB = 100.0  # that one turn counts at most, where there is no noise or no number
# What balances data takes headroom from channels that were small so far: where it is not the first option it must gain
# this in every turn. Over all turns it gained 3 dB on a potential for molecules, by one of them, and lost 14 on others.
DARING = {"smoothquant": 1.0, "validated": 0.5}  # the second is validated tensor by tensor before
# The whole range costs resolution everywhere. Headroom where codes are to spare insures against what samples did not
# show: it may cost as much as this.
CAUTION = {"max": 0.5, "ample": -0.3}
WITHOUT_MOMENTS = "clip"


def judged(
    model: Model, plan: Plan, samples: Iterable[Sample] | None, *, on_progress: Progress | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with every 'auto' of `Settings.open` decided, and why, a sentence each.

    The model is prepared, the samples re-iterable. Where nothing can be compared the first options are taken.

    Raises:
        InputError: there are no samples in `samples`.
    """
    nodes = {name: node for name, node in weighted_nodes(model, plan).items() if not node.trained}
    options = {name: found for name in plan.settings.open if len(found := _options(model, plan, nodes, name)) > 1}
    order = () if samples is None or not options else ranked(samples)
    why = ""
    if samples is None:
        why = "only a table is given"
    elif is_large(model.graph.initializer):
        why = "a model of this size is not quantized several times to compare"
    elif not comparable(model):
        why = "no output holds numbers"
    elif len(order) < 2:
        why = "one calibration sample cannot judge what is made from it"
    if why or not options:
        plan = _decided(model, plan, {})
        taken = ", ".join(f"{name} {_said(getattr(plan.settings, name))}" for name in options)
        return plan, (f"{taken}: taken as the scheme has it, nothing compared: {why}",) if options else ()
    assert samples is not None
    trials = _Trials(
        model=model, plan=plan, samples=samples, order=_by_output(model, samples, order[:MOST]), on_progress=on_progress
    )
    chosen: dict[str, str | int] = {}
    notes = []
    for name, values in options.items():
        turns = 1 if name == "rounding" and not any(node.spec.block for node in nodes.values()) else trials.parts
        noises = trials.noises([{**chosen, name: value} for value in values], turns)
        noise = dict(zip(values, noises, strict=True))
        chosen[name] = _best(noise)
        if all(other == noises[0] for other in noises):  # nothing to say
            continue
        listed = ", ".join(
            f"{_said(v)} {_mean_db(trials.signals, noise[v]):.1f}{_why_not(noise, v, chosen[name])}" for v in values
        )
        often = f", the mean of {turns} turns" if turns > 1 else ""
        notes.append(
            f"{name}: took {_said(chosen[name])}; output SQNR in dB, fitted on a part of {len(trials.order)} "
            f"calibration samples and judged on the others{often}: {listed}"
        )
    return _decided(model, plan, chosen), tuple(notes)


def _by_output(model: Model, samples: Iterable[Sample], order: tuple[int, ...]) -> tuple[int, ...]:
    """The same samples sorted along the direction in which the outputs of the float model vary most.

    Cut into parts in this order, those that judge are of another kind than those fitted on (`along_widest`). Outputs
    whose size varies or is 0 keep the order.
    """
    session = Session(model, comparable(model), threads=1)
    chosen = set(order)
    found = {i: _sketch(session(sample)) for i, sample in enumerate(samples) if i in chosen}
    rows = [found[i] for i in order]
    if len({row.size for row in rows}) > 1 or not rows[0].size:
        return order
    values = np.array(rows)
    values = np.where(np.isfinite(values), values, 0)
    values -= values.mean(axis=0)
    values /= max(float(np.abs(values).max()), float(np.finfo(np.float64).tiny))
    return tuple(order[i] for i in along_widest(values))


def _sketch(outputs: Mapping[str, npt.NDArray[np.floating]]) -> npt.NDArray[np.float64]:
    """Some of the values of a sample's outputs, spread over each."""
    flat = [np.asarray(outputs[name], dtype=np.float64).reshape(-1) for name in sorted(outputs)]
    return np.concatenate([values[:: -(-values.size // SKETCH) or 1] for values in flat])


def unshifted(plan: Plan) -> Plan:
    """The plan without shifts, where its settings forbid them."""
    if plan.settings.shift:
        return plan
    points = (p if p.trained else replace(p, spec=replace(p.spec, shift=False)) for p in plan.points)
    return replace(plan, points=tuple(points))


def shortened(model: Model, plan: Plan, block: int) -> Plan:
    """The plan with this block, or the nearest that fits, for every weight that the rules gave its own; no edited one.

    Args:
        model: the one that the plan's points are of.
        plan: its settings leave blocks to the rules.
    """
    now, then = (
        {(p.role, p.tensor, p.spec.axis): p for p in placement.placed(model, settings).points}
        for settings in (plan.settings, replace(plan.settings, block=block))
    )

    def of(point: Point) -> Point:
        key = point.role, point.tensor, point.spec.axis
        mine = point.spec.block is not None and key in now and key in then and now[key].spec == point.spec
        return replace(point, spec=then[key].spec, reason=then[key].reason) if mine else point

    return replace(plan, points=tuple(map(of, plan.points)))


def _decided(model: Model, plan: Plan, chosen: Mapping[str, str | int]) -> Plan:
    """The plan with these settings, and the first option of those that are still open."""
    block = chosen.get("block")
    if isinstance(block, int):
        plan = shortened(model, plan, block)
    return unshifted(replace(plan, settings=replace(plan.settings, **chosen).settled))


def _said(value: str | int) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _options(model: Model, plan: Plan, nodes: Mapping[str, WeightedNode], name: str) -> tuple[str | int, ...]:
    """The options of a setting that differ for this model, the first of them first."""
    found = plan.settings.options(name)
    own = [point for point in plan.activations if not point.trained]
    if name == "calibrator":
        return found if any(FORMATS[point.spec.format].integer for point in own) else found[:1]
    if name == "shift":
        return found if any(shifts(model, point) for point in own) else found[:1]
    if name == "rounding":
        if not nodes:
            return found[:1]
        blocks = any(node.spec.block for node in nodes.values())
        return tuple(o for o in found if blocks or not ROUNDINGS[str(o)].for_blocks)
    if name == "block":
        return found if any((node.spec.block or 0) > int(found[1]) for node in nodes.values()) else found[:1]
    readers = channels.candidates(plan, nodes)
    return found if readers or weight_only.candidates(plan, nodes.values(), None, ()) else found[:1]


_Noise = Mapping[str | int, Sequence[Sequence[float]]]  # by option, turn and sample


def _best(noise: _Noise) -> str | int:
    """The option of least noise among the first that is left and those that win by their margin."""
    first, *others = _left(noise)
    rivals = (option for option in others if noise[option] != noise[first])
    better = [option for option in rivals if _won_db(noise, option, first) >= _margin_db(option)]
    return max(better, key=lambda option: math.fsum(_gains_db(noise, option, first)), default=first)


def _left(noise: _Noise) -> list[str | int]:
    """The options without roundings fitted to data that one of weights alone clearly beats in some turn.

    Data of that kind may come, and what is fitted to others fails them.
    """
    return [option for option in noise if _beaten_db(noise, option) < MARGIN_DB]


def _beaten_db(noise: _Noise, option: str | int) -> float:
    """By how much a rounding of weights alone beats one fitted to data in some turn; 0 for any other option."""
    fitted = {o for o in noise if o in ROUNDINGS and ROUNDINGS[str(o)].needs_moments}
    plain = [o for o in noise if o in ROUNDINGS and o not in fitted]
    if option not in fitted:
        return 0.0
    return max((max(_gains_db(noise, other, option)) for other in plain), default=0.0)


def _gains_db(noise: _Noise, option: str | int, other: str | int) -> list[float]:
    """By how much an option has less noise than another in each turn, within `LIMIT_DB`."""
    pairs = zip(noise[option], noise[other], strict=True)
    return [max(-LIMIT_DB, min(LIMIT_DB, _gain_db(after, before))) for after, before in pairs]


def _gain_db(after: Sequence[float], before: Sequence[float]) -> float:
    return 0.0 if math.fsum(after) == math.fsum(before) else decibels(before, after) if _finite(before) else math.inf


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _won_db(noise: _Noise, option: str | int, first: str | int) -> float:
    """What an option wins by: in its worst turn if it is daring, else in the mean of all."""
    gains = _gains_db(noise, option, first)
    return min(gains) if str(option) in DARING else math.fsum(gains) / len(gains)


def _why_not(noise: _Noise, option: str | int, taken: str | int) -> str:
    """Of an option that has less noise than the one taken, why it is not taken, in brackets."""
    if option == taken or math.fsum(gains := _gains_db(noise, option, taken)) <= 0:
        return ""
    if (beaten := _beaten_db(noise, option)) >= MARGIN_DB:
        return f" (not taken: a rounding that looks at weights alone is {beaten:.1f} dB better in a turn)"
    first = _left(noise)[0]
    if option == first:
        loss, most = math.fsum(gains) / len(gains), -_margin_db(taken)
        return f" (not taken: {_said(taken)} has more headroom and loses {loss:.1f} dB, of {most:g} that it may)"
    where = "in its worst turn" if str(option) in DARING else "in the mean"
    won = _won_db(noise, option, first)
    return f" (not taken: {won:+.1f} dB against {_said(first)} {where}, and {_margin_db(option):+g} is needed)"


def _margin_db(rival: str | int) -> float:
    """By how much a rival of the first option must win."""
    return (DARING | CAUTION).get(str(rival), MARGIN_DB)


def _mean_db(signals: Sequence[Sequence[float]], noises: Sequence[Sequence[float]]) -> float:
    """The SQNR in dB, the mean over the turns; infinite where none has noise."""
    turns = [decibels(*pair) for pair in zip(signals, noises, strict=True)]
    if not any(map(math.isfinite, turns)):
        return min(turns)
    return math.fsum(max(-LIMIT_DB, min(LIMIT_DB, turn)) for turn in turns) / len(turns)


@dataclass(slots=True, kw_only=True)
class _Trials:
    """The noise of plans, each made from a part of the samples and judged on the others, part by part.

    Attributes:
        order: the samples, by index.
        signals: of each turn and sample the energy of its float outputs, once there are noises.
    """

    model: Model
    plan: Plan
    samples: Iterable[Sample]
    order: tuple[int, ...]
    on_progress: Progress | None
    signals: list[list[float]] = field(default_factory=list)
    _measured: dict[int, tuple[CalibrationTable, Mapping[str, Channels]]] = field(default_factory=dict)
    _signals: dict[int, list[float]] = field(default_factory=dict)
    _known: dict[int, dict[str, list[float]]] = field(default_factory=dict)  # turn -> plan -> noise by sample

    def noises(self, trials: Sequence[Mapping[str, str | int]], turns: int) -> list[list[list[float]]]:
        """Of each set of settings the noise by turn, of some first turns, and sample, in the order of `signals`."""
        wanted = [self._quick(settings) for settings in trials]
        keys = [plan.sha256 for plan in wanted]
        self.signals = []
        for turn in range(turns):
            known = self._known.setdefault(turn, {})
            new = {key: plan for key, plan in zip(keys, wanted, strict=True) if key not in known}
            if new:
                fit, held, table, seen = self._turn(turn)
                plans = [reached(self.model, plan, table) for plan in new.values()]
                made = (insert(self.model, p, solve(self.model, p, table, samples=fit, seen=seen)) for p in plans)
                self._signals[turn], noises = HeldOutScore(self.model, held).energies(made)
                known.update(zip(new, noises, strict=True))
            self.signals.append(self._signals[turn])
        return [[self._known[turn][key] for turn in range(turns)] for key in keys]

    def _quick(self, chosen: Mapping[str, str | int]) -> Plan:
        """The plan by some settings, as far as it needs no comparison of calibrators."""
        settings = self.plan.settings
        quick = {"calibrator": settings.quick.calibrator, **chosen}
        if settings.rounding == AUTO:
            quick.setdefault("rounding", WITHOUT_MOMENTS)
        return _decided(self.model, self.plan, quick)

    @property
    def parts(self) -> int:
        """How many turns there are."""
        return min(PARTS, len(self.order))

    def _turn(self, turn: int) -> tuple[SampleSubset, Split, CalibrationTable, Mapping[str, Channels]]:
        """The samples to fit on, those that judge, and what was measured on the first."""
        if self.on_progress is not None:
            self.on_progress(turn, self.parts, "comparing choices")
        held = frozenset(self.order[part(len(self.order), turn, self.parts)])
        fit = SampleSubset(self.samples, frozenset(self.order) - held)
        if turn not in self._measured:
            readers = channels.candidates(self.plan, weighted_nodes(self.model, self.plan))
            self._measured[turn] = (
                collect(self.model, self.plan, fit),
                channels.look(self.model, readers, fit, None),
            )
        return fit, Split(samples=self.samples, fit=(), held=held), *self._measured[turn]
