"""The choice by measured times: on clocks that are told what each form takes."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import ATTRIBUTES, FakeCuda, install
from graphs import build, node, normal, samples
from simulated_gpu import RTX4090

from engines.backends.compiler import Engine, ShapeRange
from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.core.errors import BuildError, MissingRuntimeError
from engines.timing.timer import Arrays, KernelTime, Load, Timing, TimingError
from qdq.build.cost import Kernel, Price
from qdq.build.measured import bench as bench_module
from qdq.build.measured.bench import LEAST_GAIN, Bench, Run, bench_of, priced_here, why_predicted
from qdq.build.measured.forms import AS_BUILT, TimedForm, paired
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError, MissingRuntimeError as MissingQdqError
from qdq.model.model import Model
from qdq.plan.settings import Settings
from qdq.tune.measured.times import LISTED, as_built, measured
from qdq.tune.search import tune
from qdq.tune.tuned import Tuned, TuningOutcome
from qdq.tune.variant_builder import VariantBuilder


def timing(us: float, spread: float = 0.0) -> Timing:
    return Timing(us=(us - spread / 2, us - spread / 2, us, us + spread / 2, us + spread / 2), at_s=(0, 1, 2, 3, 4))


def chain() -> Model:
    """x -> (Conv -> Relu) three times -> y."""
    tensors, nodes, last = {}, [], "x"
    for i in range(3):
        tensors[f"w{i}"] = normal(8, 8, 3, 3, seed=i)
        nodes += [node("Conv", f"{last} w{i}", f"a{i}", f"conv_{i}", pads=[1] * 4)]
        nodes += [node("Relu", f"a{i}", "y" if i == 2 else f"r{i}", f"relu_{i}")]
        last = f"r{i}"
    return build(nodes, {"x": (1, 8, 8, 8)}, tensors)


def kind_of(model: Model) -> str:
    """Like 'int8 2', 'fp16' or 'fp32': what a form is."""
    codes = sum(n.op_type == "Conv" and _dequantized(model, n.input[0]) for n in model.graph.node)
    half = any(t.data_type == 10 for t in model.graph.initializer)
    return f"int8 {codes}" if codes else "fp16" if half else "fp32"


def _dequantized(model: Model, tensor: str) -> bool:
    source = model.producer(tensor)
    return source is not None and source.op_type == "DequantizeLinear"


class Predicted:
    """A judge: a convolution takes 10 us, in INT8 what is said."""

    width = 1

    def __init__(self, int8: float) -> None:
        self.int8 = int8

    def many(self, models: Sequence[Model]) -> list[Price]:
        return [self._price(model) for model in models]

    def _price(self, model: Model) -> Price:
        convs = [n for n in model.graph.node if n.op_type == "Conv"]
        kernels = []
        for n in convs:
            low = _dequantized(model, n.input[0])
            us = self.int8 if low else 10.0 if kind_of(model) != "fp32" else 20.0
            kernels.append(Kernel(us=us, macs=100, bytes=10, nodes=(n.name,), signature=f"{n.name} {low}"))
        return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))


@dataclasses.dataclass
class Clock:
    """A GPU on which each form takes what is said, by its kind; `together` is how many engines it holds."""

    us: Callable[[str], float]
    spread: float = 0.0
    together: float = math.inf
    broken: tuple[str, ...] = ()
    seen: list[list[str]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def times(self, loads: Sequence[Load], *, seconds: float, rest_s: float = 0.0) -> list[Timing]:
        kinds = [load.engine.data.decode() for load in loads]
        self.seen.append(kinds)
        self.seconds.append(seconds)
        if set(kinds) & set(self.broken):
            raise TimingError("an illegal instruction was encountered")
        if len(loads) > self.together:
            raise TimingError("out of memory")
        return [timing(self.us(kind), self.spread) for kind in kinds]

    def kernel_times(self, engine: Engine, runs: int) -> list[KernelTime]:
        if engine.data.decode() in self.broken:
            raise TimingError("an illegal instruction was encountered")
        return [KernelTime(name=layer.name, us=self.us(engine.data.decode()) / 3) for layer in engine.table.layers]

    def outputs(self, engine: Engine, inputs: Arrays) -> dict[str, np.ndarray]:
        raise NotImplementedError


def table(*names: str) -> LayerTable:
    tensor = KernelTensor(name="t", dtype="float16", shape=(4,))
    layers = [
        Layer(name=n, kind="conv", inputs=(tensor,), constants=(), outputs=(tensor,), tactic="", onnx_nodes=(o,))
        for n, o in (name.split(":") for name in names)
    ]
    return LayerTable(
        layers=tuple(layers), backend="rtx", version="1", targets=("sm89",), engine_bytes=1, weight_bytes=0,
        activation_bytes=0,
    )  # fmt: skip


class Forms(Bench):
    """A bench that does not compile: an engine says of which kind its model is."""

    refused: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        return "1.7.1"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiling is reading what a model is; kinds in the list are refused."""
    refused: list[str] = []
    made: dict[str, Model] = {}

    def save(model: Model, path: object) -> None:
        made["model"] = model

    def compile_engine(path: object, **_: object) -> Engine:
        kind = kind_of(made["model"])
        if kind in refused:
            raise BuildError(f"{kind} is refused")
        return Engine(data=kind.encode(), table=table(*(f"k{i}:conv_{i}" for i in range(3))))

    monkeypatch.setattr(bench_module, "save", save)
    monkeypatch.setattr(bench_module, "compile_engine", compile_engine)
    return refused


