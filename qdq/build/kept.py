"""Engines that an earlier run built of the same model, for the same targets, by the same compiler and options.

Model + recipe + shapes -> key -> engine and layers as they were built, else built now and kept.
Must not keep a refusal, which may be of the machine, nor an engine that a file of kernel timings had a part in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto

from engines.backends.backend import backend_named
from engines.backends.compiler import Engine, ShapeRange
from engines.backends.doctor import gpus
from engines.backends.layers import LayerTable
from engines.core.errors import import_runtime
from engines.verify.manifest import sha256_model
from qdq.build.engine import checked, compile_engine
from qdq.build.machine import stand_in
from qdq.build.recipe import Recipe
from qdq.core.disk.cache import remembered
from qdq.core.progress import Progress
from qdq.model.as_bytes import identity
from qdq.model.model import Model


def kept_engine(
    model: Model | Path,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress | None = None,
    label: str = "Compile",
    locate: bool | Callable[[], bool] = True,
) -> Engine:
    """As `compile_engine`; where work is kept, the engine of an earlier run."""
    return remembered(
        "engines",
        lambda: _key(model, recipe, shapes),
        lambda: compile_engine(
            model, recipe=recipe, shapes=shapes, on_progress=on_progress, label=label, locate=locate
        ),
        pack=lambda engine: None if recipe.tensorrt.timing_cache else _packed(engine),
        unpack=lambda parts: Engine(data=parts["engine"], table=LayerTable.from_json(parts["layers"])),
    )


def kept_check(model: Path, graph: ModelProto, recipe: Recipe, shapes: Mapping[str, ShapeRange], tell: Progress) -> str:
    """What `checked` says; where work is kept, what it said in an earlier run."""
    said, _ = remembered(
        "checks",
        lambda: (*_key(model, stand_in(recipe, graph), shapes), recipe.profile.title),
        lambda: checked(model, graph, recipe, shapes, tell),
        pack=lambda found: {"said": found[0].encode()} if found[1] else None,
        unpack=lambda parts: (parts["said"].decode(), True),
    )
    return said


def _key(model: Model | Path, recipe: Recipe, shapes: Mapping[str, ShapeRange]) -> tuple[object, ...]:
    """All that an engine depends on, with the GPU where the compiler times kernels on it."""
    backend = backend_named(recipe.backend)
    made_of = (sha256_model(model),) if isinstance(model, Path) else identity(model)
    compiler = (backend.name, import_runtime(backend.runtime).__version__, recipe.targets)
    options = sorted(recipe.tensorrt.recorded().items()), sorted((name, repr(s)) for name, s in shapes.items())
    return (made_of, compiler, *options, gpus() if backend.needs_gpu else ())


def _packed(engine: Engine) -> dict[str, bytes]:
    return {"engine": engine.data, "layers": engine.table.to_json().encode()}
