"""An engine of an ONNX file as a user has it: of a float model that the compiler refuses, in the form that it takes.

file -> its engine; where that is refused, file -> prepared model -> engine of that, and the prepared model on disk.
Must not quantize, or write where a model lies that it was given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.compiler import Engine, ShapeRange
from engines.core.errors import BuildError
from qdq.build.engine import compile_engine
from qdq.build.recipe import Recipe
from qdq.core.errors import ModelError
from qdq.model.storage import is_quantized, load, save
from qdq.passes.prepare import prepare

if TYPE_CHECKING:
    from qdq.core.progress import Progress


def compile_any(
    path: Path,
    prepared: Path,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    timing_cache: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[Engine, Path]:
    """The engine of an ONNX file as it is; of a float model that is refused so, as `prepare` writes it.

    Args:
        path: a model, quantized or not.
        prepared: where to write the prepared model, if that is what compiles; replaced if it is there.

    Returns:
        The engine, and the file that it was compiled from: `path` or `prepared`.

    Raises:
        EngineError: the file is refused; where the prepared model is tried and refused too, what was said of that.
    """

    def compiled(file: Path) -> Engine:
        return compile_engine(file, recipe=recipe, shapes=shapes, timing_cache=timing_cache, on_progress=on_progress)

    try:
        return compiled(path), path
    except BuildError as error:
        model = load(path)
        if is_quantized(model) or (prepared.exists() and prepared.samefile(path)):
            raise
        try:
            model = prepare(model)
        except ModelError:
            raise error from None
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        save(model, Path(folder) / "prepared.onnx")
        engine = compiled(Path(folder) / "prepared.onnx")
    save(model, prepared)
    return engine, prepared