def on(clock: Clock, **recipe: object) -> Forms:
    shapes = {"x": ShapeRange.fixed((1, 8, 8, 8))}
    return Forms(card=RTX4090, timer=clock, recipe=Recipe(**recipe), shapes=shapes)  # type: ignore[arg-type]


@cache
def _searched(int8: float, types: tuple[str, ...], placement: bool, bound: float) -> tuple[Tuned, VariantBuilder]:
    model = chain()
    builder = VariantBuilder(model=model, settings=Settings(), unquantized_types=types, samples=samples(model, 2))
    found = tune(builder, Predicted(int8), placement=placement, listed=LISTED, min_sqnr_db=bound)
    return found, builder


def judged(
    clock: Clock,
    int8: float = 4.0,
    *,
    types: tuple[str, ...] = ("fp16", "fp32"),
    placement: bool = True,
    keeps: Callable[[object], bool] | None = None,
    **recipe: object,
) -> Tuned:
    """The choice by the clock, after one where a convolution is predicted to take `int8` us in INT8 and 10 in FP16."""
    found, builder = _searched(int8, types, placement, -math.inf)
    return measured(found, builder, Predicted(int8), on(clock, **recipe), placement=placement, keeps=keeps)


def by_kind(**us: float) -> Callable[[str], float]:
    """A form takes what its kind does, in INT8 one more for each node that is not."""
    return lambda kind: us[kind.split()[0]] + (3 - int(kind.split()[1]) if kind[:4] == "int8" else 0)


def run(us: float, spread: float = 0.0) -> Run:
    return Run(timing=timing(us, spread))


def test_a_gain_counts_beyond_two_percent_and_the_spread() -> None:
    assert LEAST_GAIN == 0.02
    assert run(98.0).pays_on(run(100.0)) and not run(98.1).pays_on(run(100.0))
    assert not run(90.0, spread=9.0).pays_on(run(100.0)) and run(90.0, spread=7.9).pays_on(run(100.0))
    assert not run(90.0).pays_on(run(100.0, spread=9.0)) and not Run(why="refused").pays_on(run(100.0))
    assert run(99.1).ties(run(100.0)) and not run(98.0).ties(run(100.0))
    assert run(90.0).ties(run(100.0, spread=11.0))


def test_the_clock_decides_and_a_wrong_one_decides_otherwise(compiled: list[str]) -> None:
    right, wrong = Clock(by_kind(fp32=90, fp16=60, int8=30)), Clock(by_kind(fp32=30, fp16=60, int8=90))
    found, inverted = judged(right), judged(wrong)
    assert found.plan.quantized_nodes == ("conv_0", "conv_1", "conv_2") and found.measured is not None
    assert not inverted.plan.points and inverted.plan.unquantized_type == "fp32" and inverted.measured is not None
    assert inverted.measured.chosen == inverted.measured.unquantized == "FP32"
    skipped = {s.reason for s in inverted.plan.skips if s.rule == "tuned"}
    assert len(skipped) == 1 and "measured on NVIDIA GeForce RTX 4090" in skipped.pop()
    assert "it loses 200.0%, where 2% and the spread are needed, so nothing is quantized" in inverted.said([])[0]
    assert "it gains 50.0%" in found.said([])[0] and "so it is taken" in found.said([])[0]


