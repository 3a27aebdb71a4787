"""The price of a variant: it is compiled for each target, its kernels priced by `engines.cost`, equal graphs only once.

Model -> structure hash -> known price, or temporary file -> engine's layers -> predicted microseconds -> Price
A structure is the graph without the values of weights, on which no kernel depends. It must not search.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx import TensorProto

from engines.backends.backend import backend_named
from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError, UnsupportedTargetError, import_runtime
from engines.core.files import Scratch, read_file
from engines.cost.constants import CONSTANTS
from engines.cost.gpus import GPUS, Gpu, gpu_named, usual_gpu
from qdq.build.cost import Kernel, Price
from qdq.build.engine import compile_engine
from qdq.build.processes import Job, Workers, price_of
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.core.files import write_text
from qdq.core.resources import cores
from qdq.model.model import Model
from qdq.model.nodes import without_initializers
from qdq.model.storage import save

FORMAT = "qdq.price/2"
MOST_WORKERS = 4  # compilers at a time: each needs some hundred MB
SLOW_S = 0.2  # a compile that takes longer is worth a process
SMALL = 64  # elements up to which a constant may be an argument, such as a shape or an axis


@dataclass(slots=True)
class Pricer:
    """Prices models for the targets of a recipe; `us` is the mean over the targets.

    Attributes:
        recipe: its targets and backend.
        shapes: of each input; the usual one is priced.
        gpus: one per target.
        cache: folder of known prices, or None to know those of this process only.
        failure: the compiler's last refusal.
    """

    recipe: Recipe
    shapes: Mapping[str, ShapeRange]
    gpus: Sequence[Gpu]
    cache: Path | None = None
    failure: BuildError | None = None
    _known: dict[str, Price] = field(default_factory=dict)
    _workers: Workers | None = None
    _slow: bool = False

    def __call__(self, model: Model) -> Price:
        """The price of a model; infinite where it does not compile."""
        return self.many([model])[0]

    def many(self, models: Sequence[Model]) -> list[Price]:
        """The price of each model, `width` at a time."""
        keys = [self._key(model) for model in models]
        unknown = {key: model for key, model in zip(keys, models, strict=True) if not self._stored(key)}
        with Scratch() as folder:
            found = self._compiled([self._job(model, folder / key) for key, model in unknown.items()])
        for key, price in zip(unknown, found, strict=True):
            self._known[key] = price
            if self.cache is not None and math.isfinite(price.us):  # a refusal may be of the machine, not of the model
                self.cache.mkdir(parents=True, exist_ok=True)
                write_text(self.cache / f"{key}.json", json.dumps({"format": FORMAT, **asdict(price)}))
        return [self._known[key] for key in keys]

    def refusal(self, model: Model) -> BuildError:
        """Why a model does not compile, with the node that the compiler refuses; the last refusal, if it does."""
        with Scratch() as folder:
            job = self._job(model, folder / "refused")
            try:
                compile_engine(job.path, recipe=self.recipe, shapes=job.shapes)
            except BuildError as error:
                return error
        return self.failure or BuildError("No way to write the model compiles.")

    @property
    def width(self) -> int:
        """How many models are best priced at a time."""
        return self._workers.count if self._workers and self._slow else 1

    @contextmanager
    def parallel(self) -> Iterator[None]:
        """Inside, models that take long to compile are compiled in processes of their own, one per core."""
        self._workers = Workers(min(cores(), MOST_WORKERS), self.recipe.backend)
        try:
            yield
        except BaseException:
            self._workers.close(now=True)
            raise
        else:
            self._workers.close()
        finally:
            self._workers = None

    def _stored(self, key: str) -> bool:
        if key not in self._known and self.cache is not None and (price := _read(self.cache / f"{key}.json")):
            self._known[key] = price
        return key in self._known

    def _job(self, model: Model, folder: Path) -> Job:
        folder.mkdir()
        save(model, folder / "model.onnx")
        fixed = {name: ShapeRange.fixed(shape.opt) for name, shape in self.shapes.items()}
        return Job(path=folder / "model.onnx", gpus=tuple(self.gpus), shapes=fixed, backend=self.recipe.backend)

    def _compiled(self, jobs: Sequence[Job]) -> list[Price]:
        if self._workers and self._slow:
            answers = self._workers(jobs)
        else:
            began = time.monotonic()
            answers = [_here(job) for job in jobs]
            self._slow = self._slow or time.monotonic() - began > SLOW_S * max(len(jobs), 1)
        self.failure = next((a for a in reversed(answers) if isinstance(a, BuildError)), self.failure)
        return [a if isinstance(a, Price) else Price(us=math.inf, refusal=str(a)) for a in answers]

    def _key(self, model: Model) -> str:
        """SHA-256 of the structure and of everything else that a price depends on."""
        proto = without_initializers(model.proto)
        for tensor in model.graph.initializer:
            weight = math.prod(tensor.dims) > SMALL or tensor.data_type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
            light = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            proto.graph.initializer.append(light if weight else tensor)
        runtime = backend_named(self.recipe.backend).runtime
        version = f"{runtime} {import_runtime(runtime).__version__}"
        made = [
            version,
            repr(CONSTANTS),
            [repr(g) for g in self.gpus],
            sorted((n, repr(s)) for n, s in self.shapes.items()),
        ]
        return hashlib.sha256(proto.SerializeToString(deterministic=True) + repr(made).encode()).hexdigest()


def cost_model(recipe: Recipe, shapes: Mapping[str, ShapeRange], cache: Path | None = None) -> Pricer | None:
    """Who prices variants for a recipe; None where it tunes nothing, or its compiler's times are predicted by nobody.

    Raises:
        QdqError, EngineError: see `gpus_of`.
    """
    if recipe.tune == "off" or not backend_named(recipe.backend).predicts:
        return None
    return Pricer(recipe=recipe, shapes=shapes, gpus=gpus_of(recipe), cache=cache)


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


def _here(job: Job) -> Price | BuildError:
    try:
        return price_of(job)
    except BuildError as error:
        return error


def _read(path: Path) -> Price | None:
    """A stored price; None where there is no file, or one of another format, or a damaged one."""
    try:
        content = json.loads(read_file(path))
        return _stored_price(content) if content.pop("format") == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _stored_price(content: Mapping[str, Any]) -> Price:
    """The price that `asdict` made plain values of."""
    kernels = tuple(Kernel(**{**k, "nodes": tuple(k["nodes"])}) for k in content["kernels"])
    other = None if content["other"] is None else _stored_price(content["other"])
    return Price(**{**content, "us": float(content["us"]), "kernels": kernels, "other": other})
