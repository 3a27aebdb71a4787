"""An engine of an ONNX file as a user has it: of a float model that the compiler refuses, in the form that it takes.

file -> its engine; where that is refused, file -> prepared model -> engine of that, and the prepared model on disk.
And what its nodes run in, and its predicted time, without a file that stays.
Must not quantize, or write where a model lies that it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.backend import predicting
from engines.backends.compiler import Engine, ShapeRange
from engines.backends.layers import LayerTable
from engines.core.documents import replace
from engines.core.errors import BuildError, UnsupportedTargetError
from engines.core.files import Scratch
from engines.cost.gpus import gpu_named
from engines.cost.predict import Cost, predict
from engines.verify.audit import Audit, audit
from qdq.build.branches import ALONE, as_asked
from qdq.build.engine import shape_ranges
from qdq.build.kept import kept_engine
from qdq.build.recipe import Recipe
from qdq.core.errors import ModelError
from qdq.model.model import Model
from qdq.model.storage import is_quantized, load, save
from qdq.passes.prepare import prepare
from qdq.passes.steered import held, said, value_noted

if TYPE_CHECKING:
    from qdq.core.progress import Progress


def compile_any(
    model: Model,
    prepared: Path,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress | None = None,
) -> tuple[Engine, Model | None]:
    """The engine of a model as it is; of one that is refused so, in the first form that compiles.

    The forms are: of a float model what `prepare` makes of it; of one that inputs steer, that with the values that it
    was quantized for. Inputs that the recipe holds are held in every form.

    Args:
        model: as it was loaded, quantized or not.
        prepared: where to write another form, if that is what compiles; replaced if it is there.

    Returns:
        The engine, and the form that it was compiled from where `prepared` holds that.

    Raises:
        EngineError: the file is refused; where other forms are tried and refused too, what was said of the last.
        InputError: an input cannot be held.
    """

    others = _forms(model, prepared, recipe)
    form, following = next(others), list[Model]()

    def is_last() -> bool:
        following.extend(islice(others, 1))
        return not following

    with Scratch() as folder:
        while True:
            source = model if form is model else folder / "form.onnx"
            if form is not model:
                save(form, folder / "form.onnx")
            try:
                engine = kept_engine(source, recipe=recipe, shapes=shapes, on_progress=on_progress, locate=is_last)
            except BuildError:
                if not following:
                    raise
                form = following.pop()
                continue
            if form is model:
                return engine, None
            save(form, prepared)
            return engine, form


def _forms(model: Model, prepared: Path, recipe: Recipe) -> Iterator[Model]:
    """The forms of a model to try, one after the other."""
    ready = model
    if not recipe.held_inputs:
        yield model
    if not is_quantized(model) and not (model.file and prepared.exists() and prepared.samefile(model.file)):
        try:
            ready = prepare(model)
        except ModelError:
            if recipe.held_inputs:
                raise
            return
    if recipe.held_inputs:
        yield as_asked(ready, recipe.held_inputs)
        return
    if ready is not model:
        yield ready
    if values := value_noted(ready):
        alone = held(ready, values)
        note = f"input {said(values)} in all samples that it was calibrated with: {ALONE}"
        yield replace(alone, notes=(*alone.notes, note))


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
        UnsupportedTargetError: the compiler whose kernels are predicted has no target of that GPU.
    """
    chosen, model, backend = gpu_named(gpu), load(path), predicting(recipe.backend)
    if chosen.target not in backend.targets:
        raise UnsupportedTargetError(
            f"Times of kernels are predicted as {backend.title} compiles them, which has no target {chosen.target} "
            f"({gpu}). `qdq tune` and `qdq deploy` with --gpu {gpu} predict the time of the whole model."
        )
    ranges = shape_ranges(model, recipe.shapes, None)
    shapes = {name: ShapeRange.fixed(shape.opt) for name, shape in ranges.items()}
    recipe = recipe.compiled_by(backend.name, (chosen.target,))
    with _compiled(model, recipe, shapes, on_progress) as (form, table):
        return predict(form.proto, table, chosen, shapes=shapes)


@contextmanager
def _compiled(
    model: Model, recipe: Recipe, shapes: Mapping[str, ShapeRange], on_progress: Progress | None
) -> Iterator[tuple[Model, LayerTable]]:
    """The form of a model that the compiler takes, and its layers; it is gone at the end."""
    with Scratch() as folder:
        engine, form = compile_any(
            model, folder / "prepared.onnx", recipe=recipe, shapes=shapes, on_progress=on_progress
        )
        yield form or model, engine.table
