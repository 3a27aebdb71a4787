"""Prices by the set of quantized nodes: the float forms are compiled once, what TensorRT makes of them is derived.

Variant -> engines of its float type -> Price; of any number of sets, one compile a float type. It must not choose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from engines.core.documents import replace
from engines.core.errors import BuildError
from qdq.build.cost import Price
from qdq.build.pricing.pricer import refused
from qdq.build.pricing.tensorrt_pricer import Engines
from qdq.model.model import Model
from qdq.tune.prices import Prices
from qdq.tune.variant_builder import Variant


@dataclass(slots=True)
class NodePrices(Prices):
    """Prices by the set of quantized nodes, from engines that are compiled once a float type."""

    engines_of: Callable[[Sequence[Model]], list[Engines | BuildError]] = field(kw_only=True)
    _engines: dict[str, Engines | BuildError] = field(default_factory=dict)

    def prepare(self, types: Collection[str]) -> None:
        """Compile for float types, several at a time."""
        if not (missing := [kind for kind in types if kind not in self._engines]):
            return
        usual = self.builder.usual
        models = [self.builder.model_of(replace(usual, unquantized_type=kind)) for kind in missing]
        if self.on_progress:
            self.on_progress(0, None, "Compile")
        self._engines |= dict(zip(missing, self.engines_of(models), strict=True))

    def engines(self, unquantized_type: str) -> Engines | BuildError:
        """The engines of a float type."""
        self.prepare([unquantized_type])
        return self._engines[unquantized_type]

    def _begin(self, variant: Variant) -> None:
        """Nothing: no variant is compiled, nor is its model written."""

    def _compile(self, variants: Sequence[Variant]) -> None:
        self._ahead |= {variant: self._price(variant) for variant in variants}

    def _price(self, variant: Variant) -> Price:
        engines = self.engines(variant.unquantized_type)
        if isinstance(engines, BuildError):
            return refused(engines)
        return engines.price(variant.quantized, self.builder.shared(variant))
