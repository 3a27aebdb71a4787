"""The judge of `tune`: a model compiled for each target, its kernels priced by a roofline, equal graphs only once.

Model -> structure hash -> known price, or temporary file -> engine's layers -> predicted microseconds -> Price
A structure is the graph without the values of weights, on which no kernel depends. It must not search.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from onnx import TensorProto

from engines.compiler import ShapeRange
from engines.cost import GPUS, Gpu, gpu_named, predict
from engines.errors import BuildError, UnsupportedTargetError, import_runtime
from engines.layers import SYNCHRONIZATION, LayerTable
from engines.rtx import normalise_target
from qdq.build import compile_engine
from qdq.calibrate import Progress
from qdq.errors import InputError
from qdq.files import write_text
from qdq.graph import Model, save, without_initializers
from qdq.recipe import Recipe
from qdq.tap import Sample
from qdq.tune import Kernel, Price, Tuned, tune
from qdq.variant import Workshop

# The GPU that stands for a target where none is named: the fastest in the table of that generation.
USUAL = {"sm75": "t4", "sm80": "a100", "sm86": "a10", "sm89": "rtx4090", "sm120": "rtx5090"}
FORMAT = "qdq.price/1"
FEW = 2  # samples that give the quick ranges and the accuracy of variants
SMALL = 64  # elements up to which a constant may be an argument, such as a shape or an axis


@dataclass(slots=True)
class Pricer:
    """Prices models for the targets of a recipe; `us` is the mean over the targets.

    Attributes:
        recipe: its targets and backend.
        shapes: of each input; the usual one is priced.
        gpus: one per target.
        cache: folder of known prices, or None to know those of this process only.
    """

    recipe: Recipe
    shapes: Mapping[str, ShapeRange]
    gpus: Sequence[Gpu]
    cache: Path | None = None
    failure: BuildError | None = None
    _known: dict[str, Price] = field(default_factory=dict)

    def __call__(self, model: Model) -> Price:
        """The price of a model; infinite where it does not compile."""
        key = self._key(model)
        if key not in self._known:
            stored = None if self.cache is None else self.cache / f"{key}.json"
            price = _read(stored) if stored is not None and stored.exists() else None
            self._known[key] = self._price(model) if price is None else price
            if stored is not None and price is None:
                stored.parent.mkdir(parents=True, exist_ok=True)
                write_text(stored, json.dumps({"format": FORMAT, **asdict(self._known[key])}))
        return self._known[key]

    def _price(self, model: Model) -> Price:
        fixed = {name: ShapeRange.fixed(shape.opt) for name, shape in self.shapes.items()}
        kernels: list[Kernel] = []
        with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
            path = Path(folder) / "model.onnx"
            save(model, path)
            for gpu in self.gpus:
                recipe = replace(self.recipe, targets=(gpu.target,))
                try:
                    table = compile_engine(path, recipe=recipe, shapes=fixed).table
                except BuildError as error:
                    self.failure = error
                    return Price(us=math.inf)
                cost = predict(path, table, gpu, shapes=fixed)
                for kernel, text in zip(cost.kernels, signatures(table), strict=True):
                    us = kernel.us / len(self.gpus)
                    kernels.append(
                        Kernel(us=us, macs=kernel.macs, bytes=kernel.bytes, nodes=kernel.onnx_nodes, signature=text)
                    )
        return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))

    def _key(self, model: Model) -> str:
        """SHA-256 of the structure and of everything else that a price depends on."""
        proto = without_initializers(model.proto)
        for tensor in model.graph.initializer:
            weight = math.prod(tensor.dims) > SMALL or tensor.data_type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
            light = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            proto.graph.initializer.append(light if weight else tensor)
        version = import_runtime("tensorrt_rtx").__version__
        made = [version, [repr(g) for g in self.gpus], sorted((n, repr(s)) for n, s in self.shapes.items())]
        return hashlib.sha256(proto.SerializeToString(deterministic=True) + repr(made).encode()).hexdigest()


def gpus_of(recipe: Recipe) -> tuple[Gpu, ...]:
    """A GPU per target of a recipe: those it names, else the usual one of that generation.

    Raises:
        EngineError: an unknown GPU.
        InputError: a GPU that is not of any target.
        UnsupportedTargetError: no GPU of a target is known.
    """
    named = [gpu_named(gpu) if isinstance(gpu, str) else Gpu.from_mapping(gpu) for gpu in recipe.gpus]
    targets = tuple(dict.fromkeys(normalise_target(t) if recipe.backend == "rtx" else t for t in recipe.targets))
    for gpu in named:
        if gpu.target not in targets:
            raise InputError(
                f"GPU {gpu.name} is {gpu.target}, the engine is for {', '.join(targets)}: add --target {gpu.target}."
            )
    found: list[Gpu] = []
    for target in targets:
        mine = [gpu for gpu in named if gpu.target == target]
        if not mine and target not in USUAL:
            raise UnsupportedTargetError(
                f"No GPU of target {target} is known to predict times for; there are {', '.join(GPUS)}. Give the "
                "numbers of one as `gpu` in a recipe, or do not tune."
            )
        found += mine or [GPUS[USUAL[target]]]
    return tuple(found)


def find_plan(
    prepared: Model, pricer: Pricer, *, samples: Iterable[Sample] | None, on_progress: Progress | None = None
) -> Tuned:
    """The plan with the least predicted time.

    Args:
        prepared: float model.
        pricer: of the recipe, whose settings, rest, time limit and, with samples, `min_sqnr_db` count.
        samples: re-iterable; the first few are looked at. None takes every tensor for lopsided.
        on_progress: told about every variant.

    Raises:
        BuildError: no way to write the model compiles.
    """
    recipe = pricer.recipe
    few = None if samples is None else tuple(itertools.islice(samples, FEW))
    found = tune(
        Workshop(model=prepared, settings=recipe.settings, rest=recipe.rest, samples=few),
        pricer,
        placement=recipe.tune == "placement",
        min_sqnr_db=recipe.limits.get("min_sqnr_db", -math.inf),
        time_limit_s=recipe.time_limit_s,
        on_progress=on_progress,
    )
    if math.isinf(found.price.us):
        raise pricer.failure or BuildError("No way to write the model compiles.")
    return found


def difference(found: Tuned, built: Price) -> str:
    """How the kernels that were built differ from those that were tuned, in a sentence; "" where they do not."""
    wanted, got = (Counter(k.signature for k in price.kernels) for price in (found.price, built))
    lost, new = list((wanted - got).elements()), list((got - wanted).elements())
    if not lost and not new:
        return ""
    first = f"; the first that was built otherwise: {(new or lost)[0]}"
    return (
        f"{len(new)} of {len(built.kernels)} kernels are not those that were tuned: {built.us:.1f} us predicted, "
        f"{found.price.us:.1f} when tuned{first}"
    )


def signatures(table: LayerTable) -> tuple[str, ...]:
    """What each kernel is, without the compiler's numbering: kind, types and shapes in and out, ONNX nodes."""
    found = []
    for layer in table.layers:
        if layer.kind in SYNCHRONIZATION:
            continue
        reads, writes = (
            " ".join(sorted(f"{t.dtype}{list(t.shape)}" for t in tensors)) for tensors in (layer.inputs, layer.outputs)
        )
        found.append(f"{layer.kind} {reads} -> {writes} | {' '.join(sorted(layer.onnx_nodes))}")
    return tuple(found)


def _read(path: Path) -> Price | None:
    """A stored price; None for a file of another format, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        kernels = tuple(Kernel(**{**k, "nodes": tuple(k["nodes"])}) for k in content["kernels"])
        return Price(us=float(content["us"]), kernels=kernels)
    except (OSError, ValueError, KeyError, TypeError):
        return None
