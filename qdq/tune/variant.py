"""One way to write a model: nodes that are quantized, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Choices about one model; names that do not exist after its rewrites mean nothing.

    Attributes:
        rewrites: (rewrite, node) pairs; those of the quantized stage apply to nodes in `integer` only.
        integer: weighted nodes that are quantized.
        common: nodes whose weight has one scale for all channels, if they are in `integer`.
        centred: nodes whose input is not shifted, though its range is lopsided: fewer codes, less to pad and subtract.
        raw: shortcut operands, "node:index", that read the float tensor although a quantized one exists.
        rest: the float type of what is not quantized, if another than the workshop's first.
    """

    rewrites: frozenset[tuple[str, str]] = frozenset()
    integer: frozenset[str] = frozenset()
    common: frozenset[str] = frozenset()
    centred: frozenset[str] = frozenset()
    raw: frozenset[str] = frozenset()
    rest: str = ""

    def with_rewrite(self, name: str, nodes: Iterable[str]) -> Variant:
        """The same and a rewrite on some nodes."""
        return replace(self, rewrites=self.rewrites | {(name, node) for node in nodes})

    def without_rewrite(self, name: str, nodes: Iterable[str]) -> Variant:
        """The same without a rewrite on some nodes."""
        return replace(self, rewrites=self.rewrites - {(name, node) for node in nodes})
