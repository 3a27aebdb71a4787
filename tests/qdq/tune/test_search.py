"""The tuner: the best variant is found, never above what it is compared with, and built as it was tuned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from graphs import build, conv, node, normal, residual, run, samples
from onnx import TensorProto

from engines.backends.backend import DEFAULT, backend_named
from engines.backends.compiler import ShapeRange
from engines.core.documents import replace
from engines.core.errors import BuildError, EngineError, MissingRuntimeError, UnsupportedTargetError
from qdq.assemble import quantize
from qdq.assemble.finish import finish
from qdq.assemble.precision.convert import convert
from qdq.build import engine
from qdq.build.cost import TIE_US, Kernel, Price
from qdq.build.keys.recipe_file import read_recipe
from qdq.build.pricing import processes
from qdq.build.pricing.compiles import MOST_WORKERS
from qdq.build.pricing.pricer import Pricer, gpus_of
from qdq.build.pricing.processes import Job, Workers
from qdq.build.recipe import Recipe
from qdq.core.disk.cache import caching
from qdq.core.errors import InputError
from qdq.core.resources import cores
from qdq.deploy import deploy
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.passes.rewrites import rewritten
from qdq.passes.rewrites.edit import Rewrite
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.equivalence import classes
from qdq.tune.find_plan import FEW, _few, difference, find_plan
from qdq.tune.prices import Budget
from qdq.tune.search import tune
from qdq.tune.variant_builder import TUNED, Variant, VariantBuilder


def chain(*, blocks: int = 3, alike: bool = False) -> Model:
    """x -> (Conv -> Relu) `blocks` times -> y, of 8, 12, 16, ... channels, or all of 8."""
    tensors, nodes, last, width = {}, [], "x", 8
    for i in range(blocks):
        wide = 8 if alike else 8 + 4 * i
        tensors[f"w{i}"] = normal(wide, width, 3, 3, seed=i)
        nodes += [node("Conv", f"{last} w{i}", f"a{i}", f"conv_{i}", pads=[1] * 4)]
        nodes += [node("Relu", f"a{i}", "y" if i == blocks - 1 else f"r{i}", f"relu_{i}")]
        last, width = f"r{i}", wide
    return build(nodes, {"x": (1, 8, 8, 8)}, tensors)


def transposed() -> Model:
    """x -> ConvTranspose -> Relu -> y."""
    nodes = [node("ConvTranspose", "x w", "a", "up", strides=[2, 2]), node("Relu", "a", "y")]
    return build(nodes, {"x": (1, 8, 5, 5)}, {"w": normal(8, 4, 2, 2)})


def builder(model: Model, *, data: bool = True, unquantized_type: str = "fp32", **settings: object) -> VariantBuilder:
    """A builder with two samples, or none; `rest` may be several types with spaces between."""
    few = samples(model, 2) if data else None
    return VariantBuilder(
        model=model, settings=Settings(**settings), unquantized_types=tuple(unquantized_type.split()), samples=few
    )  # type: ignore[arg-type]


class Each:
    """A judge by a function of one model."""

    width = 1

    def __init__(self, price: Callable[[Model], Price]) -> None:
        self.price = price

    def many(self, models: Sequence[Model]) -> list[Price]:
        return [self.price(model) for model in models]


def priced(**us: float) -> Each:
    """A judge: each node of the name costs 10 us, in INT8 as much as given; a Mul or Pad 1 us."""

    def judge(model: Model) -> Price:
        kernels = []
        for each in model.graph.node:
            source = model.producer(each.input[0])
            quantized = source is not None and source.op_type == "DequantizeLinear"
            cost = 0.0
            if each.op_type in ("Conv", "ConvTranspose"):
                cost = us.get(each.name, 10.0) if quantized else 10.0
            elif each.op_type in ("Mul", "Pad"):
                cost = 1.0
            kernels.append(Kernel(us=cost, macs=100, bytes=10, nodes=(each.name,), signature=each.op_type))
        return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))

    return Each(judge)


def test_nodes_that_gain_are_quantized_and_the_others_say_why() -> None:
    found = tune(builder(chain()), priced(conv_0=20.0, conv_1=2.0, conv_2=30.0))
    assert found.variant.quantized == {"conv_1"}
    assert found.price.us <= found.plain == 30.0 and found.price.us < found.untuned and found.complete
    assert found.plan.quantized_nodes == ("conv_1",)
    skipped = {s.node: s.reason for s in found.plan.skips if s.rule == TUNED}
    assert skipped.keys() == {"conv_0", "conv_2"} and "INT8 does not pay" in skipped["conv_0"]
    assert "1 node in INT8" in found.summary


def test_the_result_is_the_least_of_all_variants_but_for_a_tie() -> None:
    costs = {"conv_0": 7.0, "conv_1": 14.0, "conv_2": 8.5}
    work = builder(chain(), data=False, shift=False)
    judge = priced(**costs)
    every = [Variant(quantized=frozenset(s)) for n in range(4) for s in itertools.combinations(costs, n)]
    least = min(judge.price(work.model_of(v)).us for v in every)
    assert 0 <= tune(work, judge).price.us - least <= TIE_US


def test_a_node_whose_name_ends_like_an_operand_is_a_node() -> None:
    nodes = [node("Conv", "x v", "a", "first"), node("Conv", "a w", "y", "conv:0")]
    model = build(nodes, {"x": (1, 8, 8, 8)}, {"v": normal(8, 8, 3, 3), "w": normal(8, 8, 1, 1)})
    found = tune(builder(model), priced(**{"first": 99.0, "conv:0": 2.0}))
    assert found.variant.quantized == {"conv:0"} and found.price.us < found.plain


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="matches none"):
        builder(chain(), exclude=("conv_9",))
    with pytest.raises(InputError, match="override pattern 'conv_9'"):
        builder(chain(), overrides={"conv_9": "int8-weight"})


def test_int8_is_kept_nowhere_if_it_pays_nowhere() -> None:
    found = tune(builder(chain()), priced(conv_0=20.0, conv_1=20.0, conv_2=20.0))
    assert not found.plan.points and found.price.us == found.plain
    assert "INT8 does not pay anywhere" in found.summary
    assert "does not pay" not in replace(found, untuned=found.price.us - 5).summary


def test_a_variant_that_does_not_compile_is_not_said_to_be_slow() -> None:
    found = tune(builder(chain()), Each(lambda model: Price(us=math.inf if _dequantized(model) else 30.0)))
    assert not found.plan.points and "INT8 wherever it is possible does not compile" in found.summary
    assert all("does not compile with INT8" in skip.reason for skip in found.plan.skips if skip.rule == "tuned")


def test_the_rest_has_the_type_that_is_faster(tmp_path: Path) -> None:
    def judge(model: Model) -> Price:
        half = any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
        convs = [n.name for n in model.graph.node if n.op_type == "Conv"]
        kernels = [Kernel(us=9.0 if half else 5.0, macs=1, bytes=1, nodes=(n,), signature="") for n in convs]
        return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))

    model = chain()
    found = tune(builder(model, unquantized_type="fp16 fp32"), Each(judge))
    assert found.plan.unquantized_type == "fp32" and found.price.us == 15 and found.plain == 27
    found.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == found.plan
    assert tune(builder(model, unquantized_type="fp16"), Each(judge)).plan.unquantized_type == "fp16"
    for asked, half in (("auto", False), ("fp32", False), ("fp16", True)):
        made = finish(model, plan, unquantized_type=asked, table=None).model
        assert any(t.data_type == TensorProto.FLOAT16 for t in made.graph.initializer) == half


def test_without_placement_everything_stays_quantized() -> None:
    work = builder(chain())
    found = tune(work, priced(conv_0=20.0, conv_1=20.0, conv_2=20.0), placement=False)
    assert set(found.plan.quantized_nodes) == {"conv_0", "conv_1", "conv_2"}
    assert not found.variant.per_tensor and not found.variant.unshifted  # these cost accuracy
    bounded = tune(work, priced(conv_0=20.0, conv_1=20.0, conv_2=20.0), placement=False, min_sqnr_db=90)
    assert bounded.plan == found.plan  # a bound is for the choice of nodes


def test_a_time_limit_ends_the_search_with_the_better_of_two() -> None:
    found = tune(builder(chain()), priced(conv_1=2.0), budget=Budget(seconds=0), clock=itertools.count().__next__)
    assert not found.complete and found.tried <= 3 and found.price.us <= found.plain
    assert "until --time-limit" in found.summary and found.ended == "seconds"


def test_accuracy_is_bought_back_with_the_cheapest_nodes() -> None:
    work = builder(chain())
    judge = priced(conv_0=1.0, conv_1=9.0, conv_2=1.0)
    fast = tune(work, judge)
    noise = work.noise(fast.variant)
    assert noise is not None
    bound = -10 * math.log10(noise) + 3
    bounded = tune(work, judge, min_sqnr_db=bound)
    after = work.noise(bounded.variant)
    assert after is not None and -10 * math.log10(after) >= bound
    assert fast.price.us < bounded.price.us <= fast.plain
    assert not tune(work, judge, min_sqnr_db=400).plan.points


def test_a_bound_is_kept_as_measured_and_not_overdone() -> None:
    work = builder(chain(blocks=5))
    judge = priced(**{f"conv_{i}": 4.0 - 0.5 * i for i in range(5)})
    quick = -10 * math.log10(work.noise(Variant(quantized=frozenset(work.quantizable(Variant())))) or 1)
    for offset in (-4.0, 4.0):  # calibrated scales are worse, or better, than quick ones
        measured: list[float] = []

        def measure(plan: Plan, offset: float = offset, measured: list[float] = measured) -> float:
            noise = work.noise(Variant(quantized=frozenset(plan.quantized_nodes)))
            measured.append(math.inf if not noise else offset - 10 * math.log10(noise))
            return measured[-1]

        bound = quick + offset + (1.5 if offset < 0 else 0)
        found = tune(work, judge, min_sqnr_db=bound, measure=measure)
        assert len(measured) > 1
        assert measured[0] < bound if offset < 0 else measured[0] > bound + 2
        assert not found.plan.points or measure(found.plan) >= bound
        alone = tune(work, judge, min_sqnr_db=bound)
        assert found.price.us > alone.price.us if offset < 0 else found.price.us < alone.price.us
        assert any("calibrated" in step for step in found.steps)


def test_alike_nodes_are_one_class() -> None:
    found = classes(chain(blocks=8, alike=True))
    inner = {found[f"conv_{i}"] for i in range(2, 6)}
    assert len(inner) == 1 and found["conv_0"] not in inner and found["conv_7"] not in inner
    assert len({classes(chain(blocks=3))[f"conv_{i}"] for i in range(3)}) == 3


def test_a_variant_has_the_outputs_of_the_float_model() -> None:
    model = residual()
    work = builder(model)
    data = samples(model, 2)
    full = Variant(quantized=frozenset(work.quantizable(Variant())))
    operand = work.shortcuts(full)[0]
    for variant in (
        full,
        Variant(quantized=full.quantized, per_tensor=full.quantized),
        Variant(quantized=full.quantized, unshifted=full.quantized),
        Variant(quantized=full.quantized, float_shortcuts=frozenset({operand})),
        full.with_rewrite("hoist", full.quantized),
    ):
        noise = work.noise(variant)
        assert noise is not None and 0 < noise < 1e-3
        plan = work.plan_of(variant, "why")
        made = quantize.quantize(model, data, plan=plan)
        for before, after in zip(run(model, data), run(made.model, data), strict=True):
            np.testing.assert_allclose(after["y"], before["y"], atol=0.05 * np.abs(before["y"]).max())
    assert not any(
        operand in p.consumers
        for p in work.plan_of(Variant(quantized=full.quantized, float_shortcuts=frozenset({operand})), "").points
    )


def test_a_shortcut_is_a_choice_only_where_something_beside_it_is_quantized() -> None:
    """Each would be a variant to price, and none of them another model."""
    work = builder(residual())
    full = Variant(quantized=frozenset(work.quantizable(Variant())))
    assert work.shortcuts(full) and not work.shortcuts(Variant())


def test_one_scale_for_all_channels_is_one_in_the_file() -> None:
    model = conv()
    work = builder(model, unquantized_type="fp16")
    node_names = frozenset(work.quantizable(Variant()))
    plan = work.plan_of(Variant(quantized=node_names, per_tensor=node_names).with_rewrite("hoist", node_names), "")
    made = quantize.quantize(model, samples(model, 4), plan=plan)
    done = finish(made.model, plan, unquantized_type="fp16", table=made.table).model
    weight = next(n for n in done.graph.node if n.op_type == "Conv").input[1]
    dequantize = done.producer(weight)
    assert dequantize is not None and done.array(dequantize.input[1]).ndim == 0
    assert not any(n.op_type == "Mul" for n in done.graph.node)


def test_a_plan_with_rewrites_goes_through_a_file(tmp_path: Path) -> None:
    model = transposed()
    work = builder(model, unquantized_type="fp16")
    variant = Variant().with_rewrite("conv_transpose", ["up"])
    names = frozenset(work.quantizable(variant))
    assert names == {"up"} and not work.quantizable(Variant())
    plan = work.plan_of(Variant(rewrites=variant.rewrites, quantized=names).with_rewrite("hoist", names), "")
    assert plan.rewrites == (Rewrite(name="conv_transpose", nodes=("up",)), Rewrite(name="hoist", nodes=("up",)))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    data = samples(model, 3)
    made = quantize.quantize(model, data, plan=read)
    done = finish(made.model, read, unquantized_type="fp32", table=made.table)
    assert not any(n.op_type == "ConvTranspose" for n in done.model.graph.node)
    for before, after in zip(run(model, data), run(done.model, data), strict=True):
        np.testing.assert_allclose(after["y"], before["y"], atol=0.05 * np.abs(before["y"]).max())


@pytest.mark.parametrize(("name", "nodes", "message"), [("hoistt", ("up",), "hoist"), ("norm_bias", ("up",), "'up'")])
def test_an_edited_rewrite_that_does_not_fit_is_refused(name: str, nodes: tuple[str, ...], message: str) -> None:
    model = transposed()
    plan = Plan(
        model_sha256=model.sha256,
        settings=Settings(),
        points=(),
        skips=(),
        rewrites=(Rewrite(name=name, nodes=nodes),),
    )
    with pytest.raises(InputError, match=message):
        rewritten(model, plan.rewrites)


class Contrary(Pricer):
    """While searching, cheaper the more is quantized; what is built costs the more then."""

    def __call__(self, model: Model) -> Price:
        return Price(us=100.0 + 9 * _dequantized(model))

    def many(self, models: Sequence[Model]) -> list[Price]:
        return [Price(us=100.0 - 9 * _dequantized(model)) for model in models]


class Refusing(Pricer):
    """The compiler refuses whatever is quantized."""

    def many(self, models: Sequence[Model]) -> list[Price]:
        refused = Price(us=math.inf, refusal="node conv_0: no kernel.")
        return [refused if _dequantized(model) else Price(us=100.0) for model in models]


def test_the_words_of_a_compiler_that_refuses_are_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    save(chain(blocks=2), tmp_path / "net.onnx")
    monkeypatch.setattr("qdq.build.pricing.tensorrt_pricer.Pricer", Refusing)
    made = deploy.deploy(tmp_path / "net.onnx", samples(chain(blocks=2), 3), tmp_path / "out", recipe=Recipe())
    said = [note for note in made.report.notes if "do not compile" in note]
    assert len(said) == 1 and said[0].endswith("node conv_0: no kernel.")


def _dequantized(model: Model) -> int:
    return sum(n.op_type == "DequantizeLinear" for n in model.graph.node)


def test_what_is_built_slower_than_in_float_is_left_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    model = chain(blocks=2)
    save(model, tmp_path / "net.onnx")
    data = samples(model, 3)
    monkeypatch.setattr("qdq.build.pricing.tensorrt_pricer.Pricer", Contrary)
    made = deploy.deploy(tmp_path / "net.onnx", data, tmp_path / "out", recipe=Recipe())
    assert any("left in float" in note for note in made.report.notes)
    assert not Plan.load(tmp_path / "out" / "plan.json").points
    assert made.report.model_file == "net.fp16.onnx"
    assert not _dequantized(load(tmp_path / "out" / made.report.model_file))
    tuning = made.report.tuning
    assert tuning is not None and tuning.quantized_nodes == 0 and not tuning.decision.chosen
    assert tuning.predicted_us == tuning.decision.unquantized_us == 100 and (tuning.decision.quantized_us or 0) > 100
    assert "the fastest form with INT8 is predicted" in tuning.said[0] and "slower than float" in tuning.said[0]


class TestPricing:
    """With the real compiler."""

    @pytest.fixture(autouse=True)
    def _compiler(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

    def pricer(self, model: Model, **recipe: object) -> Pricer:
        """A pricer for fixed shapes."""
        made = Recipe.from_mapping({"compiler": "rtx", **recipe})
        shapes = {i.name: ShapeRange.fixed([int(d) for d in i.shape or ()]) for i in model.inputs}
        return Pricer(recipe=made, shapes=shapes, gpus=gpus_of(made))

    def test_what_is_built_is_what_was_tuned(self) -> None:
        model = chain(blocks=2)
        pricer = self.pricer(model, tune="rewrites")
        data = samples(model, 4)
        found = find_plan(model, pricer, samples=data)
        made = quantize.quantize(model, data, plan=found.plan)
        done = finish(made.model, made.plan, unquantized_type="fp16", table=made.table)
        built = pricer(done.model)
        assert difference(found, built) == "" and built.us == found.price.us
        other = pricer(finish(made.model, made.plan, unquantized_type="fp32", table=made.table).model)
        assert other != built and difference(found, other) == ""  # other kernels, that cost no more
        dear = replace(other, us=other.us + 5)
        assert f"{dear.us:.1f} us, {dear.us - built.us:.1f} more" in difference(found, dear)
        assert f"of {len(other.kernels)} kernels are others" in difference(found, dear)

    def test_equal_structures_are_compiled_once_and_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = conv(values=normal(8, 4, 3, 3)), conv(values=normal(8, 4, 3, 3, seed=5))
        with caching(tmp_path / "kept"):
            price = self.pricer(first)(first)
        assert price.us > 0 and price.kernels
        (stored,) = (tmp_path / "kept").glob("works/*")
        whole = stored.read_bytes()
        with monkeypatch.context() as patch, caching(tmp_path / "kept"):
            patch.setattr("qdq.build.pricing.processes.compile_engine", lambda *_, **__: pytest.fail("compiled again"))
            assert self.pricer(second)(second) == price
        stored.write_text("{")  # damaged: compiled again, and mended
        with caching(tmp_path / "kept"):
            assert self.pricer(first)(first) == price
            wide = conv((16, 4, 3, 3))
            assert self.pricer(wide)(wide) != price
        assert stored.read_bytes() == whole

    def test_processes_price_as_this_one_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        det = build([node("NonZero", "x", "i"), node("Det", "x", "y")], {"x": (1, 4, 4)}, outputs=("y",))
        models = [conv(), conv((16, 4, 3, 3)), conv((12, 4, 3, 3))]
        expected = self.pricer(models[0]).many(models)
        monkeypatch.setattr("qdq.build.pricing.compiles.SLOW_S", 0.0)
        pricer = self.pricer(models[0])
        with pricer.parallel():
            assert pricer.width == 1 and pricer(models[0]) == expected[0] and pricer.width == min(cores(), MOST_WORKERS)
            monkeypatch.setattr("qdq.build.pricing.compiles.works_of", lambda job: pytest.fail("compiled here"))
            assert pricer.many(models) == expected
        again = self.pricer(models[0])
        with again.parallel():
            again._compiles._slow = True
            for model in (*models, models[0]):
                again.begin(model)
            assert len(again._compiles._begun) == len(models)
            assert again(models[0]) == expected[0] and len(again._compiles._begun) == len(models) - 1
            assert again.many(models) == expected and not again._compiles._begun
            assert not list(again._compiles._place.iterdir())
        refused = self.pricer(det)
        with refused.parallel():
            refused._compiles._slow = True
            assert refused(det).us == math.inf and "parser" in str(refused._compiles.failure)

    def test_a_compiler_that_dies_takes_no_other_along(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(conv(), tmp_path / "good.onnx")
        shapes = {"x": ShapeRange.fixed([int(d) for d in conv().inputs[0].shape or ()])}
        good = Job(path=tmp_path / "good.onnx", targets=Recipe().targets, shapes=shapes)
        workers = Workers(1)
        first = workers([good])[0]
        worker = workers._free.get()
        assert worker is not None
        worker.process.kill()  # as for want of memory: tried again
        workers._free.put(worker)
        assert workers([good]) == [first] and isinstance(first, dict)
        monkeypatch.setattr(
            "qdq.build.pricing.processes._START", "import os; os.write({answers}, b'ready'); os._exit(3)"
        )
        lethal = Workers(1)
        (dead,) = lethal([good])
        lethal.close()
        assert isinstance(dead, BuildError) and "exit code 3" in str(dead)
        monkeypatch.setattr("qdq.build.pricing.processes._START", "pass")
        with pytest.raises(MissingRuntimeError, match="before it was ready"):
            Workers(1)([good])
        monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
        with pytest.raises(MissingRuntimeError, match="Cannot start"):
            Workers(1)([good])
        workers.close()

    def test_a_model_that_does_not_compile_costs_everything(self) -> None:
        model = build([node("NonZero", "x", "i"), node("Det", "x", "y")], {"x": (1, 4, 4)}, outputs=("y",))
        pricer = self.pricer(model)
        assert pricer(model).us == math.inf
        with pytest.raises(EngineError, match=r"parser|builder"):
            find_plan(model, pricer, samples=None)

    def test_gpus_of_one_target_share_its_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = conv()
        apart = [self.pricer(model, gpu=[gpu])(model) for gpu in ("l4", "rtx4090")]
        compiled, seen = engine.compile_engine, []
        monkeypatch.setattr(processes, "compile_engine", lambda *a, **k: seen.append(a) or compiled(*a, **k))
        both = self.pricer(model, gpu=["l4", "rtx4090"])(model)
        assert len(seen) == 1 and apart[0].us != apart[1].us
        assert both.us == pytest.approx(sum(price.us for price in apart) / 2)

    def test_a_price_says_its_errors_and_the_other_accumulation(self) -> None:
        model = conv((64, 64, 3, 3), (32, 32), batch=8)
        geforce, one = (self.pricer(model, gpu=[gpu])(model) for gpu in ("rtx4090", "l4"))
        assert one.other is None and geforce.other is not None and geforce.other.other is None
        assert (geforce.error, geforce.ratio_error) == (geforce.other.error, geforce.other.ratio_error)
        assert [k.signature for k in geforce.kernels] == [k.signature for k in geforce.other.kernels]
        half = convert(model, unquantized_type="fp16", table=None).model
        price = self.pricer(half, gpu=["rtx4090"])(half)
        assert price.other is not None and price.other.us > price.us  # FP32 accumulation is half as fast
        both = self.pricer(half, gpu=["rtx4090", "l4"])(half)
        assert both.other is not None and both.other.us > both.us

    def test_two_targets_are_priced_together(self) -> None:
        model = conv()
        both, one = (self.pricer(model, target=t)(model) for t in (["sm86", "sm89"], ["sm86"]))
        assert len(both.kernels) > len(one.kernels) and both.us != one.us


def test_gpus_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [g.name for g in gpus_of(Recipe(targets=("8.6", "sm120")))] == ["a10", "rtx5090"]
    own = {"name": "edge", "target": "sm89", "bandwidth_gb_s": 200, "tera_ops": {"float32": 10, "float16": 40}}
    assert gpus_of(Recipe.from_mapping({"gpu": [own]}))[0].bandwidth_gb_s == 200
    assert gpus_of(Recipe.from_mapping({"gpu": "l4"}))[0].name == "l4"
    assert gpus_of(Recipe.from_mapping({"gpu": ["a10", "h100"]}))[1].target == "sm90"
    with pytest.raises(InputError, match="--target sm86"):
        gpus_of(Recipe.from_mapping({"gpu": "a10", "target": "sm89"}))
    for target in backend_named(DEFAULT).targets:  # each that can be named has one
        assert gpus_of(Recipe(targets=(target,)))[0].target == target
    assert [g.name for g in gpus_of(Recipe(targets=("sm121", "sm89")))] == ["gb10", "rtx4090"]
    like = Recipe.from_mapping({"gpu": [{"like": "rtx4090", "name": "mine", "measured": {"tera_ops": {"int8": 500}}}]})
    assert gpus_of(like)[0].measured.tera_ops == {"int8": 500}
    monkeypatch.setattr("qdq.build.pricing.pricer.usual_gpu", lambda target: None)
    with pytest.raises(UnsupportedTargetError, match="sm121"):
        gpus_of(Recipe(targets=("sm121",)))


def test_the_samples_looked_at_do_not_depend_on_their_order() -> None:
    model = chain()
    data = samples(model, 5)
    forth, back = _few(data), _few(data[::-1])
    assert [s["x"].tobytes() for s in forth] == [s["x"].tobytes() for s in back] and len(forth) == FEW


def test_off_in_yaml_is_the_word(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("tune: off\nbias_correction: on\n")
    recipe = Recipe.from_mapping(read_recipe(tmp_path / "recipe.yaml"))
    assert recipe.tune == "off" and recipe.settings.bias_correction == "on"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tune": "all"}, "placement"),
        ({"tune_compiles": -1}, "tune_compiles is -1: it must be a whole number of at least 0"),
        ({"tune_compiles": 2.5}, "tune_compiles is 2.5"),
        ({"time_limit": -1}, "time_limit is -1: it must be a number of at least 0"),
        ({"time_limit": "x"}, "time_limit is .x.: it must be a number"),
        ({"min_sqnr_db": -4000}, "from -300 to 300"),
    ],
)
def test_bad_recipes_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_mapping(given)
