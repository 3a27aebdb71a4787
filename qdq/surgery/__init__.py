"""Exact rewrites: other operators, the same outputs up to float rounding, a better compiled result.

One file per rewrite, found by itself: `STAGE` ("float": on the prepared model; "quantized": on the Q/DQ model), `RANK`
(small ones first) and `rewrite(model, only=None) -> Rewritten`. A rewrite is pure, deterministic and idempotent.
It must not decide whether it pays: the compiled result does, so each can be limited to some nodes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Protocol

from qdq.graph import Model
from qdq.surgery.rewritten import Rewritten

__all__ = ["FLOAT_REWRITES", "QUANTIZED_REWRITES", "Rewrite", "Rewritten"]


class Rewrite(Protocol):
    """One rewrite: the model, and the names of the nodes it may fire on (None: all)."""

    def __call__(self, model: Model, only: Collection[str] | None = None) -> Rewritten:
        """Rewrite a model."""


def _found(stage: str) -> Mapping[str, Rewrite]:
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    chosen = sorted((m.RANK, m.__name__, m) for m in modules if getattr(m, "STAGE", None) == stage)
    return {name.rpartition(".")[2]: module.rewrite for _, name, module in chosen}


FLOAT_REWRITES = _found("float")
QUANTIZED_REWRITES = _found("quantized")
