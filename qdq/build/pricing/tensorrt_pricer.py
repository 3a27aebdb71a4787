"""The price of a variant in TensorRT itself, without its GPU: predicted from what TensorRT-RTX makes of its float form.

Q/DQ model -> float form (`float_form`) -> compiled once a structure by TensorRT-RTX, for the target or its substitute
that + products in INT8 -> kernels of TensorRT's engine (`engines.cost.tensorrt`) -> predicted microseconds -> Price
A product is in INT8 where both operands come from INT8 codes. What the rules do not say is refused, not guessed: types
other than INT8, a float form that does not compile. It must not search.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from engines.backends.backend import backend_named, backends, predicting, target_name
from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError
from engines.core.operators import CONTRACTIONS
from engines.cost.gpus import Gpu
from engines.cost.tensorrt_engine import TensorRtEngine, fills_groups
from qdq.build.cost import Price
from qdq.build.pricing.compiles import Compiles
from qdq.build.pricing.float_form import FloatForm, float_form
from qdq.build.pricing.pricer import Pricer, gpus_of, mean, refused
from qdq.build.pricing.processes import Works
from qdq.build.recipe import Recipe
from qdq.model.model import Model
from qdq.model.nodes import all_nodes

SUBSTITUTE = "sm80"
"""Compiled for where TensorRT-RTX has no such target (sm87, sm90, sm100, ...), or is older and refuses the model there
(sm75 has no FP32 products of matrices) or fills groups of its convolutions with zeros: a float network has much the
same kernels there, and the GPU's own numbers say how long they take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedGpu:
    """A GPU as who reads predicted times of TensorRT must know of it."""

    name: str
    accumulation: str
    notes: tuple[str, ...]

    def other_accumulation(self) -> None:
        """TensorRT accumulates FP16 products in FP16 on GeForce: VGG-16 on an RTX 3090 runs above the other's peak."""


@dataclass(slots=True)
class TensorRtPricer:
    """Prices models as TensorRT would build them; `us` is the mean over the GPUs.

    Attributes:
        recipe: whose profile is TensorRT's.
        shapes: of each input; the usual one is priced.
        gpus: one or more, of any target that is known.
    """

    recipe: Recipe
    shapes: Mapping[str, ShapeRange]
    gpus: Sequence[Gpu]
    _known: dict[str, Engines | BuildError] = field(default_factory=dict)
    _compiles: Compiles = field(init=False)
    _newer: Compiles | None = None
    _refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Nothing is compiled yet."""
        backend = predicting(self.recipe.backend)
        targets = tuple(dict.fromkeys(_compiled_for(gpu, backend.targets) for gpu in self.gpus))
        self._compiles = Compiles(backend=backend.name, targets=targets, shapes=self.shapes)
        newer = tuple(dict.fromkeys(SUBSTITUTE if _older(target) else target for target in targets))
        if newer != targets:
            self._newer = Compiles(backend=backend.name, targets=newer, shapes=self.shapes)

    def __call__(self, model: Model) -> Price:
        """The price of a model; infinite where its float form does not compile."""
        return self.many([model])[0]

    @property
    def told(self) -> tuple[DerivedGpu, ...]:
        """The GPUs for who reads the times; what all have in common, the first says."""
        found = []
        for gpu in self.gpus:
            target = _compiled_for(gpu, self._compiles.targets)
            place = "" if target == gpu.target else f" for {target} in the place of {gpu.target}, which it lacks"
            if gpu.target in self._refused:
                why = "where it refuses the model in some float type, or has no kernels for its convolutions"
                place = f" for {SUBSTITUTE} in the place of {gpu.target}, {why}"
            notes = f"times of {self.recipe.profile.title} are derived from what TensorRT-RTX makes of the float model"
            found.append(DerivedGpu(name=gpu.name, accumulation=gpu.accumulation, notes=(f"{notes}{place}",)))
        return tuple(found)

    def many(self, models: Sequence[Model]) -> list[Price]:
        """The price of each model, the float forms compiled `width` at a time."""
        forms = [float_form(model) for model in models]
        found = self.engines([form.model for form in forms])
        return [_price(form, engines) for form, engines in zip(forms, found, strict=True)]

    def begin(self, model: Model) -> None:
        """Nothing: float forms are few, and compiled together."""

    def engines(self, models: Sequence[Model]) -> list[Engines | BuildError]:
        """The engines that float models are compiled to, or why they do not compile; equal structures once."""
        keys = [self._compiles.key(model) for model in models]
        unknown = {key: model for key, model in zip(keys, models, strict=True) if key not in self._known}
        found = dict(zip(unknown, self._compiles(unknown), strict=True))
        again = {key: unknown[key] for key, works in found.items() if _unlike(works)}
        if self._newer is not None and again:
            for key, works in zip(again, self._newer(again), strict=True):
                if not isinstance(works, BuildError):
                    found[key] = works
                    self._refused |= set(self._compiles.targets) - set(self._newer.targets)
        for key, works in found.items():
            self._known[key] = works if isinstance(works, BuildError) else self._engines(unknown[key], works)
        return [self._known[key] for key in keys]

    def _engines(self, model: Model, works: Works) -> Engines:
        by_target = {target: TensorRtEngine(work) for target, work in works.items()}
        multiplying = frozenset(n.name for n in all_nodes(model.graph) if n.op_type in CONTRACTIONS)
        pairs = tuple((gpu, by_target[_compiled_for(gpu, by_target)]) for gpu in self.gpus)
        return Engines(pairs=pairs, multiplying=multiplying)

    def refusal(self, model: Model) -> BuildError:
        """Why a model's float form does not compile, as of `Compiles`."""
        return self._compiles.refusal(model)

    @property
    def width(self) -> int:
        """How many models are best priced at a time."""
        return self._compiles.width

    def parallel(self) -> AbstractContextManager[None]:
        """Inside, models that take long to compile are compiled in processes of their own, one per core."""
        return self._compiles.parallel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """The float engines of one model.

    Attributes:
        pairs: each GPU with the engine that it is priced for.
        multiplying: the nodes that multiply and add.
    """

    pairs: tuple[tuple[Gpu, TensorRtEngine], ...]
    multiplying: frozenset[str]

    def price(self, int8: Collection[str], sharing: Collection[str]) -> Price:
        """The price with some products in INT8.

        Args:
            int8: their nodes. A kernel that several nodes share is in INT8 if all of its products are.
            sharing: nodes beside them that read codes, such as the Add of a shortcut.
        """
        costs = []
        for gpu, engine in self.pairs:
            indices = {i for i, nodes in self.kernels(engine).items() if nodes and nodes <= set(int8)}
            costs.append(engine.cost(gpu, indices, apart=self.apart(engine, sharing)))
        return mean(costs)

    def kernels(self, engine: TensorRtEngine) -> dict[int, frozenset[str]]:
        """Index of each kernel with a product -> the nodes that multiply in it."""
        return {i: self.multiplying.intersection(nodes) for i, nodes in engine.products.items()}

    def apart(self, engine: TensorRtEngine, sharing: Collection[str]) -> frozenset[int]:
        """The products whose shortcut reads the float tensor: none of their nodes reads codes beside the product."""
        return frozenset(i for i in engine.regions.shortcuts if not set(engine.products[i]) & set(sharing))


