"""How each quantized data tensor is scaled: by a constant, by one after its channels are divided, or token by token.

Ranges -> FPTQ's rule (`token_scales`) -> divisors where they pay (`equalize`) -> tokens where one scale errs too much.
Every step returns new `DataScales`. It must not round weights or change the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qdq.core.arrays import Singles
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.measure.second_moments import SampleSubset
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import WeightedNode
from qdq.solve import token_scales, trained
from qdq.solve.activations import activation_params, tie_notes
from qdq.solve.equalize import channels, choose, pieces, two_codes
from qdq.solve.equalize.channels import Channels
from qdq.solve.equalize.formulas import formula


@dataclass(frozen=True, slots=True, kw_only=True)
class DataScales:
    """The scales of all data tensors, as far as they are chosen.

    Attributes:
        params: tensor -> parameters per tensor; scale 1 where the real one is computed as the engine runs.
        divisors: tensor -> (channels,) what its channels are divided by before they are quantized.
        tokens: tensors that have one scale per token.
        residual: tensors whose codes are followed by those of what they leave.
        beyond: tensor -> parameters of its outer piece, where it has two; `params` are of the inner one.
        notes: what a person should know, one line each.
    """

    params: Mapping[str, QParams]
    divisors: Mapping[str, Singles] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    residual: frozenset[str] = frozenset()
    beyond: Mapping[str, QParams] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def constant(self) -> dict[str, QParams]:
        """The parameters of the tensors that have one scale, a constant of the engine, which tells of their noise."""
        several = {*self.tokens, *self.residual, *self.beyond}
        return {t: p for t, p in self.params.items() if t not in several and not FORMATS[p.format].blocks}


def data_scales(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    table: CalibrationTable,
    samples: SampleSubset | None,
    *,
    params: Mapping[str, QParams] | None = None,
    seen: Mapping[str, Channels] | None = None,
    on_progress: Progress | None = None,
) -> DataScales:
    """Scales, divisors and tokens of every data tensor.

    Without `samples` channels are left as they are, and tokens are chosen by range; `params`, of every activation
    tensor, take the place of what the plan's calibrator says of the table. `seen` is what `channels.look` has of these
    samples, if it is known.
    """
    ties = () if params is not None else tie_notes(plan, table)
    params = activation_params(model, plan, table, {}) if params is None else params
    params = {**params, **trained.data_params(model, plan)}
    classes = token_scales.classes(plan, nodes, table, data=samples is not None)
    twice = frozenset(p.tensor for p in plan.activations if p.spec.residual)
    scales = DataScales(params=params, tokens=classes.tokens, residual=twice, notes=(*ties, *classes.notes))
    if samples is not None:
        if seen is None:
            seen = channels.look(model, channels.candidates(plan, nodes), samples, on_progress)
        scales = _equalized(model, plan, nodes, scales, classes.compressed, seen)
        if plan.settings.equalize == "rms":
            extra, own = two_codes.divided(model, scales.residual, seen)
            scales = replace(scales, params={**scales.params, **own}, divisors={**scales.divisors, **extra})
        late = token_scales.by_error(
            model, plan, nodes, scales.constant, scales.divisors, samples, on_progress=on_progress
        )
        divisors = {tensor: divisor for tensor, divisor in scales.divisors.items() if tensor not in late}
        scales = replace(scales, divisors=divisors, tokens=(*scales.tokens, *late))
    scales = _in_pieces(model, plan, nodes, scales, samples, on_progress)
    one = QParams(scale=np.asarray(1, dtype=np.float32))
    scales = replace(scales, params={**scales.params, **dict.fromkeys(scales.tokens, one)})
    if not (asked := sum(p.spec.token is not None for p in plan.activations)):
        return scales
    note = f"{len(scales.tokens)} of {asked} tensors have one INT8 scale per token, computed as the engine runs"
    return replace(scales, notes=(*scales.notes, note))


def _in_pieces(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    scales: DataScales,
    samples: SampleSubset | None,
    on_progress: Progress | None,
) -> DataScales:
    """The same with two pieces for the tensors that the settings want them for."""
    if plan.settings.piecewise == "off":
        return scales
    if samples is None:
        return replace(scales, notes=(*scales.notes, "piecewise needs the samples, and only a table was given"))
    constant, everywhere = scales.constant, plan.settings.piecewise == "on"
    readers = {
        p.tensor: [nodes[name] for name, _ in p.uses]
        for p in plan.activations
        if p.tensor in constant and FORMATS[p.spec.format].integer and not p.trained
        if token_scales.can_have_tokens(p, nodes)
    }
    found = pieces.split(
        model, readers, constant, scales.divisors, samples, everywhere=everywhere, on_progress=on_progress
    )
    gains = sorted(each.gain_db for each in found.values())
    said = f": {gains[0]:.1f} to {gains[-1]:.1f} dB less noise predicted at their consumers" if gains else ""
    return replace(
        scales,
        params={**scales.params, **{tensor: each.inside for tensor, each in found.items()}},
        beyond={tensor: each.beyond for tensor, each in found.items()},
        notes=(*scales.notes, f"{len(found)} of {len(scales.params)} tensors are multiplied in two pieces{said}"),
    )


def _equalized(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    scales: DataScales,
    compressed: tuple[str, ...] | None,
    seen: Mapping[str, Channels],
) -> DataScales:
    """The same with divisors of the tensors that gain by them, of `compressed` or of all."""
    method = formula(plan.settings.equalize)
    if method is None or not method.for_data:
        return scales
    wanted = {t: p for t, p in scales.constant.items() if compressed is None or t in compressed}
    found = choose.equalized(model, plan, nodes, wanted, seen, formula=method)
    if not found:
        return scales
    gains = sorted(e.gain_db for e in found.values())
    note = (
        f"the channels of {len(found)} of {len(scales.params)} tensors are equalized: {gains[0]:.1f} to "
        f"{gains[-1]:.1f} dB less noise predicted at their consumers"
    )
    return replace(
        scales,
        params={**scales.params, **{tensor: e.params for tensor, e in found.items()}},
        divisors={tensor: e.scale for tensor, e in found.items()},
        notes=(*scales.notes, note),
    )