def test_it_finds_int8_where_prediction_does_not(compiled: list[str]) -> None:
    found = judged(Clock(by_kind(fp32=90, fp16=60, int8=30)), int8=12.0)
    assert found.plan.quantized_nodes and found.price.us > found.unquantized_price.us  # predicted slower
    assert all("faster" not in said for said in found.said([]))


def test_a_spread_larger_than_the_gain_keeps_float(compiled: list[str]) -> None:
    us = by_kind(fp32=90, fp16=60, int8=50)
    assert judged(Clock(us, spread=5.0)).plan.points
    assert not judged(Clock(us, spread=9.0)).plan.points


def test_less_than_two_percent_keep_float(compiled: list[str]) -> None:
    assert not judged(Clock(by_kind(fp32=90, fp16=60, int8=59))).plan.points


def test_forms_that_cannot_be_told_apart_take_the_fewest_nodes(compiled: list[str]) -> None:
    found = judged(Clock(by_kind(fp32=90, fp16=60, int8=30), spread=3.0))
    assert found.measured is not None
    assert judged(Clock(by_kind(fp32=90, fp16=60, int8=30))).plan.quantized_nodes > found.plan.quantized_nodes
    least = min(f.quantized_nodes for f in found.measured.forms if f.quantized_nodes and f.measured_us)
    assert found.measured.form(found.measured.chosen).quantized_nodes == least


def test_float_types_as_fast_take_the_smaller(compiled: list[str]) -> None:
    assert judged(Clock(by_kind(fp32=60, fp16=60, int8=90))).plan.unquantized_type == "fp16"
    assert judged(Clock(by_kind(fp32=40, fp16=60, int8=90))).plan.unquantized_type == "fp32"


def test_a_type_that_is_not_allowed_is_for_comparison(compiled: list[str]) -> None:
    found = judged(Clock(by_kind(fp32=10, fp16=60, int8=30)), types=("fp16",))
    assert found.plan.points and found.measured is not None
    assert found.measured.form("FP32").measured_us == 10 and found.measured.unquantized == "FP16"


def test_where_all_is_to_be_quantized_float_is_for_comparison(compiled: list[str]) -> None:
    found = judged(Clock(by_kind(fp32=90, fp16=20, int8=30)), placement=False)
    assert len(found.plan.quantized_nodes) == 3 and found.measured is not None
    assert found.measured.form("FP16").measured_us == 20 and "all the same, as was asked" in found.said([])[0]


def test_what_is_not_built_or_does_not_run_is_said_and_left_out(compiled: list[str]) -> None:
    compiled.append("fp32")
    found = judged(Clock(by_kind(fp16=60, int8=30), broken=("int8 3",)))
    assert found.measured is not None
    whys = {form.name: form.why for form in found.measured.forms}
    assert whys["FP32"] == "it is not built: fp32 is refused"
    assert whys["INT8 everywhere" if "INT8 everywhere" in whys else "INT8, choice 1"].startswith(
        "it does not run: an ill"
    )
    assert 0 < len(found.plan.quantized_nodes) < 3
    assert any("FP32 was left out: it is not built" in said for said in found.said([]))


def test_where_nothing_runs_the_predicted_choice_stays_unless_a_measured_one_was_asked_for(compiled: list[str]) -> None:
    compiled += ["fp32", "fp16", "int8 1", "int8 2", "int8 3"]
    found = judged(Clock(by_kind()))
    assert found.measured is None and found.plan.points and "no form that may be taken" in found.said([])[0]
    with pytest.raises(MissingQdqError, match=r"could be measured on NVIDIA GeForce RTX 4090: .*--judge predicted"):
        judged(Clock(by_kind()), judge="measured")


