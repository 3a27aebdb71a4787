"""Exact rewrites: other operators, the same outputs up to float rounding, a better compiled result.

One file per rewrite, found by itself: `STAGE` ("prepared": what `prepare` always does; "float": on the prepared model;
"quantized": on the Q/DQ model), `RANK` (small ones first; the order of the new initializers too) and `rewrite(model,
only=None) -> Rewritten`, which says of each node whose operator it starts from why it does not fit. A rewrite is pure,
deterministic and idempotent.
It must not decide whether it pays: the compiled result does, so each can be limited to some nodes. A module's `USUAL`
are formats of weights with which every plan has it, tuned or not: without it the compiler has no integer kernel. Its
`NOT_FOR` are compilers that no plan for has it, each with the reason, or `NEEDS` is the fact of a compiler's profile
without which it does not pay; what is true arithmetic for one is for all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Protocol

from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.passes.rewrites.edit import Rewrite, Rewritten

__all__ = [
    "FLOAT_REWRITES",
    "PREPARED_REWRITES",
    "QUANTIZED_REWRITES",
    "USUAL_REWRITES",
    "Rewriter",
    "Rewritten",
    "applied",
    "rewritten",
    "why_not_for",
]


class Rewriter(Protocol):
    """One rewrite."""

    def __call__(self, model: Model, only: Collection[str] | None = None) -> Rewritten:
        """Rewrite a prepared model, or for the stage "quantized" the Q/DQ model, its float type settled.

        It fires on the nodes named in `only`, or on all.
        """


class Known(Protocol):
    """A fact of a compiler, as `engines.backends.profile.Fact`: true where it is known to hold."""

    @property
    def says(self) -> str:
        """What a person is told."""

    def __bool__(self) -> bool:
        """Whether it is known to hold."""


class Described(Protocol):
    """A compiler, as `engines.backends.profile.Profile`."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def facts(self) -> Mapping[str, Known]:
        """Every fact by name."""


def _modules() -> dict[str, ModuleType]:
    """Every module in this folder or below by its last name."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(__path__, f"{__name__}.")]
    return {m.__name__.rpartition(".")[2]: m for m in modules}


def found(stage: str) -> Mapping[str, Rewriter]:
    """The rewrites of a stage by name, in the order of their ranks."""
    those = {name: m for name, m in _modules().items() if getattr(m, "STAGE", None) == stage}
    return {name: those[name].rewrite for name in sorted(those, key=lambda name: (those[name].RANK, name))}


PREPARED_REWRITES = found("prepared")
FLOAT_REWRITES = found("float")
QUANTIZED_REWRITES = found("quantized")
USUAL_REWRITES: Mapping[str, tuple[str, ...]] = {n: m.USUAL for n, m in _modules().items() if hasattr(m, "USUAL")}
_NOT_FOR: Mapping[str, Mapping[str, str]] = {n: getattr(m, "NOT_FOR", {}) for n, m in _modules().items()}


_NEEDS: Mapping[str, str] = {n: m.NEEDS for n, m in _modules().items() if hasattr(m, "NEEDS")}


def why_not_for(name: str, profile: Described) -> str:
    """Why no plan for a compiler has a rewrite; "" where one may."""
    if name in _NEEDS and not (fact := profile.facts[_NEEDS[name]]):
        return fact.says
    return _NOT_FOR[name].get(profile.name, "")


def applied(
    model: Model, wanted: Iterable[tuple[str, str]], *, stage: str = "float"
) -> tuple[Model, tuple[Rewrite, ...]]:
    """A model as `Rewriter` takes it after the rewrites of one stage, by rank, and what they fired on.

    Of the (rewrite, node) pairs, those of the other stage, and nodes that a rewrite does not fit, are left aside.
    """
    pairs, fired = set(wanted), []
    for name, rewrite in (FLOAT_REWRITES if stage == "float" else QUANTIZED_REWRITES).items():
        nodes = {node for other, node in pairs if other == name}
        if nodes and (done := rewrite(model, nodes)).fired:
            fired.append(Rewrite(name=name, nodes=done.fired))
            model = done.model
    return model, tuple(fired)


def rewritten(model: Model, rewrites: Sequence[Rewrite], *, stage: str = "float") -> Model:
    """The model that a plan's points and skips name: the prepared one with the plan's rewrites.

    Those of the stage are done; on a Q/DQ model they fire where its scales allow it.

    Raises:
        InputError: an edited plan names a rewrite or a node that does not exist, or a node that it does not fit.
    """
    for planned in rewrites:
        choose(planned.name, (*FLOAT_REWRITES, *QUANTIZED_REWRITES), "rewrite")
    done, fired = applied(model, ((r.name, node) for r in rewrites for node in r.nodes), stage=stage)
    names = {node.name for node in model.graph.node}
    for planned in (r for r in rewrites if r.name in (FLOAT_REWRITES if stage == "float" else QUANTIZED_REWRITES)):
        fits = {node for r in fired if r.name == planned.name for node in r.nodes} if stage == "float" else names
        if lost := sorted(set(planned.nodes) - fits):
            raise InputError(
                f"The plan rewrites {lost[0]!r} by {planned.name!r}, which does not fit that node. Remove it from the "
                "plan, or make the plan again."
            )
    return done
