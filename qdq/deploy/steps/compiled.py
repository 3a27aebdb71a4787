"""The compiler's part: an engine and the float model compiled in the same way, or the script that builds it elsewhere.

a Q/DQ model's file -> `compiled` -> layers of each, what lacks and why. Must not judge any of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.backends.compiler import ShapeRange
from engines.backends.layers import LayerTable
from engines.core.errors import BuildError
from qdq.build.engine import save_engine
from qdq.build.kept import kept_check, kept_engine
from qdq.build.machine import builds_here, how_to_build
from qdq.build.recipe import Recipe
from qdq.build.script.write import save_build_script
from qdq.core.progress import Progress
from qdq.deploy.steps.shipped import ShippedModel, provenance
from qdq.model.model import Model
from qdq.model.storage import save
from qdq.passes.composites import written_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of a Q/DQ model.

    Attributes:
        table: layers of its engine; None where that is built elsewhere.
        fp32_table: layers of the float model; None where there is no engine, or it does not compile.
        fp16_table: the same of the float model in FP16.
        not_built: how the engine is built, where it was not.
        notes: of options, or of what was not built.
        reason: why there is nothing to compare with, or what a compile found of a model that is built elsewhere.
    """

    table: LayerTable | None = None
    fp32_table: LayerTable | None = None
    fp16_table: LayerTable | None = None
    not_built: str = ""
    notes: tuple[str, ...]
    reason: str


def compiled(
    output: Path,
    engine_path: Path,
    *,
    shipped: ShippedModel,
    fp32: Model,
    fp16: Model | None,
    in_fp16: bool,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress,
) -> Compiled:
    """Write the engine of a Q/DQ model, or the script that builds it, and say what became of it.

    Args:
        output: file of the Q/DQ model.
        engine_path: where its engine is written, with its layers and manifest; or the script beside it.
        shipped: that model.
        fp32: the float model, to compare with.
        fp16: the float model in FP16; None: it is not compared with.
        in_fp16: `output` is that very model.
        recipe: whose compiler.
        shapes: to compile for.

    Raises:
        BuildError: the Q/DQ model does not compile.
    """
    if not builds_here(recipe):
        proto, opset = shipped.finished.model.proto, shipped.finished.model.opset
        script = save_build_script(output, engine_path.name, recipe=recipe, shapes=shapes)
        return Compiled(
            not_built=how_to_build(script.name, recipe),
            notes=(recipe.profile.about_opset(opset),),
            reason=kept_check(output, proto, recipe, shapes, on_progress),
        )
    engine = kept_engine(output, recipe=recipe, shapes=shapes, on_progress=on_progress)
    save_engine(engine, engine_path, output, recipe=recipe, shapes=shapes, made_from=provenance(shipped.made))
    place = output.parent / "float"
    fp32_table, reason = _float_table(written_out(fp32), place, recipe, shapes, on_progress, kind="FP32")
    fp16_table: LayerTable | None = engine.table
    if not in_fp16:
        fp16_table, _ = _float_table(fp16, place, recipe, shapes, on_progress, kind="FP16")
    return Compiled(
        table=engine.table,
        fp32_table=fp32_table,
        fp16_table=fp16_table,
        notes=tuple(recipe.option_notes),
        reason=reason,
    )


def _float_table(
    model: Model | None,
    place: Path,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress,
    *,
    kind: str,
) -> tuple[LayerTable | None, str]:
    """The layers of a float model compiled in the same way, or None and why it does not compile."""
    if model is None:
        return None, ""
    place.mkdir()
    try:
        save(model, place / "float.onnx")
        return kept_engine(
            place / "float.onnx", recipe=recipe, shapes=shapes, on_progress=on_progress, label=f"Compile {kind}"
        ).table, ""
    except BuildError as error:
        return None, f"The float model does not compile, so there are no sizes to compare with: {error}"
    finally:
        shutil.rmtree(place)
