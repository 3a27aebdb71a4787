"""What this machine can build and run; and of an engine that it cannot build, who checks the model and how it is built.

recipe -> `builds_here`; where it does not: `stand_in` compiles as a check of syntax and types, `how_to_build` says the
rest. What the stand-in makes of a model is nothing about the engine: neither kernels nor sizes are those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from engines.backends.backend import Backend, backend_named, predicting, target_name
from engines.backends.doctor import gpus
from engines.core.errors import MissingRuntimeError, UnsupportedTargetError, import_runtime
from engines.core.load import load_graph
from qdq.build.compiler import USUAL_TARGETS, of_another
from qdq.build.recipe import Recipe
from qdq.model.made_for import made_for

LEAST_SM = 80  # Turing is a float target of the stand-in, and has no FP32 products of matrices there


def runs_here(targets: Sequence[str]) -> bool:
    """Whether a GPU of this machine is one of the targets of an engine."""
    return any(gpu.target in map(target_name, targets) for gpu in gpus())


def builds_here(recipe: Recipe) -> bool:
    """Whether the recipe's compiler works here: it needs no GPU, or a GPU of the targets and its runtime are here."""
    backend = backend_named(recipe.backend)
    if not backend.needs_gpu:
        return True
    try:
        import_runtime(backend.runtime)
    except MissingRuntimeError:
        return False
    return runs_here(recipe.targets)


def compiler_here(recipe: Recipe) -> Backend:
    """The backend that compiles here: the recipe's, or the one that stands in for it."""
    return backend_named(recipe.backend) if builds_here(recipe) else predicting(recipe.backend)


def stand_in(recipe: Recipe, model: ModelProto) -> Recipe:
    """The recipe that compiles a model here: the same, or that of the stand-in for a target with the model's types."""
    if builds_here(recipe):
        return recipe
    other = predicting(recipe.backend)
    own = [name for t in recipe.targets if (name := target_name(t)) in other.targets]
    able = [t for t in dict.fromkeys((*own, *USUAL_TARGETS, *other.targets)) if int(t[2:]) >= LEAST_SM]
    return recipe.compiled_by(other.name, (next((t for t in able if _has_types(other, model, t)), able[0]),))


def _has_types(backend: Backend, model: ModelProto, target: str) -> bool:
    try:
        backend.check_targets(model, [target])
    except UnsupportedTargetError:
        return False
    return True


def model_of_another(path: Path, backend: str, version: str) -> str:
    """A warning where a model was quantized for another compiler than made its layers; "" where not, or unknown."""
    return of_another(made_for(load_graph(path)), backend, version)


def how_to_build(script: str, recipe: Recipe) -> str:
    """Why there is no engine of a model here, and the script that builds it on a machine that can."""
    needs = f"{recipe.profile.title} and a GPU of {' or '.join(map(target_name, recipe.targets))}"
    once = ", once for each: an engine is for the GPU that it is built on" if len(recipe.targets) > 1 else ""
    return f"no engine was built, which takes {needs}; there: sh {script}{once}"
