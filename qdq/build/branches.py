"""A model that the compiler takes only for one value of the inputs that steer it, with the value that all samples have.

Model, samples -> itself if it compiles; else with the inputs that choose a branch or count turns held at that value.
A branch may be impossible at the sizes that the other one needs, and an engine has both at the same sizes; and sizes
must not depend on how often a Loop turns. It must not hold an input of a model that compiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError
from engines.core.files import Scratch
from qdq.build.engine import compile_engine
from qdq.build.machine import stand_in
from qdq.build.recipe import Recipe
from qdq.core.progress import Progress
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.model.storage import save
from qdq.passes.composites import written_out
from qdq.passes.steered import held, steering


def with_possible_branches(
    model: Model,
    samples: Iterable[Sample],
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress | None = None,
) -> Model:
    """A prepared model with the branches that the compiler takes.

    Args:
        model: prepared; one without an If or Loop that an input steers is not compiled here.
        samples: all that the model is to be calibrated with and checked on.

    Raises:
        BuildError: it is refused, and the samples have several values.
    """
    steered = steering(model)
    if not steered:
        return model
    refusal = _refusal(model, recipe, shapes, on_progress)
    if refusal is None:
        return model
    values = _common(samples, steered)
    node = next(iter(steered.values()))
    if values is None:
        names = ", ".join(map(repr, steered))
        raise BuildError(
            f"{refusal} {node} is steered by input {names}, of which the samples have several values, and the compiler "
            "does not take them together at one set of sizes. Give samples of one value: the engine is then for that "
            "value alone. Make one engine for each value.",
            nodes=(node.partition(" ")[2][1:-1],),
        )
    alone = held(model, values)
    if _refusal(alone, recipe, shapes, on_progress) is not None:
        return model  # it is not for the branches; the refusal is met again, and the node searched for
    said = ", ".join(f"{name!r} is {value.item()}" for name, value in values.items())
    note = (
        f"input {said} in all samples, and steers {node}, which the compiler takes for one value at these sizes: the "
        "engine is for that value alone, whatever it is fed"
    )
    return replace(alone, notes=(*alone.notes, note))


def _common(samples: Iterable[Sample], names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """The values that inputs have in all samples; None where they differ."""
    names, found = tuple(names), dict[str, np.ndarray]()
    for sample in samples:
        found = found or {name: np.asarray(sample[name]) for name in names}
        if any(not np.array_equal(found[name], sample[name]) for name in names):
            return None
    return found or None


def _refusal(
    model: Model, recipe: Recipe, shapes: Mapping[str, ShapeRange], on_progress: Progress | None
) -> BuildError | None:
    """What the compiler says against a model; None where it takes it."""
    with Scratch() as folder:
        save(written_out(model), folder / "tried.onnx")
        try:
            compile_engine(
                folder / "tried.onnx",
                recipe=stand_in(recipe, model.proto),
                shapes=shapes,
                on_progress=on_progress,
                label="Compile branches",
                locate=False,
            )
        except BuildError as error:
            return error
    return None
