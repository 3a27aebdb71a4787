"""How close what is deployed is to the float model: as it runs, as its kernels round, tensor by tensor, and to labels.

files of both models, samples -> `judged` -> `Judged`. Must not decide what passes: the report does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calib_data import Samples
from engines.backends.layers import LayerTable
from engines.core import arithmetic, onnx_runtime as ort
from engines.verify.report import OF_VOLUMES, Report
from qdq.build.compiler import of_another
from qdq.build.recipe import Recipe
from qdq.core.progress import Progress
from qdq.deploy.check import evaluate, float_session
from qdq.deploy.costs.errors import TensorErrors, tensor_errors
from qdq.deploy.costs.find import with_costs
from qdq.deploy.steps.shipped import ShippedModel
from qdq.deploy.volumes.slices import Keeper
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.model.storage import load


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What comparisons with the float model found.

    Attributes:
        check: of the engine where it runs here, else of the Q/DQ model.
        as_compiled: of the Q/DQ model, rounded where the engine's kernels write; None without an engine.
        errors: of each tensor.
        label_dice: as of `DeployReport`.
        notes: what a reader must know of them.
    """

    check: Report
    as_compiled: Report | None
    errors: TensorErrors
    label_dice: dict[str, dict[int, float]]
    notes: tuple[str, ...]


def judged(
    model_path: Path,
    output: Path,
    engine: Path | None,
    *,
    prepared: Model,
    shipped: ShippedModel,
    table: LayerTable | None,
    samples: Samples,
    labels: Sequence[np.ndarray],
    recipe: Recipe,
    custom_ops: Sequence[str],
    pictures: Keeper | None,
    on_progress: Progress,
) -> Judged:
    """Compare on samples.

    Args:
        model_path: the float model as the user gave it.
        output: the Q/DQ model.
        engine: where it runs here; else the Q/DQ model stands for it.
        prepared: the float model as it was quantized.
        shipped: the Q/DQ model and what it was made of.
        table: layers of the engine; None where there is none.
        samples: to run.
        labels: as of `deploy`.
        recipe: with limits, and how to run.
        custom_ops: libraries of custom operators.
        pictures: keeps slices of whole volumes; None: nothing does.

    Raises:
        QdqError, EngineError, DataError: as of `evaluate`.
    """
    against_float = partial(
        evaluate,
        model_path,
        samples=samples,
        alarms=recipe.alarms,
        task=recipe.task,
        class_axis=recipe.class_axis,
        units=recipe.units,
        custom_ops=custom_ops,
        on_progress=on_progress,
    )
    check = against_float(
        engine or output,
        engine_backend=recipe.backend if engine else None,
        running=recipe.running,
        limits=recipe.limits,
        whole=recipe.whole,
        pictures=pictures,
    )
    check = with_costs(
        check,
        prepared,
        shipped.finished.model,
        samples,
        settings=recipe.settings,
        calibrated_on=shipped.made.table.count,
        on_progress=on_progress,
    )
    errors = tensor_errors(shipped.made, shipped.finished.model, samples, on_progress=on_progress)
    as_compiled: Report | None = None
    notes: tuple[str, ...] = (check.note,)
    if table:
        of_outputs = {name: value for name, value in recipe.limits.items() if name not in OF_VOLUMES}
        as_compiled = against_float(output, as_compiled=table, limits=of_outputs)
        other = of_another(recipe.settings.compiler, table.backend, table.version)
        notes = (other, table.note, check.note, as_compiled.note.removeprefix(f"{check.note}; "))
    label_dice = {}
    if labels:
        opened = float_session(load(model_path), str(model_path), custom_ops=custom_ops)
        label_dice["float model"] = _label_dice(opened, samples, labels)
        opened = arithmetic.session(output, custom_ops=custom_ops)
        label_dice["shipped model"] = _label_dice(opened, samples, labels)
    return Judged(check=check, as_compiled=as_compiled, errors=errors, label_dice=label_dice, notes=notes)


def _label_dice(session: Any, samples: Iterable[Sample], labels: Sequence[np.ndarray]) -> dict[int, float]:
    """Dice of each class that the labels hold, over all samples: 2 |both| / (|predicted| + |labelled|)."""
    classes = [int(k) for k in np.unique(np.concatenate([np.unique(label) for label in labels]))]
    both, either = np.zeros(len(classes)), np.zeros(len(classes))
    for outputs, label in zip(ort.run(session, samples), labels, strict=True):
        found = next(iter(outputs.values())).argmax(1)
        for row, k in enumerate(classes):
            both[row] += np.sum((found == k) & (label == k))
            either[row] += np.sum(found == k) + np.sum(label == k)
    return {k: float(2 * b / e) for k, b, e in zip(classes, both, either, strict=True)}
