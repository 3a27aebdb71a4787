"""`--equalize auto`: how strongly channels are balanced, judged on samples that the ranges were not made from.

samples -> parts by hash -> for each part: ranges and divisors of the cautious and of the strong formula from it alone,
SQNR of both on the others -> the strong formula where it gains in every turn, else the cautious one.
A formula that trusts the ranges it has seen always gains on them; a potential for molecules gained 6 dB so and lost
10 dB on others. This module must not see samples other than those of the calibration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engines.core.documents import replace
from qdq.assemble.held_out import HeldOutScore, Split, ranked
from qdq.assemble.insert import insert
from qdq.core.progress import Progress
from qdq.measure.collect import collect
from qdq.measure.inference.samples import Sample
from qdq.measure.second_moments import SampleSubset
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.equalize.channels import candidates
from qdq.solve.solve import solve

CAUTIOUS, STRONG = "smoothquant", "smooth"
PARTS = 3  # each is fitted on in turn, and the others judge: what is new to a third of the samples is new to all, too
MOST = 24  # samples looked at, over all parts
MINIMUM_GAIN_DB = 1.0  # in every turn; the first with less ends it


def resolved(
    model: Model, plan: Plan, samples: Iterable[Sample] | None, *, on_progress: Progress | None = None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with a formula in place of equalize 'auto', and why it is that one; other plans come back as they are.

    The model is prepared, the samples re-iterable; None in their place takes the cautious formula.

    Raises:
        InputError: there are no samples in `samples`.
    """
    if plan.settings.equalize != "auto":
        return plan, ()
    formula, notes = CAUTIOUS, tuple[str, ...]()
    convs = [readers[0].op_type == "Conv" for readers in candidates(plan, weighted_nodes(model, plan)).values()]
    if samples is not None and 2 * sum(convs) < len(convs):  # Gemm and MatMul read most of what may be equalized
        if is_large(model.graph.initializer):
            notes = (f"equalize auto took {CAUTIOUS}: a model of this size is not quantized several times to compare",)
        else:
            order = ranked(samples)
            gains = list(_gains(model, plan, samples, order[:MOST], on_progress)) if len(order) >= PARTS else []
            formula = STRONG if gains and min(gains) >= MINIMUM_GAIN_DB else CAUTIOUS
            listed = ", ".join(f"{gain:+.1f}" for gain in gains) or f"too few to compare, {PARTS} are needed"
            notes = (
                f"equalize auto took {formula}: output SQNR of {STRONG} less that of {CAUTIOUS} in dB, each fitted on "
                f"a third of {len(order[:MOST])} calibration samples and judged on the others: {listed}",
            )
    return replace(plan, settings=replace(plan.settings, equalize=formula)), notes


def _gains(
    model: Model, plan: Plan, samples: Iterable[Sample], order: tuple[int, ...], on_progress: Progress | None
) -> Iterator[float]:
    """Of each turn: by how many dB the strong formula beats the cautious one, up to the first turn where it fails."""
    quick = plan.settings.quick
    plans = [replace(plan, settings=replace(quick, equalize=formula)) for formula in (CAUTIOUS, STRONG)]
    for turn in range(PARTS):
        if on_progress is not None:
            on_progress(turn, PARTS, "comparing equalizations")
        fit = frozenset(order[turn::PARTS])
        part = SampleSubset(samples, fit)
        table = collect(model, plan, part)
        made = [insert(model, p, solve(model, p, table, samples=part)) for p in plans]
        held = Split(samples=samples, fit=(), held=frozenset(order) - fit)
        cautious, strong = HeldOutScore(model, held).sqnrs_db(made)
        yield strong - cautious
        if strong < cautious + MINIMUM_GAIN_DB:
            return
