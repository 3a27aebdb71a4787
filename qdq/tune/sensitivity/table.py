"""What `qdq sensitivity` writes: a row for each group of nodes, with the error of each candidate at the outputs.

`measure.sensitivity` -> `Sensitivity` -> table.json, rows for the terminal, lines of `qdq explain`.
Must not measure anything, or hold sample data.
"""

from __future__ import annotations

import math
import os
from typing import ClassVar

from engines.core.documents import Document, Measured, Part
from qdq.assemble.held_out import decibels
from qdq.core.errors import InputError
from qdq.core.files import read_document, write_text
from qdq.passes.rewrites.edit import Rewrite
from qdq.plan.settings import Settings


class Trial(Part, frozen=True, kw_only=True, omit_defaults=True):
    """One group in one candidate, all else in float.

    Attributes:
        candidate: as asked for.
        noise: over signal, sum (y - float y)^2 / sum (float y)^2 of all outputs and samples; None where the candidate
            does nothing to the group.
        value: of the metric, the mean over samples; None where none was asked for.
        scaled: the noise is that of the group's first candidate times the ratio of what both do to the tensors behind
            the group; else the outputs were computed on every sample.
        why_not: why the candidate does nothing to the group.
    """

    candidate: str
    noise: Measured | None = None
    value: Measured | None = None
    scaled: bool = False
    why_not: str = ""

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); infinite without noise, -infinite where outputs are not finite."""
        return None if self.noise is None else decibels([1.0], [self.noise])


class GroupRow(Part, frozen=True, kw_only=True):
    """One group: its nodes in the order of the graph, and its trials in the order of the candidates."""

    nodes: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        """The first node's."""
        return self.nodes[0]


class Check(Part, frozen=True, kw_only=True):
    """How scaled noises compare with those of trials run to the end, on one sample.

    Attributes:
        trials: that were run to the end.
        rank_correlation: Spearman's, of all of them; None of fewer than three.
        median_db: candidate -> the median of |10 log10(scaled / run)|.
        largest_db: candidate -> the largest.
        run_to_the_end: candidates whose trials all were, for these differ too much.
    """

    trials: int
    rank_correlation: Measured | None
    median_db: dict[str, Measured]
    largest_db: dict[str, Measured]
    run_to_the_end: tuple[str, ...] = ()


class Sensitivity(Document, frozen=True, kw_only=True):
    """The whole table.

    Attributes:
        model_sha256: of the user's model.
        samples_sha256: of the samples that the outputs were computed on, and the ranges measured on.
        samples: how many.
        settings: that the candidates share; `scheme` and the like are a candidate's own.
        unquantized_type: that candidate `float` has.
        rewrites: done before the nodes were named.
        candidates: as asked for.
        metric: of the trials' values, "" for none.
        groups: in the order of the graph.
        check: None where nothing was scaled.
    """

    FORMAT: ClassVar[str] = "qdq.sensitivity/1"
    MAKE: ClassVar[str] = "qdq sensitivity MODEL --data DATA -o sensitivity.json"

    model_sha256: str
    samples_sha256: str
    samples: int
    settings: Settings
    unquantized_type: str
    rewrites: tuple[Rewrite, ...]
    candidates: tuple[str, ...]
    metric: str
    groups: tuple[GroupRow, ...]
    check: Check | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read one.

        Raises:
            InputError: missing, not JSON, another format version, or an entry that makes no sense.
        """
        return read_document(path, cls, "sensitivity table")

    def row(self, node: str) -> GroupRow | None:
        """The row of the group that a node is in."""
        return next((row for row in self.groups if node in row.nodes), None)

    @property
    def loudest_first(self) -> list[GroupRow]:
        """The rows, by the candidate of each that errs most."""
        return sorted(self.groups, key=_loudest, reverse=True)

    def explain(self, node: str) -> list[str]:
        """What is known of a node, in a few lines."""
        row = self.row(node)
        if row is None:
            return ["  sensitivity: not in the table; no candidate quantizes it"]
        others = ", ".join(name for name in row.nodes if name != node)
        shared = f", in one group with {others}" if others else ""
        order = self.loudest_first
        place = f"{order.index(row) + 1} of {len(order)} by its loudest candidate"
        said = [f"  sensitivity{shared}: {place}, on {self.samples} samples, all else in float"]
        for trial in row.trials:
            value = "" if trial.value is None else f", {self.metric} {trial.value:.4f}"
            how = ", in proportion to the first" if trial.scaled else ""
            said.append(f"    {trial.candidate}: {trial.why_not or f'{_db(trial)} dB at the outputs{how}'}{value}")
        return said

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of cells for the terminal, the loudest group first, below a head."""
        head = ("group", "nodes", *self.candidates)
        return [head, *(_cells(row) for row in self.loudest_first)]

    def notes(self) -> tuple[str, ...]:
        """What a reader of the rows must know, a sentence each."""
        said = ["A group's SQNR is that of the outputs where it alone has the candidate, and all else is float32."]
        if any(trial.scaled for row in self.groups for trial in row.trials):
            said.append("~ is in proportion to the group's first candidate, by the noise behind the group.")
        if self.check is not None and self.check.rank_correlation is not None:
            said.append(
                f"Check: {self.check.trials} of these run to the outputs on one sample, rank correlation "
                f"{self.check.rank_correlation:.3f}, at most {max(self.check.largest_db.values()):.1f} dB apart."
            )
        if self.check is not None and self.check.run_to_the_end:
            said.append(f"Run to the outputs, for that differed too much: {', '.join(self.check.run_to_the_end)}.")
        if any(trial.why_not for row in self.groups for trial in row.trials):
            said.append("- is where the candidate does nothing; `qdq explain` says why.")
        return tuple(said)


def require_same(found: Sensitivity, model_sha256: str) -> None:
    """Refuse a table of another model.

    Raises:
        InputError: says which.
    """
    if found.model_sha256 != model_sha256:
        raise InputError(
            f"The sensitivity table was made from another model: it says sha256 {found.model_sha256[:12]}…, this model "
            f"has {model_sha256[:12]}…. Make one for this model with `{Sensitivity.MAKE}`."
        )


def _loudest(row: GroupRow) -> float:
    return max((trial.noise for trial in row.trials if trial.noise is not None), default=0.0)


def _cells(row: GroupRow) -> tuple[str, ...]:
    return (row.name, str(len(row.nodes)), *(_cell(trial) for trial in row.trials))


def _cell(trial: Trial) -> str:
    if trial.noise is None:
        return "-"
    scaled = "~" if trial.scaled else ""
    return f"{scaled}{_db(trial)}" + ("" if trial.value is None else f"  {trial.value:.4f}")


def _db(trial: Trial) -> str:
    decibel = trial.sqnr_db
    return "none" if decibel is None else "exact" if decibel == math.inf else f"{decibel:.1f}"
