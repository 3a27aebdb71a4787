"""FPTQ's rule: a tensor has one scale, or one after its channels are equalized, or one per token.

ranges, v0, v1 -> `classes`: up to v0 one scale, up to v1 equalized, beyond per token (Li et al., arXiv 2308.15987).
With v0 'auto' equalization is tried everywhere, and kept where it is predicted to gain. With v1 'auto' a tensor gets
one scale per token only where the error of one scale, seen at the outputs of its readers, is not small against that of
their weights' own few bits (`by_error`): per token costs kernels, and what is lost in the weights' noise is not worth
them. It must not change a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qdq.core.arrays import Singles
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.measure.inference.samples import Sample
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan.plan import Plan, Point
from qdq.plan.settings import V0, V1
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize import predicted_error


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClasses:
    """What FPTQ's rule says.

    Attributes:
        tokens: tensors with one scale per token.
        compressed: tensors to equalize; None if no tensor is subject to the rule: then the settings apply to every one.
        notes: what a person should know.
    """

    tokens: tuple[str, ...]
    compressed: tuple[str, ...] | None
    notes: tuple[str, ...]


def classes(plan: Plan, nodes: Mapping[str, WeightedNode], table: CalibrationTable, *, data: bool) -> TokenClasses:
    """Each tensor's class by its range.

    `Spec.token` says which tensors the rule is about; without data, samples that is, 'auto' is the paper's number.
    """
    asked = [p for p in plan.activations if p.spec.token]
    if not asked:
        return TokenClasses(tokens=(), compressed=None, notes=())
    v0, v1 = plan.settings.v0, plan.settings.v1
    notes = []
    if "auto" in (v0, v1) and not data:
        notes.append(f"v0 and v1 cannot be chosen without samples: auto stands for {V0:g} and {V1:g}")
    least = (0.0 if data else V0) if v0 == "auto" else float(v0)
    most = (float("inf") if data else V1) if v1 == "auto" else float(v1)
    tokens, compressed = [], [p.tensor for p in plan.activations if not p.spec.token]
    given_up = 0
    for point in asked:
        span = table.tensors[point.tensor].amax
        if point.spec.token == "always" or span > most:
            if can_have_tokens(point, nodes):
                tokens.append(point.tensor)
                continue
            given_up += 1
        if point.spec.token == "fptq" and span > least:
            compressed.append(point.tensor)
    if given_up:
        notes.append(
            f"{given_up} tensors keep one scale although their range asks for one per token: a reader is no MatMul, "
            "and no Gemm without transA, alpha and beta"
        )
    return TokenClasses(tokens=tuple(tokens), compressed=tuple(compressed), notes=tuple(notes))


def can_have_tokens(point: Point, nodes: Mapping[str, WeightedNode]) -> bool:
    """Whether all readers can take data with one scale per row: the scales come back as a factor behind each."""
    readers = [nodes[name] for name, index in point.uses if name in nodes and index == 0]
    plain = (n.spatial == 0 and n.alpha == n.beta == 1 and not n.data_transposed for n in readers)
    return len(readers) == len(point.uses) and all(plain)


def by_error(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    params: Mapping[str, QParams],
    divisors: Mapping[str, Singles],
    samples: Iterable[Sample],
    *,
    on_progress: Progress | None = None,
) -> tuple[str, ...]:
    """The tensors that get one scale per token because one for all would be worse, and felt.

    None unless v1 is 'auto'. `params` are of the tensors that have one scale so far, `divisors` of the equalized ones.
    """
    asked = {
        p.tensor: [nodes[name] for name, _ in p.uses]
        for p in plan.activations
        if p.spec.token == "fptq" and p.tensor in params and can_have_tokens(p, nodes)
    }
    if plan.settings.v1 != "auto" or not asked:
        return ()
    found = predicted_error.errors(model, asked, params, divisors, samples, on_progress=on_progress)
    return tuple(t for t, e in found.items() if e.data > predicted_error.MOST_SHARE * e.weights and e.tokens < e.data)
