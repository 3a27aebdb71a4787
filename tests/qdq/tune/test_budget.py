"""The same model and budget give the same plan: however many compilers run, and however slow they are."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest
from click.testing import CliRunner
from graphs import build, node, normal, samples
from places import ROOT

from qdq.build.cost import Kernel, Price
from qdq.build.recipe import TIME_LIMIT_S, TUNE_COMPILES
from qdq.cli.main import main
from qdq.model.model import Model
from qdq.plan.settings import Settings
from qdq.tune import search
from qdq.tune.prices import Budget, Prices
from qdq.tune.search import tune
from qdq.tune.tuned import Tuned
from qdq.tune.variant_builder import Variant, VariantBuilder

COUNT, MOST = 24, 30  # classes of nodes, variants
INT8: Mapping[str, float] = MappingProxyType({"c0": 4.0, "c1": 12.0, "c2": 3.0, "c3": 9.5})


def network() -> Model:
    """x -> ConvTranspose and convolutions, with a shortcut -> y."""
    tensors = {"u": normal(8, 8, 2, 2)} | {f"w{i}": normal(8, 8, 3, 3, seed=i) for i in range(4)}
    nodes = [
        node("ConvTranspose", "x u", "a", "up", strides=[2, 2]),
        node("Conv", "a w0", "b", "c0", pads=[1] * 4),
        node("Relu", "b", "c"),
        node("Conv", "c w1", "d", "c1", pads=[1] * 4),
        node("Add", "d a", "e"),
        node("Conv", "e w2", "f", "c2", pads=[1] * 4),
        node("Conv", "f w3", "y", "c3", pads=[1] * 4),
    ]
    return build(nodes, {"x": (1, 8, 4, 4)}, tensors)


class Judge:
    """A product takes 10 us, in INT8 as its name says; Q, DQ and Mul 1 us. It counts what it compiles."""

    def __init__(
        self, width: int, floats: Mapping[str, float] = MappingProxyType({}), int8: Mapping[str, float] = INT8
    ) -> None:
        self.width, self.floats, self.int8, self.compiled = width, floats, int8, 0
        self.begun: list[Model] = []

    def begin(self, model: Model) -> None:
        self.begun.append(model)

    def many(self, models: Sequence[Model]) -> list[Price]:
        self.compiled += len(models)
        return [self._price(model) for model in models]

    def _price(self, model: Model) -> Price:
        kernels = []
        for each in model.graph.node:
            source = model.producer(each.input[0])
            quantized = source is not None and source.op_type == "DequantizeLinear"
            product = each.op_type in ("Conv", "ConvTranspose")
            us = 1.1 if each.op_type in ("QuantizeLinear", "DequantizeLinear", "Mul") else 0.0
            if product:
                us = self.int8.get(each.name, 7.0) if quantized else self.floats.get(each.name, 10.0)
            kind = f"{each.op_type} {each.name} {quantized}"
            kernels.append(Kernel(us=us, macs=100, bytes=10, nodes=(each.name,), signature=kind))
        return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))


def searched(
    width: int, budget: Budget, *, step: float = 0.0, placement: bool = True, bound: float = -math.inf
) -> Tuned:
    """What the search finds on a machine with so many compilers, whose clock moves a step with each look at it."""
    model = network()
    work = VariantBuilder(
        model=model, settings=Settings(), unquantized_types=("fp16", "fp32"), samples=samples(model, 2)
    )
    ticks = itertools.count()
    clock = lambda: next(ticks) * step  # noqa: E731
    return tune(work, Judge(width), placement=placement, budget=budget, clock=clock, min_sqnr_db=bound)


@pytest.mark.parametrize(
    ("most", "placement", "bound"),
    [
        (7, True, -math.inf),
        (15, True, 30.0),
        (30, True, -math.inf),
        (9, False, -math.inf),
        (1000, True, -math.inf),
        (1000, False, -math.inf),
    ],
)
def test_the_plan_does_not_depend_on_how_many_compilers_run_or_how_fast(
    most: int, placement: bool, bound: float
) -> None:
    budget = Budget(compiles=most, seconds=1e9)
    first, *others = (
        searched(width, budget, step=step, placement=placement, bound=bound)
        for width, step in ((1, 0.0), (2, 1.0), (4, 100.0))
    )
    for other in others:
        assert other.plan == first.plan and other.steps == first.steps and other.tried == first.tried
        assert other.ended == first.ended and other.decision == first.decision
    assert first.ended == ("compiles" if most < 30 else first.ended) and first.ended != "seconds"
    assert first.tried <= most + 8  # what is compared with, and the rewrites that come with it
    assert ("until --tune-compiles was reached" in first.summary) == (first.ended == "compiles")


def test_what_is_given_back_keeps_to_the_budget() -> None:
    widths = [8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56]  # no two layers are alike
    tensors = {f"w{i}": normal(b, a, 3, 3, seed=i) for i, (a, b) in enumerate(itertools.pairwise(widths))}
    names = ["x", *(f"a{i}" for i in range(11)), "y"]
    nodes = [node("Conv", f"{names[i]} w{i}", names[i + 1], f"c{i}", pads=[1] * 4) for i in range(12)]

    class Even(Judge):
        def _price(self, model: Model) -> Price:  # the first gains, all others do not
            quantized = {e.name for e in model.graph.node if (p := model.producer(e.input[0])) and p.op_type[0] == "D"}
            us = {f"c{i}": 10.0 if f"c{i}" not in quantized else 3.0 if i == 0 else 9.95 for i in range(12)}
            kernels = [
                Kernel(us=u, macs=100, bytes=10, nodes=(n,), signature=f"{n} {n in quantized}") for n, u in us.items()
            ]
            return Price(us=math.fsum(us.values()), kernels=tuple(kernels))

    model = build(nodes, {"x": (1, 8, 4, 4)}, tensors)
    work = VariantBuilder(model=model, settings=Settings(), unquantized_types=("fp32",), samples=samples(model, 2))
    found = tune(work, Even(1), budget=Budget(compiles=20))
    assert found.ended == "compiles" and found.tried <= 20 + 3
    assert len(found.variant.quantized) < 12  # one class is given back with what is known


@pytest.mark.parametrize("idle", [False, True])
def test_giving_back_keeps_to_the_budget_and_takes_before_it_is_spent(idle: bool) -> None:
    class Chain(Judge):
        """INT8 gains in the first half of the convolutions alone, or in all of them."""

        def _price(self, model: Model) -> Price:
            kernels = []
            for each in model.graph.node:
                if each.op_type == "Conv":
                    source = model.producer(each.input[0])
                    quantized = source is not None and source.op_type == "DequantizeLinear"
                    us = 5.0 if quantized and not (idle and int(each.name[1:]) >= COUNT // 2) else 10.0
                    kind = f"{each.name} {quantized}"
                    kernels.append(Kernel(us=us, macs=100, bytes=10, nodes=(each.name,), signature=kind))
            return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))

    model = build(
        [node("Conv", f"t{i} w{i}", "y" if i == COUNT - 1 else f"t{i + 1}", f"c{i}") for i in range(COUNT)],
        {"t0": (1, 4, 3, 3)},
        {f"w{i}": normal(8 + 4 * i, 4 + 4 * i, 1, 1, seed=i) for i in range(COUNT)},
    )
    work = VariantBuilder(model=model, settings=Settings(), unquantized_types=("fp32",), samples=samples(model, 2))
    tuned = tune(work, Chain(2), budget=Budget(compiles=MOST))
    assert tuned.ended == "compiles" and tuned.tried <= MOST
    assert COUNT // 2 <= len(tuned.plan.quantized_nodes) < COUNT if idle else len(tuned.plan.quantized_nodes) == COUNT


def test_a_search_that_is_through_says_so_and_one_that_seconds_end_does_too() -> None:
    assert searched(1, Budget()).complete
    late = searched(2, Budget(seconds=10.0), step=1.0)
    assert late.ended == "seconds" and "on another machine the plan may be another" in late.summary


def test_a_price_that_is_known_counts_like_one_that_is_compiled() -> None:
    known: dict[str, Price] = {}

    class Remembering(Judge):
        def many(self, models: Sequence[Model]) -> list[Price]:
            for model in models:
                if model.sha256 not in known:
                    known[model.sha256] = super().many([model])[0]
            return [known[model.sha256] for model in models]

    model, found = network(), []
    for _ in range(2):
        work = VariantBuilder(
            model=model, settings=Settings(), unquantized_types=("fp16", "fp32"), samples=samples(model, 2)
        )
        found.append((tune(work, judge := Remembering(2), budget=Budget(compiles=12)), judge.compiled))
    (cold, first), (warm, second) = found
    assert first > second == 0 and replace(warm) == replace(cold)


def test_the_next_variant_is_written_while_the_first_compiles() -> None:
    model, judge = network(), Judge(2)
    work = VariantBuilder(model=model, settings=Settings(), unquantized_types=("fp16",), samples=samples(model, 2))
    variants = [Variant(quantized=frozenset([name])) for name in ("c0", "c1", "c2", "c3")]
    prices = Prices(builder=work, judge=judge)
    ahead = prices.ahead(variants)
    assert next(ahead) == variants[0] and len(judge.begun) == 2 and not prices.asked
    assert prices.us(variants[0]) > 0 and judge.compiled == 1
    assert next(ahead) == variants[1] and len(judge.begun) == 3
    ahead.close()
    assert list(prices.asked) == variants[:1]
    assert list(prices.ahead(variants[:1])) == variants[:1] and len(judge.begun) == 3  # its price is known


def test_the_plan_does_not_depend_on_the_order_of_sets() -> None:
    code = "import test_budget as t; f = t.searched(2, t.Budget(compiles=25)); print(f.plan.sha256, f.tried, f.steps)"
    here = os.path.dirname(__file__)
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_help_and_readme_say_the_default_budget() -> None:
    said = " ".join(CliRunner().invoke(main, ["tune", "--help"]).output.split())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for number in (f"{TUNE_COMPILES}", f"{TIME_LIMIT_S:.0f}"):
        assert f"default {number}" in said and number in readme


def test_moves_in_a_row_that_gain_nothing_end_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 kinds of products INT8 gains at the second dearest, and at the last, which is not reached."""
    count = 16
    tensors = {f"w{i}": normal(8, 8, 2 * i + 1, 1, seed=i) for i in range(count)}
    nodes = [node("Conv", f"x w{i}", f"y{i}", f"c{i}", pads=[i, 0, i, 0]) for i in range(count)]
    model = build(nodes, {"x": (1, 8, 4, 4)}, tensors, outputs=tuple(f"y{i}" for i in range(count)))
    floats = {f"c{i}": 100.0 - i for i in range(count)}
    judge = Judge(1, floats, {name: us + 30 for name, us in floats.items()} | {"c1": 40.0, "c15": 40.0})

    def found(patience: int) -> Tuned:
        monkeypatch.setattr(search, "PATIENCE", patience)
        builder = VariantBuilder(model=model, settings=Settings(), unquantized_types=("fp16",))
        return tune(builder, judge, budget=Budget(compiles=160))

    short, long = found(4), found(1000)
    assert short.plan.quantized_nodes == ("c1",) and set(long.plan.quantized_nodes) == {"c1", "c15"}
    assert short.tried < long.tried < 160 and not short.ended and not long.ended
