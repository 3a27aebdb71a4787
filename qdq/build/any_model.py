"""An engine of an ONNX file as a user has it: of a float model that the compiler refuses, in the form that it takes.

file -> its engine; where that is refused, file -> prepared model -> engine of that, and the prepared model on disk.
Must not quantize, or write where a model lies that it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.compiler import Engine, ShapeRange
from engines.core.errors import BuildError
from engines.core.files import Scratch
from qdq.build.engine import compile_engine
from qdq.build.recipe import Recipe
from qdq.core.errors import ModelError
from qdq.model.model import Model
from qdq.model.storage import is_quantized, save
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
