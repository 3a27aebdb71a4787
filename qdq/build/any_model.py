"""An engine of an ONNX file as a user has it: of a float model that the compiler refuses, in the form that it takes.

file -> its engine; where that is refused, file -> prepared model -> engine of that, and the prepared model on disk.
And what its nodes run in, and its predicted time, without a file that stays.
Must not quantize, or write where a model lies that it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.backend import predicting
from engines.backends.compiler import Engine, ShapeRange
from engines.backends.layers import LayerTable
from engines.core.errors import BuildError
from engines.core.files import Scratch
from engines.cost.gpus import gpu_named
from engines.cost.predict import Cost, predict
from engines.verify.audit import Audit, audit
from qdq.build.engine import compile_engine, shape_ranges
from qdq.build.recipe import Recipe
from qdq.core.errors import ModelError
from qdq.model.model import Model
from qdq.model.storage import is_quantized, load, save
from qdq.passes.prepare import prepare

if TYPE_CHECKING:
    from qdq.core.progress import Progress


def compile_any(
    model: Model,
    prepared: Path,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    timing_cache: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[Engine, Path | None]:
    """The engine of a model as it is; of a float model that is refused so, as `prepare` writes it.

    Args:
        model: as it was loaded, quantized or not.
        prepared: where to write the prepared model, if that is what compiles; replaced if it is there.

    Returns:
        The engine, and `prepared` where it was compiled from that.

    Raises:
        EngineError: the file is refused; where the prepared model is tried and refused too, what was said of that.
    """

    def compiled(form: Model | Path, *, last: bool = True) -> Engine:
        return compile_engine(
            form, recipe=recipe, shapes=shapes, timing_cache=timing_cache, on_progress=on_progress, locate=last
        )

    alone = is_quantized(model) or (model.file and prepared.exists() and prepared.samefile(model.file))
    try:
        return compiled(model, last=bool(alone)), None
    except BuildError:
        if alone:
            raise
    try:
        ready = prepare(model)
    except ModelError:
        return compiled(model), None  # refused again, with the node
    with Scratch() as folder:
        save(ready, folder / "prepared.onnx")
        engine = compiled(folder / "prepared.onnx")
    save(ready, prepared)
    return engine, prepared


def audit_model(path: Path, recipe: Recipe, on_progress: Progress | None = None) -> Audit:
    """Compile an ONNX file and say what each of its nodes runs in; nothing is written.

    Raises:
        EngineError: see `compile_any`.
    """
    model = load(path)
    shapes = shape_ranges(model, recipe.shapes, None)
    with _compiled(model, recipe, shapes, on_progress) as (form, table):
        return audit(form.proto, table, shapes=shapes)


def price(path: Path, recipe: Recipe, gpu: str, on_progress: Progress | None = None) -> Cost:
    """Compile an ONNX file for a GPU at the usual shapes and predict the time of each kernel; nothing is written.

    Raises:
        EngineError: an unknown GPU; see `compile_any`.
    """
    chosen, model = gpu_named(gpu), load(path)
    ranges = shape_ranges(model, recipe.shapes, None)
    shapes = {name: ShapeRange.fixed(shape.opt) for name, shape in ranges.items()}
    recipe = recipe.compiled_by(predicting(recipe.backend).name, (chosen.target,))
    with _compiled(model, recipe, shapes, on_progress) as (form, table):
        return predict(form.proto, table, chosen, shapes=shapes)


@contextmanager
def _compiled(
    model: Model, recipe: Recipe, shapes: Mapping[str, ShapeRange], on_progress: Progress | None
) -> Iterator[tuple[Model, LayerTable]]:
    """The form of a model that the compiler takes, and its layers; it is gone at the end."""
    with Scratch() as folder:
        engine, source = compile_any(
            model, folder / "prepared.onnx", recipe=recipe, shapes=shapes, on_progress=on_progress
        )
        yield load(source) if source else model, engine.table
