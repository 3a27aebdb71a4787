"""Calibration tables of one model, kept for plans that need no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engines.core.documents import replace
from qdq.core.disk.cache import remembered
from qdq.core.progress import Progress
from qdq.measure.collect import collect, key
from qdq.measure.inference.kept import seen
from qdq.measure.inference.samples import Sample
from qdq.measure.table import CalibrationTable, TableFile
from qdq.model.as_bytes import identity
from qdq.model.model import Model
from qdq.passes.rewrites import FLOAT_REWRITES
from qdq.passes.rewrites.edit import Rewrite
from qdq.plan.plan import Plan

Measure = Callable[[Plan, Progress | None], CalibrationTable]
"""What collects the table of a plan, of samples that it knows."""


def measured(
    model: Model,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    by: Measure | None = None,
    on_progress: Progress | None = None,
) -> CalibrationTable:
    """As `collect`, or `by` another way; where work is kept, the table that was collected of these samples before."""
    return remembered(
        "tables",
        lambda: (*identity(model), key(model, plan), *seen(samples)),
        lambda: by(plan, on_progress) if by else collect(model, plan, samples, on_progress=on_progress),
        pack=lambda table: {"table": table.to_json().encode()},
        unpack=lambda parts: CalibrationTable.from_file(TableFile.from_json(parts["table"]), "kept"),
    )


@dataclass(slots=True, kw_only=True)
class Tables:
    """Tables of one prepared model: a plan whose tensors were measured after the same rewrites takes those.

    `measure` collects in place of this process, as workers do.
    """

    model: Model
    samples: Iterable[Sample]
    measure: Measure | None = None
    _held: list[tuple[tuple[Rewrite, ...], CalibrationTable]] = field(default_factory=list)

    def of(self, plan: Plan, on_progress: Progress | None = None) -> CalibrationTable:
        """The table of a plan's tensors."""
        rewrites = tuple(r for r in plan.rewrites if r.name in FLOAT_REWRITES)
        needed = {p.tensor for p in plan.activations}
        for done, table in self._held:
            if done == rewrites and needed <= table.tensors.keys():
                return replace(table, tensors={name: h for name, h in table.tensors.items() if name in needed})
        table = measured(plan.form(self.model), plan, self.samples, by=self.measure, on_progress=on_progress)
        self._held.append((rewrites, table))
        return table
