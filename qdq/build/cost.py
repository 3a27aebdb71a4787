"""What a compiled model is predicted to cost, kernel by kernel, and who says so.

Models -> `CostModel` -> Price each. It must not know a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qdq.model.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel: predicted microseconds, multiply-adds, bytes, the ONNX nodes in it, and what it reads and writes."""

    us: float
    macs: int
    bytes: int
    nodes: tuple[str, ...]
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the compiled model is predicted to cost; infinite, without kernels, if it does not compile."""

    us: float
    kernels: tuple[Kernel, ...] = ()


class CostModel(Protocol):
    """Compiles and prices models."""

    @property
    def width(self) -> int:
        """How many are best priced at a time."""

    def many(self, models: Sequence[Model]) -> list[Price]:
        """The price of each."""