def test_a_runtime_without_a_profiler_still_times(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> list[KernelTime]:
        raise TimingError("no profiler")

    clock = Clock(by_kind(fp32=90, fp16=60, int8=30))
    monkeypatch.setattr(clock, "kernel_times", none)
    found = judged(clock)
    assert found.measured is not None and found.measured.together and found.plan.points
    assert not found.measured.shipped.kernels


def test_a_slow_network_runs_often_enough(compiled: list[str]) -> None:
    clock = Clock(by_kind(fp32=9e5, fp16=6e5, int8=3e5))
    assert judged(clock).measured is not None
    assert clock.seconds[0] == pytest.approx(20 * sum(clock.us(kind) for kind in clock.seen[0]) / 1e6)


def test_forms_that_do_not_fit_together_run_alone(compiled: list[str]) -> None:
    clock = Clock(by_kind(fp32=90, fp16=60, int8=30), together=1)
    found = judged(clock)
    assert found.measured is not None and not found.measured.together and found.plan.points
    assert len(clock.seen[0]) > 3 and all(len(kinds) == 1 for kinds in clock.seen[1:])
    many = Clock(by_kind(fp32=90, fp16=60, int8=30))
    assert judged(many).measured is not None and len(many.seen) == 1  # all in turn


def test_a_form_that_loses_more_accuracy_than_the_bound_allows_is_not_taken(compiled: list[str]) -> None:
    asked: list[int] = []

    def keeps(plan: object) -> bool:
        asked.append(len(plan.quantized_nodes))  # type: ignore[attr-defined]
        return False

    found = judged(Clock(by_kind(fp32=90, fp16=60, int8=30)), int8=12.0, keeps=keeps)
    assert asked and not found.plan.points and "than the bound allows" in found.said([])[0]


def test_only_what_keeps_the_bound_by_quick_scales_is_listed() -> None:
    free, _ = _searched(4.0, ("fp16",), True, -math.inf)
    tight, _ = _searched(4.0, ("fp16",), True, 300.0)
    assert any(v.quantized for v in free.listed) and not any(v.quantized for v in tight.listed) and tight.listed


def test_no_time_is_left_for_what_comes_after_the_limit(compiled: list[str]) -> None:
    found = judged(Clock(by_kind()), time_limit_s=-1.0)
    assert found.measured is None and "--time-limit" in found.said([])[0]


def test_the_model_as_built_is_timed_beside_float(compiled: list[str]) -> None:
    clock = Clock(by_kind(fp32=90, fp16=60, int8=30))
    found, builder = judged(clock), _searched(4.0, ("fp16", "fp32"), True, -math.inf)[1]
    model = builder.model_of(found.variant)
    done, gains = as_built(found, model, found.price, on(clock))
    assert gains and done.measured is not None and done.measured.shipped.name == AS_BUILT
    assert len(clock.seen[-1]) == 2 and "fp16" in clock.seen[-1]
    slow = Clock(by_kind(fp16=60, int8=59.5))
    done, gains = as_built(found, model, found.price, on(slow))
    assert not gains and "as built it takes 59.5 us, 60.0 in float" in done.remarks
    left = done.left_in_float(found.price)
    assert left.measured is not None and left.measured.shipped.name == "FP16" and not left.plan.points


def test_an_outcome_is_read_back_and_each_form_is_a_line(compiled: list[str]) -> None:
    found = judged(Clock(by_kind(fp32=90, fp16=60, int8=30)))
    outcome = found.outcome([])
    assert TuningOutcome.from_json(outcome.to_json()) == outcome and found.measured is not None
    lines = outcome.lines.splitlines()
    assert [TimedForm.from_json(line) for line in lines] == list(found.measured.forms)
    first = json.loads(lines[0])
    assert first["gpu"] == "NVIDIA GeForce RTX 4090" and first["name"] == "FP16" and first["predicted_us"] == 30
    assert [k["kernel"] for k in first["kernels"]] == ["k0", "k1", "k2"]
    assert first["kernels"][0] == {"kernel": "k0", "predicted_us": 10.0, "measured_us": 20.0}


def test_kernels_are_compared_by_what_they_are_then_by_their_nodes() -> None:
    own = table("a:conv_0", "b:conv_1", "c:conv_2")
    signature = "conv float16[4] -> float16[4] | conv_0"
    predicted = [
        Kernel(us=5, macs=1, bytes=1, nodes=("conv_0",), signature=signature),
        Kernel(us=7, macs=1, bytes=1, nodes=("conv_1", "other"), signature="one that fuses more"),
        Kernel(us=2, macs=1, bytes=1, nodes=("other",), signature="another"),
    ]
    seen = [KernelTime(name=n, us=us) for n, us in (("a", 6.0), ("b", 19.0), ("c", 3.0), ("copy", 1.0), ("b", 1.0))]
    found, left = paired(seen, own, predicted)
    assert [(p.kernel, p.predicted_us, p.measured_us) for p in found] == [("b", 9, 20), ("a", 5, 6)]
    assert left == 2  # c, of which nothing is predicted, and a copy that the table does not have


# which GPU


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    pytest.importorskip("tensorrt_rtx")
    fake = FakeCuda()
    install(monkeypatch, fake)
    return fake


def opened(**recipe: object) -> Bench | None:
    with bench_of(Recipe(**recipe), {}) as bench:  # type: ignore[arg-type]
        return bench


def test_a_gpu_of_the_target_is_measured_unless_predicted_times_are_asked_for(here: FakeCuda) -> None:
    bench = opened()
    assert bench is not None and bench.card.name == "NVIDIA GeForce RTX 4090" and not why_predicted(Recipe())
    assert opened(judge="measured") is not None and opened(judge="predicted") is None and opened(tune="off") is None
    assert priced_here(Recipe(), bench).gpus == ("rtx4090",)
    here.name = "NVIDIA GeForce RTX 4060"
    assert priced_here(Recipe(), opened()).gpus == ("rtx4060",)  # not the usual one of its generation


def test_another_gpu_than_the_one_that_is_named_is_measured_only_when_asked_for(here: FakeCuda) -> None:
    assert opened(gpus=("rtx4060",)) is None and "it is not the rtx4060" in why_predicted(Recipe(gpus=("rtx4060",)))
    assert opened(gpus=("rtx4060",), judge="measured") is not None
    assert opened(gpus=("RTX 4090",)) is not None
    assert opened(gpus=({"like": "rtx4090", "name": "mine"},)) is not None


def test_a_gpu_of_another_target_is_refused(here: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTRIBUTES, 75, 8)
    monkeypatch.setitem(ATTRIBUTES, 76, 6)
    assert opened() is None and "the engine is for sm89, and here is NVIDIA" in why_predicted(Recipe())
    with pytest.raises(MissingRuntimeError, match=r"for sm89, and here is NVIDIA GeForce RTX 4090 \(sm86\)"):
        opened(judge="measured")


def test_one_engine_for_several_targets_cannot_be_measured(here: FakeCuda) -> None:
    assert opened(targets=("sm86", "sm89")) is None
    with pytest.raises(MissingRuntimeError, match="several generations"):
        opened(targets=("sm86", "sm89"), judge="measured")


def test_without_a_gpu_or_a_runtime_it_says_what_is_missing(here: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingRuntimeError, match="Cannot import tensorrt"):
        opened(settings=Settings(compiler="tensorrt"), judge="measured")
    assert opened(settings=Settings(compiler="tensorrt")) is None
    runtime = SimpleNamespace(__version__="11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt", runtime)
    assert opened(settings=Settings(compiler="tensorrt")) is not None
    with pytest.raises(MissingRuntimeError, match=r"TensorRT 11.4.0 is installed, and the engine is for TensorRT 10.3"):
        opened(settings=Settings(compiler="tensorrt:10.3"), judge="measured")
    install(monkeypatch, None)
    assert opened() is None and not why_predicted(Recipe())
    with pytest.raises(MissingRuntimeError, match="no NVIDIA GPU or driver was found here") as caught:
        opened(judge="measured")
    assert caught.value.exit_code == 3


def test_measured_times_decide_nothing_without_tuning() -> None:
    with pytest.raises(InputError, match="--tune off"):
        Recipe.from_mapping({"judge": "measured", "tune": "off"})
    with pytest.raises(InputError, match="measured"):
        Recipe.from_mapping({"judge": "measurd"})
    assert Recipe.from_mapping({"judge": "predicted"}).judge == "predicted"
