"""The price of a variant: it is compiled for each target, its kernels priced by `engines.cost`, equal graphs only once.

Model -> structure hash -> known price, or engine's kernels -> predicted microseconds -> Price
It must not search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.backends.backend import backend_named
from engines.backends.compiler import ShapeRange
from engines.backends.layers import Layer, LayerTable
from engines.core.errors import BuildError, UnsupportedTargetError
from engines.cost.constants import CONSTANTS
from engines.cost.gpus import GPUS, Gpu, gpu_named, usual_gpu
from engines.cost.predict import Cost, EngineWork, engine_work
from qdq.build.cost import Kernel, Price
from qdq.build.pricing.compiles import Compiles
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.model.model import Model


@dataclass(slots=True)
class Pricer:
    """Prices models for the targets of a recipe; `us` is the mean over the targets.

    Attributes:
        recipe: its targets and backend.
        shapes: of each input; the usual one is priced.
        gpus: one per target.
    """

    recipe: Recipe
    shapes: Mapping[str, ShapeRange]
    gpus: Sequence[Gpu]
    _known: dict[str, Price] = field(default_factory=dict)
    _compiles: Compiles = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is compiled yet."""
        targets = tuple(dict.fromkeys(gpu.target for gpu in self.gpus))
        self._compiles = Compiles(backend=self.recipe.backend, targets=targets, shapes=self.shapes)

    @property
    def told(self) -> Sequence[Gpu]:
        """The GPUs for who reads the times."""
        return self.gpus

    def __call__(self, model: Model) -> Price:
        """The price of a model; infinite where it does not compile."""
        return self.many([model])[0]

    def many(self, models: Sequence[Model]) -> list[Price]:
        """The price of each model, `width` at a time."""
        keys = [self._key(model) for model in models]
        unknown = {key: model for key, model in zip(keys, models, strict=True) if key not in self._known}
        for key, works in zip(unknown, self._compiles(unknown), strict=True):
            price = refused(works) if isinstance(works, BuildError) else priced(works, self.gpus)
            self._known[key] = price
        return [self._known[key] for key in keys]

    def begin(self, model: Model) -> None:
        """Compile a model beside what follows, if there is a process for it."""
        key = self._key(model)
        if key not in self._known:
            self._compiles.begin(key, model)

    def _key(self, model: Model) -> str:
        return self._compiles.key(model, CONSTANTS, *self.gpus)

    def refusal(self, model: Model) -> BuildError:
        """Why a model does not compile, as of `Compiles`."""
        return self._compiles.refusal(model)

    @property
    def width(self) -> int:
        """How many models are best priced at a time."""
        return self._compiles.width

    def parallel(self) -> AbstractContextManager[None]:
        """Inside, models that take long to compile are compiled in processes of their own, one per core."""
        return self._compiles.parallel()


def priced(works: Mapping[str, EngineWork], gpus: Sequence[Gpu]) -> Price:
    """The mean over GPUs of engines' times.

    Where FP16 products may accumulate in either type, the price under the other assumption is that of the same kernels.

    Args:
        works: of each GPU's target.
    """

    weights = max(work.weight_bytes for work in works.values())
    memory = max(work.weight_bytes + work.activation_bytes for work in works.values())

    def on(some: Sequence[Gpu]) -> Price:
        price = mean([(works[gpu.target].layers, works[gpu.target].on(gpu)) for gpu in some])
        return replace(price, weight_bytes=weights, memory_bytes=memory)

    others = [gpu.other_accumulation() for gpu in gpus]
    if not any(others):
        return on(gpus)
    return replace(on(gpus), other=on([other or gpu for gpu, other in zip(gpus, others, strict=True)]))


def priced_engine(
    model: Path, table: LayerTable, *, recipe: Recipe, shapes: Mapping[str, ShapeRange]
) -> tuple[Price | None, tuple[str, ...]]:
    """The price of an engine that is built, and the GPUs it is predicted for; None where none can be predicted.

    That is for several targets, dynamic shapes, a GPU that is not known, or a compiler whose times are derived.
    """
    if not backend_named(recipe.backend).predicts or len(table.targets) != 1 or table.bytes_moved is None:
        return None, ()
    try:
        gpus = gpus_of(recipe)
    except UnsupportedTargetError:
        return None, ()
    return priced({table.targets[0]: engine_work(model, table, shapes=shapes)}, gpus), tuple(gpu.name for gpu in gpus)


def refused(error: BuildError) -> Price:
    """The price of a model that does not compile."""
    return Price(us=math.inf, refusal=str(error))


def mean(costs: Sequence[tuple[Sequence[Layer], Cost]]) -> Price:
    """The mean of the times of engines, each with its layers; its errors are the largest, not known if one is not."""
    kernels = [
        Kernel(
            us=kernel.us / len(costs),
            macs=kernel.macs,
            bytes=kernel.bytes,
            nodes=kernel.onnx_nodes,
            signature=signature(layer),
            kind=kernel.kind,
            dtype=kernel.dtype if kernel.macs else "",
            bound=kernel.bound,
        )
        for layers, cost in costs
        for layer, kernel in zip(layers, cost.kernels, strict=True)
    ]
    return Price(
        us=math.fsum(k.us for k in kernels),
        kernels=tuple(kernels),
        error=_largest(cost.error for _, cost in costs),
        ratio_error=_largest(cost.ratio_error for _, cost in costs),
        each=tuple(math.fsum(kernel.us for kernel in cost.kernels) for _, cost in costs),
    )


def _largest(errors: Iterable[float | None]) -> float | None:
    every = list(errors)
    known = [error for error in every if error is not None]
    return max(known) if known and len(known) == len(every) else None


def signature(layer: Layer) -> str:
    """What a kernel is, without the compiler's numbering: kind, types and shapes in and out, ONNX nodes."""
    ends = (layer.inputs, layer.outputs)
    reads, writes = (" ".join(sorted(f"{t.dtype}{list(t.shape)}" for t in tensors)) for tensors in ends)
    return f"{layer.kind} {reads} -> {writes} | {' '.join(sorted(layer.onnx_nodes))}"


def gpus_of(recipe: Recipe) -> tuple[Gpu, ...]:
    """A GPU per target of a recipe: those it names, else the one that stands for that generation.

    Raises:
        EngineError: an unknown GPU.
        InputError: a GPU that is not of any target.
        UnsupportedTargetError: no GPU of a target is known.
    """
    named = [gpu_named(gpu) if isinstance(gpu, str) else Gpu.from_mapping(gpu) for gpu in recipe.gpus]
    backend = backend_named(recipe.backend)
    targets = tuple(dict.fromkeys(map(backend.target, recipe.targets)))
    for gpu in named:
        if gpu.target not in targets:
            what = f"GPU {gpu.name} is {gpu.target}, the engine is for {', '.join(targets)}"
            raise InputError(f"{what}: add --target {backend.target(gpu.target)}.")
    found: list[Gpu] = []
    for target in targets:
        mine = [gpu for gpu in named if gpu.target == target]
        usual = usual_gpu(target)
        if not mine and usual is None:
            raise UnsupportedTargetError(
                f"No GPU of target {target} is known to predict times for; there are {', '.join(GPUS)}. Give the "
                "numbers of one as `gpu` in a recipe, or do not tune."
            )
        found += mine or filter(None, [usual])
    return tuple(found)
