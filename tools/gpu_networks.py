"""Networks for `gpu_check.py`: each in FP32, FP16, INT8 everywhere and tuned, run on the GPU beside ONNX Runtime.

Network -> four models -> engines of this GPU's compiler -> outputs against ONNX Runtime, predicted and measured times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import structs

from calib_data import random_samples
from engines.backends.backend import Backend, backend_named, predicting
from engines.backends.compiler import Engine, ShapeRange
from engines.core import onnx_runtime as ort
from engines.cost.gpus import Gpu
from engines.cost.predict import engine_work
from engines.timing.driver import Card, Driver
from engines.timing.events import EventTimer
from engines.timing.loaded import LoadedEngine
from engines.timing.networks import residual_network, transformer
from engines.timing.probes import Graph
from engines.timing.timer import Load
from qdq.assemble.finish import finish
from qdq.assemble.precision.convert import convert
from qdq.assemble.quantize import quantize
from qdq.build.measured.bench import PROFILED, SECONDS
from qdq.build.measured.forms import WORST, TimedKernel, paired
from qdq.build.pricing.pricer import Pricer, gpus_of, mean
from qdq.build.recipe import Recipe
from qdq.deploy.demo import demo_model, demo_samples
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.model.storage import save
from qdq.passes.prepare import load_float
from qdq.plan.settings import Settings
from qdq.tune.find_plan import find_plan

FORMS = ("FP32", "FP16", "INT8", "tuned")
TUNING_S = 20.0
QUICK = Settings(bias_correction="off", calibrator="max", equalize="none")  # kernels do not depend on scales
OPEN_SIZES = {1: 128, 2: 128, 3: 128, 4: 224, 5: 64}  # rank -> size of an open dimension that is not the first

Sample = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A float network with samples; the last one is what engines are compared on."""

    name: str
    path: Path
    samples: list[Sample] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One engine on the GPU, or `why` it is not here. SQNR in dB of the worst output.

    `of_float` is against the float model and `of_file` against the same file, both in ONNX Runtime.
    """

    network: str
    form: str
    why: str = ""
    kernels: int = 0
    predicted_us: float = math.nan
    measured_us: float = math.nan
    spread_us: float = math.nan
    graph: bool = True
    of_float: float = math.nan
    of_file: float = math.nan
    activation_mib: float = math.nan
    pairs: tuple[TimedKernel, ...] = field(default=(), repr=False)
    unmatched: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What engines run on: the GPU, its compiler, and how it is predicted (a mapping of a recipe's `gpu`)."""

    driver: Driver
    card: Card
    backend: Backend
    gpu: Mapping[str, object]
    folder: Path


def cases(models: Path | None, folder: Path) -> Iterator[Callable[[], Case]]:
    """The demo, a ResNet, a U-Net and a sentence encoder: real ones of a folder where they are there, else in code."""

    def demo() -> Case:
        calibration, evaluation = demo_samples()
        return Case(name="demo", path=demo_model(), samples=[*calibration[:2], evaluation[0]])

    yield demo
    for name, pattern, make in (
        ("resnet20", "**/resnet20*.onnx", residual_network),
        ("unet", "**/*hippodeep_head*.onnx", unet),
        ("minilm", "**/*minilm*.onnx", transformer),
    ):
        found = sorted(models.glob(pattern)) if models else []
        yield partial(_case, name, found[0] if found else None, make, folder)


def _case(name: str, path: Path | None, make: Callable[[str], onnx.ModelProto], folder: Path) -> Case:
    if path is None:
        name, path = f"{name} (random weights)", folder / f"{name}.onnx"
        onnx.save(make("float32"), path)
    return user_case(name, path)


def user_case(name: str, path: Path) -> Case:
    """A network with random samples, which say nothing of its accuracy on data."""
    specs = input_specs(load_float(path))
    sizes: dict[str | tuple[str, int], int] = {
        (spec.name, axis): OPEN_SIZES.get(len(spec.shape), 64)
        for spec in specs
        for axis, size in enumerate(spec.shape)
        if axis and not isinstance(size, int)
    }
    return Case(name=name, path=path, samples=[dict(s) for s in random_samples(specs, 3, seed=0, sizes=sizes)])


def unet(dtype: str) -> onnx.ModelProto:
    """A 3-D U-Net of three levels, 16 to 64 channels, on (1, 1, 64, 64, 64)."""
    g, y, before, skips = Graph(), "x", 1, []

    def conv(x: str, name: str, inside: int, out: int) -> str:
        w = g.weight(f"{name}_w", [out, inside, 3, 3, 3], dtype)
        return g.add("Relu", [g.add("Conv", [x, w], name, kernel_shape=[3] * 3, pads=[1] * 6)], f"{name}_relu")

    for level, channels in enumerate((16, 32, 64)):
        y = conv(conv(y, f"down{level}a", before, channels), f"down{level}b", channels, channels)
        before = channels
        if level < 2:
            skips.append((y, channels))
            y = g.add("MaxPool", [y], f"pool{level}", kernel_shape=[2] * 3, strides=[2] * 3)
    scales = g.constant("scales", np.array([1, 1, 2, 2, 2], np.float32))
    for level, (skip, channels) in reversed(list(enumerate(skips))):
        larger = g.add("Resize", [y, "", scales], f"up{level}", mode="nearest")
        y = conv(g.add("Concat", [larger, skip], f"cat{level}", axis=1), f"up{level}a", before + channels, channels)
        before = channels
    y = g.add("Conv", [y, g.weight("head_w", [4, before, 1, 1, 1], dtype)], "head", kernel_shape=[1] * 3)
    return g.model(["x"], [1, 1, 64, 64, 64], y, dtype, written=[1, 4, 64, 64, 64])