AnyPricer = Pricer | TensorRtPricer


def pricer_of(
    recipe: Recipe, shapes: Mapping[str, ShapeRange], *, gpus: Sequence[Gpu] | None = None
) -> AnyPricer | None:
    """Who prices for a recipe's compiler; None where times of its scheme are not predicted (`unpriced` says why).

    Args:
        gpus: None takes those of the recipe.

    Raises:
        EngineError, InputError: see `gpus_of`.
    """
    if unpriced(recipe):
        return None
    known = gpus_of(recipe) if gpus is None else gpus
    if backend_named(recipe.backend).predicts:
        return Pricer(recipe=recipe, shapes=shapes, gpus=known)
    return TensorRtPricer(recipe=recipe, shapes=shapes, gpus=known)


def other_of(recipe: Recipe) -> Recipe:
    """The same for the other compiler: TensorRT-RTX's for TensorRT, and TensorRT's for TensorRT-RTX."""
    derived = not backend_named(recipe.backend).predicts
    other = next(b for b in backends().values() if b.predicts == derived)
    return recipe.compiled_by(other.name, recipe.targets)


def served(recipe: Recipe, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those of some GPUs that a recipe's compiler compiles for."""
    return [gpu for gpu in gpus if gpu.target in backend_named(recipe.backend).targets]


def no_target_of(recipe: Recipe) -> list[str]:
    """The targets of a recipe, if its compiler has none of them."""
    names = list(map(target_name, recipe.targets))
    return [] if set(names) & set(backend_named(recipe.backend).targets) else names


def unpriced(recipe: Recipe) -> str:
    """Why no times are predicted for a recipe's compiler and scheme; "" where they are."""
    scheme = recipe.settings.label
    if backend_named(recipe.backend).predicts or scheme == "int8":
        return ""
    return f"of {recipe.profile.title}, times are predicted of INT8 and float models only, not of the scheme {scheme}"


def _price(form: FloatForm, engines: Engines | BuildError) -> Price:
    if form.others:
        low, nodes = next(iter(form.others.items()))
        what = f"times of TensorRT are predicted of INT8 products only, and {min(nodes)} reads {low}"
        return refused(BuildError(f"{what}. Tune for --compiler rtx, or build it on a GPU."))
    return refused(engines) if isinstance(engines, BuildError) else engines.price(form.int8, form.sharing)


def _unlike(works: Works | BuildError) -> bool:
    """Whether TensorRT has others than an older target's kernels: there are none, or they multiply zeros."""
    return isinstance(works, BuildError) or any(map(fills_groups, works.values()))


def _older(target: str) -> bool:
    return int(target[2:]) < int(SUBSTITUTE[2:])


def _compiled_for(gpu: Gpu, targets: Collection[str]) -> str:
    return gpu.target if gpu.target in targets else SUBSTITUTE
