"""The steps of the tuner's search: what can be changed of a variant, on nodes that the compiler cannot tell apart.

Move + Variant -> Variant. It must not know prices.

| move | on a class of nodes |
|---|---|
| int8, float | quantized, with and without the rewrites of the Q/DQ model; left in the type of the rest |
| a rewrite of `qdq.surgery` | done or not |
| common, channels | weights have one scale, or one per channel |
| centred, shifted | a lopsided input keeps its zero point 0, or is shifted so that it uses all codes |
| raw, shared | a shortcut reads the float tensor, or the quantized one |
| rest | what is not quantized has another float type |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qdq.surgery import QUANTIZED_REWRITES
from qdq.variant import Variant

SHORTCUTS = ("raw", "shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of a variant; `kind` as in the table above, or a rewrite's name, with 'no ' for undone.

    Attributes:
        nodes: that it is about; for 'rest' a type, "" the usual one.
    """

    kind: str
    nodes: tuple[str, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """The nodes that it is about: shortcuts are named by operand; a type is of the whole model."""
        if self.kind == "rest":
            return ()
        return tuple(n.rpartition(":")[0] for n in self.nodes) if self.kind in SHORTCUTS else self.nodes

    def of(self, v: Variant) -> Variant:
        """The changed variant."""
        if self.kind in SHORTCUTS:
            return replace(v, raw=v.raw | set(self.nodes) if self.kind == "raw" else v.raw - set(self.nodes))
        if self.kind == "rest":
            return replace(v, rest=self.nodes[0])
        if self.kind == "common":
            return replace(v, common=v.common | set(self.nodes))
        if self.kind == "channels":
            return replace(v, common=v.common - set(self.nodes))
        if self.kind == "centred":
            return replace(v, centred=v.centred | set(self.nodes))
        if self.kind == "shifted":
            return replace(v, centred=v.centred - set(self.nodes))
        if self.kind in ("int8", "int8 rewritten"):
            for name in QUANTIZED_REWRITES if self.kind != "int8" else ():  # they fire where they fit
                v = v.with_rewrite(name, self.nodes)
            return replace(v, integer=v.integer | set(self.nodes))
        if self.kind == "float":
            return replace(v, integer=v.integer - set(self.nodes))
        if self.kind.startswith("no "):
            return v.without_rewrite(self.kind.removeprefix("no "), self.nodes)
        return v.with_rewrite(self.kind, self.nodes)

    def __str__(self) -> str:
        """Like 'int8 on /conv1 and 3 alike'."""
        if self.kind == "rest":
            return f"the rest in {self.nodes[0] or 'its usual type'}"
        more = f" and {len(self.nodes) - 1} alike" if len(self.nodes) > 1 else ""
        return f"{self.kind} on {self.nodes[0]}{more}"