def ran(case: Case, bench: Bench, ends_s: float) -> Iterator[Ran]:
    """Each form of a network, as they come; those for which no time is left are said."""
    prepared = load_float(case.path)
    sample = case.samples[-1]
    (reference,) = ort.run(ort.session(case.path), [sample])
    for form in FORMS:
        if time.monotonic() > ends_s:
            yield Ran(network=case.name, form=form, why="no time left")
            continue
        try:
            made = model_of(form, prepared, case, bench)
            yield run_model(case.name, form, made, sample, reference, bench)
        except Exception as error:  # whatever one engine fails with, the others still say something
            yield Ran(network=case.name, form=form, why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def model_of(form: str, prepared: Model, case: Case, bench: Bench) -> Model:
    """The model of a form: float as it is, in FP16, quantized wherever the rules want, or as the search decides.

    Calibrated quickly: accuracy of the INT8 forms is that of the plainest settings.
    """
    if form == "FP32":
        return prepared
    if form == "FP16":
        return convert(prepared, unquantized_type="fp16", table=None).model
    settings, samples, plan = QUICK, case.samples[:-1], None
    if form == "tuned":
        recipe = Recipe(settings=settings, gpus=(dict(bench.gpu),), time_limit_s=TUNING_S)
        recipe = recipe.compiled_by(predicting(bench.backend.name).name, (bench.card.target,))
        pricer = Pricer(recipe=recipe, shapes=_fixed(case.samples[0]), gpus=gpus_of(recipe))
        plan = find_plan(prepared, pricer, samples=samples).plan
    made = quantize(prepared, samples, settings=settings, plan=plan)
    kind = "auto" if form == "tuned" else "fp16"
    return finish(made.model, made.plan, unquantized_type=kind, table=made.table).model


def _fixed(sample: Sample) -> dict[str, ShapeRange]:
    return {name: ShapeRange.fixed(array.shape) for name, array in sample.items()}


def run_model(
    network: str, form: str, model: Model, sample: Sample, reference: Mapping[str, np.ndarray], bench: Bench
) -> Ran:
    """Build, predict, compare, time."""
    path = bench.folder / "model.onnx"
    save(model, path)
    shapes = {name: ShapeRange.fixed(array.shape) for name, array in sample.items()}
    engines: dict[str, Engine] = {}
    for compiler in dict.fromkeys((bench.backend.name, predicting(bench.backend.name).name)):
        if bench.card.target in backend_named(compiler).targets:
            engines[compiler] = backend_named(compiler).build(
                path, targets=(bench.card.target,), shapes=shapes, options=None, directory=None, on_progress=None
            )
    made = engines[bench.backend.name]
    stand_in = engines.get(predicting(bench.backend.name).name)
    price = None
    if stand_in and bench.gpu:
        work = engine_work(path, stand_in.table, shapes=shapes)
        price = mean([(work.layers, work.on(Gpu.from_mapping(bench.gpu)))])
    (same,) = ort.run(ort.session(path), [sample])
    with LoadedEngine(bench.driver, made, sample) as loaded:
        outputs = loaded.outputs()
        memory = loaded.activation_bytes() / 2**20
        seen = loaded.kernel_times(PROFILED)
    (timing,) = EventTimer(bench.driver).times([Load(engine=made)], seconds=SECONDS)
    pairs, unmatched = paired(seen, made.table, price.kernels if price else ())
    return Ran(
        network=network,
        form=form,
        kernels=made.table.kernels,
        predicted_us=price.us if price else math.nan,
        measured_us=timing.median_us,
        spread_us=timing.spread_us,
        graph=timing.graph,
        of_float=worst_sqnr_db(reference, outputs),
        of_file=worst_sqnr_db(same, outputs),
        activation_mib=memory,
        pairs=pairs[:WORST],
        unmatched=unmatched,
    )


def plain(ran: Ran) -> dict[str, Any]:
    """An engine as plain values."""
    return {**asdict(replace(ran, pairs=())), "pairs": [structs.asdict(pair) for pair in ran.pairs]}


def worst_sqnr_db(reference: Mapping[str, Any], outputs: Mapping[str, Any]) -> float:
    """The least signal to noise ratio of the outputs in dB; infinite where all are equal, -inf for what is no number.

    >>> worst_sqnr_db({"y": np.array([1.0, 1.0])}, {"y": np.array([1.0, 1.1])}) // 1
    23.0
    """
    found = []
    for name, right in reference.items():
        a, b = (np.asarray(x).astype(np.float64) for x in (right, outputs[name]))
        error = float(np.sum((a - b) ** 2))
        if not math.isfinite(error):
            return -math.inf
        found.append(math.inf if error == 0 else 10 * math.log10(max(float(np.sum(a**2)), 1e-300) / error))
    return min(found, default=math.inf)
