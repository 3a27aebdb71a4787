"""A model that the compiler takes only for one value of the inputs that steer it, with that value.

Model, samples -> itself if it compiles; else with the inputs that choose a branch or count turns held at the value that
all samples have; or at what a user says, whatever compiles.
A branch may be impossible at the sizes that the other one needs, and an engine has both at the same sizes; and sizes
must not depend on how often a Loop turns. It must not hold an input of a model that compiles, unless it is told to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError
from engines.core.files import Scratch
from qdq.build.kept import kept_engine
from qdq.build.machine import stand_in
from qdq.build.recipe import Recipe
from qdq.core.progress import Progress
from qdq.measure.inference.samples import Sample
from qdq.model.model import Held, Model
from qdq.model.storage import save
from qdq.passes.composites import written_out
from qdq.passes.steered import held, said, steering, values_of

ALONE = "the engine is for that value alone, whatever it is fed"


def with_possible_branches(
    model: Model,
    samples: Iterable[Sample] | None,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress | None = None,
) -> Model:
    """A prepared model with the branches that the compiler takes.

    Args:
        model: prepared; one without an If or Loop that an input steers is not compiled here.
        samples: all that the model is to be calibrated with and checked on; None where there are none.

    Raises:
        BuildError: it is refused, and the samples have several values, or there are none.
        InputError: see `held`.
    """
    if recipe.held_inputs:
        return as_asked(model, recipe.held_inputs)
    steered = steering(model)
    if not steered:
        return model
    refusal = _refusal(model, recipe, shapes, on_progress)
    if refusal is None:
        return model
    values = None if samples is None else values_of(samples, steered)
    node = next(iter(steered.values()))
    if values is None:
        several = "" if samples is None else " The samples have several values: make one engine for each value."
        raise BuildError(f"{refusal}{several}", nodes=(node.partition(" ")[2][1:-1],))
    alone = held(model, values)
    if _refusal(alone, recipe, shapes, on_progress) is not None:
        return model  # it is not for the branches; the refusal is met again, and the node searched for
    note = (
        f"input {said(values)} in all samples, and steers {node}, which the compiler takes for one value at these "
        f"sizes: {ALONE}"
    )
    return replace(alone, notes=(*alone.notes, note))


def as_asked(model: Model, values: Mapping[str, Held]) -> Model:
    """A model with inputs held at what a user says; raises as `held`."""
    alone = held(model, values)
    return replace(alone, notes=(*alone.notes, f"input {said(values)}, as asked: {ALONE}"))


def _refusal(
    model: Model, recipe: Recipe, shapes: Mapping[str, ShapeRange], on_progress: Progress | None
) -> BuildError | None:
    """What the compiler says against a model; None where it takes it."""
    with Scratch() as folder:
        save(written_out(model), folder / "tried.onnx")
        try:
            kept_engine(
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
