"""What the other compiler is predicted to make of a model: one sentence for who may have chosen the wrong one.

prepared model, pricer of one compiler -> its predicted time against FP16 with the other -> a sentence
Of TensorRT that is the exact choice, from one compile. A search for TensorRT-RTX would take minutes, so of it that is
INT8 wherever it is possible, untuned, from two. It must not change what is shipped.
"""

from __future__ import annotations

import math
from textwrap import shorten

from engines.core.documents import replace
from engines.core.errors import BuildError
from qdq.build.pricing.pricer import Pricer
from qdq.build.pricing.tensorrt_pricer import AnyPricer, TensorRtPricer, no_target_of, other_of, served
from qdq.build.recipe import Recipe
from qdq.core.disk.cache import remembered
from qdq.model.as_bytes import identity
from qdq.model.model import Model
from qdq.tune.exact.search import tune_exactly
from qdq.tune.variant_builder import Variant, VariantBuilder

USUAL_TYPE = "fp16"


def elsewhere(prepared: Model, pricer: AnyPricer) -> str:
    """What the other compiler is predicted to make of a model on the same GPUs, or why that is not predicted."""
    recipe = other_of(pricer.recipe)
    kind = USUAL_TYPE if recipe.unquantized_type == "auto" else recipe.unquantized_type
    head, tail = _ends(recipe)
    if recipe.settings.label != "int8":
        return f"{head}not predicted, which it is of INT8 only{tail}"
    try:
        said = _kept(prepared, recipe, pricer, kind)
    except BuildError as error:
        return f"{head}not predicted, for the model does not compile: {shorten(str(error), 200, placeholder=' ...')}"
    return head + said + tail if said else f"{head}it has no such target as {_targets(pricer)}"


def untuned(recipe: Recipe) -> str:
    """What is said of the other compiler where a recipe tunes nothing, so that nothing is compiled for it."""
    other = other_of(recipe)
    head, tail = _ends(other)
    if lacking := no_target_of(other):
        return f"{head}it has no such target as {' or '.join(lacking)}"
    return f"{head}not predicted, for nothing was tuned{tail}"


def _ends(recipe: Recipe) -> tuple[str, str]:
    return f"with {recipe.profile.title}: ", f": --compiler {recipe.profile.name}"


def _kept(prepared: Model, recipe: Recipe, pricer: AnyPricer, kind: str) -> str:
    """What is said between head and tail; where work is kept, what was said of the same model before."""
    derived = isinstance(pricer, TensorRtPricer)
    shapes = sorted((name, repr(shape)) for name, shape in pricer.shapes.items())
    return remembered(
        "elsewhere",
        lambda: (*identity(prepared), recipe.settings.to_mapping(), recipe.backend, kind, shapes, *pricer.gpus),
        lambda: (_searched if derived else _chosen)(prepared, recipe, pricer, kind),
        pack=lambda said: {"said": said.encode()},
        unpack=lambda parts: parts["said"].decode(),
    )


def _chosen(prepared: Model, recipe: Recipe, pricer: AnyPricer, kind: str) -> str:
    """Of TensorRT."""
    judge = TensorRtPricer(recipe=recipe, shapes=pricer.shapes, gpus=pricer.gpus)
    found = tune_exactly(VariantBuilder(model=prepared, settings=recipe.settings, unquantized_types=(kind,)), judge)
    if math.isinf(found.price.us):
        raise judge.refusal(prepared)
    count = len(found.plan.quantized_nodes)
    if not count:
        return f"nothing gains by INT8, predicted {found.plain:.1f} us in {kind.upper()}"
    nodes = f"{count} node{'s' * (count > 1)} in INT8"
    return f"{nodes}, predicted {found.price.us / found.plain:.2f} of {kind.upper()}"


def _searched(prepared: Model, recipe: Recipe, pricer: AnyPricer, kind: str) -> str:
    """Of TensorRT-RTX; "" where it has none of the targets."""
    if not (gpus := served(recipe, pricer.gpus)):
        return ""
    settings = replace(recipe.settings, shift=False)  # the plainest form of INT8
    builder = VariantBuilder(model=prepared, settings=settings, unquantized_types=(kind,))
    usual = builder.usual
    everything = replace(usual, quantized=frozenset(builder.quantizable(usual)))
    judge = Pricer(recipe=recipe, shapes=pricer.shapes, gpus=gpus)
    with judge.parallel():
        plain, quantized = judge.many([builder.model_of(Variant()), builder.model_of(everything)])
    if math.isinf(plain.us + quantized.us):
        raise BuildError(plain.refusal or quantized.refusal)
    name = kind.upper()
    return f"INT8 wherever it is possible is predicted {quantized.us / plain.us:.2f} of {name}, before a search"


def _targets(pricer: AnyPricer) -> str:
    return " or ".join(dict.fromkeys(gpu.target for gpu in pricer.gpus))
