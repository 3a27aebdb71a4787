"""What a model costs once compiled: bytes of its weights and of its memory, and predicted microseconds.

Model -> compiled (by the recipe's compiler, or by what stands in for it here) -> `Cost`
For TensorRT-RTX one engine tells all. For TensorRT, bytes are those of the engine that can be built here, and times are
derived (`qdq.build.pricing.tensorrt_pricer`), of INT8 and float alone. It must not choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engines.backends.backend import backend_named
from engines.backends.compiler import ShapeRange
from engines.core.documents import replace
from engines.core.errors import BuildError, EngineError, UnsupportedTargetError
from qdq.build.cost import Kernel, Price
from qdq.build.engine import compile_engine
from qdq.build.machine import stand_in
from qdq.build.pricing.pricer import Pricer, gpus_of
from qdq.build.pricing.tensorrt_pricer import AnyPricer, pricer_of
from qdq.build.recipe import Recipe
from qdq.model.model import Model

SIZE, TIME, MEMORY = "size", "time", "memory"
PRICED = frozenset(("int8", "float"))  # schemes whose times are derived for TensorRT


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one engine costs; infinite where the compiler refuses the model, and a time that is not predicted.

    Attributes:
        of: cost -> bytes or microseconds.
        kernels: that the time is of.
        refusal: the compiler's.
    """

    of: Mapping[str, float]
    kernels: tuple[Kernel, ...] = ()
    refusal: str = ""


@dataclass(slots=True, kw_only=True)
class Costing:
    """Compiles the models of one recipe.

    Attributes:
        recipe: its compiler, targets and GPUs.
        shapes: of each input.
    """

    recipe: Recipe
    shapes: Mapping[str, ShapeRange]
    _pricers: dict[tuple[str, ...], Pricer | None] = field(default_factory=dict)
    _derived: AnyPricer | None = None

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that times are predicted for; none where they are not.

        Raises:
            InputError: a GPU that is of no target.
        """
        try:
            return tuple(gpu.name for gpu in gpus_of(self.recipe))
        except UnsupportedTargetError:
            return ()

    def __call__(self, model: Model) -> Cost:
        """The cost of a model as it is finished."""
        by = stand_in(self.recipe, model.proto)
        try:
            price = self._price(by, model)
            if price is not None and price.refusal:
                return _refused(price.refusal)
            size, memory = (price.weight_bytes, price.memory_bytes) if price else self._bytes(by, model)
        except BuildError as error:
            return _refused(str(error))
        if price is None or by is not self.recipe:
            price = self._derived_price(model)
        us, kernels = (price.us, price.kernels) if price else (math.inf, ())
        return Cost(of={SIZE: float(size), MEMORY: float(memory), TIME: us}, kernels=kernels)

    def _price(self, by: Recipe, model: Model) -> Price | None:
        """What the compiler's engine says; None where its kernels cannot be priced, or are not known."""
        if by.targets not in self._pricers:
            self._pricers[by.targets] = self._pricer(by)
        pricer = self._pricers[by.targets]
        if pricer is None:
            return None
        try:
            return pricer(model)
        except BuildError:
            raise
        except EngineError:  # sizes of its kernels are decided at run time
            return None

    def _pricer(self, by: Recipe) -> Pricer | None:
        if not backend_named(by.backend).predicts:
            return None
        try:
            gpus = gpus_of(by if by is self.recipe else replace(by, gpus=()))
        except UnsupportedTargetError:
            return None
        return Pricer(recipe=by, shapes=self.shapes, gpus=gpus)

    def _bytes(self, by: Recipe, model: Model) -> tuple[int, int]:
        table = compile_engine(model, recipe=by, shapes=self.shapes, locate=False).table
        return table.weight_bytes, table.weight_bytes + table.activation_bytes

    def _derived_price(self, model: Model) -> Price | None:
        """The time of a compiler that is not the one whose bytes are known."""
        if backend_named(self.recipe.backend).predicts:
            return None
        if self._derived is None:
            plain = replace(self.recipe.settings, scheme="int8", overrides={}, block="auto")
            try:
                self._derived = pricer_of(replace(self.recipe, settings=plain), self.shapes)
            except UnsupportedTargetError:
                return None
        return self._derived(model) if self._derived else None


def unpriced(recipe: Recipe, texts: Sequence[str]) -> list[str]:
    """The candidates whose times are not predicted for a recipe's compiler."""
    if backend_named(recipe.backend).predicts:
        return []
    return [text for text in texts if text.partition(":")[0] not in PRICED]


def _refused(why: str) -> Cost:
    return Cost(of=dict.fromkeys((SIZE, MEMORY, TIME), math.inf), refusal=why)
