"""What `qdq lint` writes as JSON. Must not look at a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from engines.core.documents import Document, Measured, Part
from qdq.lint.lint import Finding
from qdq.lint.repair.draft import Change


class Proof(Part, frozen=True, kw_only=True):
    """What the compiler and ONNX Runtime say of a repaired model.

    Attributes:
        compiles: the compiler takes it.
        compiler: its refusal, "" where there is none.
        kernels: of the engine.
        sqnr_db: of its worst output against that of the model given, on random data; None where none was compared.
        max_abs_error: largest difference of an output's values; None where they were not compared.
        not_compared: why not.
    """

    compiles: bool
    compiler: str
    kernels: int
    sqnr_db: Measured | None
    max_abs_error: Measured | None
    not_compared: str


class LintReport(Document, frozen=True, kw_only=True):
    """The findings of one model, and with --fix what was repaired.

    Attributes:
        findings: in the order of the nodes.
        changes: what was repaired.
        left: findings of the repaired model.
        proof: of the repaired model; None without --fix.
    """

    FORMAT: ClassVar[str] = "qdq.lint/2"
    MAKE: ClassVar[str] = "qdq lint --json"
    COMPUTED: ClassVar[Mapping[str, str]] = {"error": "errors", "warning": "warnings"}

    findings: tuple[Finding, ...]
    changes: tuple[Change, ...] = ()
    left: tuple[Finding, ...] = ()
    proof: Proof | None = None

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(f.severity == "error" for f in self.findings)

    @property
    def warnings(self) -> int:
        """How many findings are warnings."""
        return sum(f.severity == "warning" for f in self.findings)
