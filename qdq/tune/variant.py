"""One way to write a model: nodes that are quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engines.core.documents import replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Choices about one model; names that do not exist after its rewrites mean nothing.

    Attributes:
        rewrites: (rewrite, node) pairs; those of the quantized stage apply to nodes in `quantized` only.
        quantized: weighted nodes that are quantized.
        per_tensor: nodes whose weight has one scale for all channels, if they are in `quantized`.
        unshifted: nodes whose input is not shifted, though its range is asymmetric: fewer codes, less to compute.
        float_shortcuts: shortcut operands, "node:index", that read the float tensor although a quantized one exists.
        unquantized_type: the float type of what is not quantized, if another than the builder's first.
    """

    rewrites: frozenset[tuple[str, str]] = frozenset()
    quantized: frozenset[str] = frozenset()
    per_tensor: frozenset[str] = frozenset()
    unshifted: frozenset[str] = frozenset()
    float_shortcuts: frozenset[str] = frozenset()
    unquantized_type: str = ""

    def with_rewrite(self, name: str, nodes: Iterable[str]) -> Variant:
        """The same and a rewrite on some nodes."""
        return replace(self, rewrites=self.rewrites | {(name, node) for node in nodes})

    def without_rewrite(self, name: str, nodes: Iterable[str]) -> Variant:
        """The same without a rewrite on some nodes."""
        return replace(self, rewrites=self.rewrites - {(name, node) for node in nodes})
