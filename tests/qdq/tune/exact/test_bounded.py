"""With a bound on the error: the fastest set that keeps it as measured, never one that does not, the same each time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from graphs import samples
from tensorrt_networks import network, pricer

from engines.core.documents import replace
from qdq.assemble.insert import insert
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.solve.solve import solve
from qdq.tune.exact.bounded import MOST_MEASURED
from qdq.tune.exact.node_prices import NodePrices
from qdq.tune.find_plan import find_plan
from qdq.tune.measured.accuracy import ERRORS, Accuracy, doubt_db
from qdq.tune.search import RESERVE_DB
from qdq.tune.variant_builder import VariantBuilder

PLAIN = {"unquantized_type": "fp16", "calibrator": "max", "rounding": "nearest", "equalize": "none"}
Data = list[dict[str, np.ndarray]]


def varied(model: Model, count: int) -> Data:
    """Samples whose channels differ in size, so that layers differ in noise."""
    found = samples(model, count)
    for sample in found:
        sample["x"] *= np.geomspace(2e-7, 8e-5, sample["x"].shape[1], dtype=np.float32)[:, None, None]
    return found


@pytest.fixture(scope="module")
def model() -> Model:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    return network(batch=16, size=14)


@pytest.fixture(scope="module")
def data(model: Model) -> Data:
    return varied(model, 4)


def everything(model: Model, data: Data) -> tuple[VariantBuilder, Accuracy]:
    settings = pricer(model, **PLAIN).recipe.settings
    builder = VariantBuilder(model=model, settings=settings, unquantized_types=("fp16",), samples=data[:2])
    return builder, Accuracy(model, data, settings, unquantized_type="fp16")


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_no_subset_that_keeps_the_bound_is_faster(model: Model, data: Data, share: float) -> None:
    builder, measure = everything(model, data)
    judge = pricer(model, **PLAIN)
    prices = NodePrices(builder=builder, judge=judge, engines_of=judge.engines)
    nodes = builder.quantizable(builder.usual)
    every = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(1, len(nodes) + 1))
    sets = [replace(builder.usual, quantized=frozenset(some)) for some in every]
    known = {v: measure(builder.plan_of(v, "")) for v in sets if len(v.quantized) in (1, len(nodes))}
    low, high = min(known.values()), max(known.values())
    bound = low + share * (high - low)
    order = sorted(sets, key=prices.us)
    best = next(v for v in order if measure(builder.plan_of(v, "")) >= bound + RESERVE_DB)
    found = find_plan(model, pricer(model, **PLAIN, min_sqnr_db=bound), samples=data)
    assert len(nodes) == 7 and measure(found.plan) >= bound + RESERVE_DB
    least = prices(best)
    assert found.price.us <= least.us + max(least.tie(found.price), 0.01 * found.plain)


def test_never_below_the_bound_and_faster_the_lower_it_is(model: Model, data: Data) -> None:
    _, measure = everything(model, data)
    times = []
    for bound in (15.0, 36.0, 42.0, 90.0):
        found = find_plan(model, pricer(model, **PLAIN, min_sqnr_db=bound), samples=data)
        again = find_plan(model, pricer(model, **PLAIN, min_sqnr_db=bound), samples=list(reversed(data)))
        assert found.plan == again.plan and found.steps == again.steps
        assert not found.plan.points or measure(found.plan) >= bound + RESERVE_DB
        assert sum("measured" in step for step in found.steps) <= MOST_MEASURED + 1
        times.append(found.price.us)
    assert times == sorted(times) and times[0] < times[-1]
    assert not found.plan.points


def test_a_loud_node_is_left_out(model: Model, data: Data) -> None:
    """One layer that costs nearly all of the accuracy does not take the others with it."""
    array = model.array("w4").copy()
    array[:, 0] *= 300  # its codes are spent on one channel, whose input is small
    loud = network(batch=16, size=14, replaced={"w4": array})
    _, measure = everything(loud, data)
    free = find_plan(loud, pricer(loud, **PLAIN), samples=data)
    assert "right" in free.plan.quantized_nodes
    alone = replace(free.variant, quantized=free.variant.quantized - {"right"})
    builder, _ = everything(loud, data)
    with_it, without = (measure(builder.plan_of(v, "")) for v in (free.variant, alone))
    assert without > with_it + 3
    found = find_plan(loud, pricer(loud, **PLAIN, min_sqnr_db=without - RESERVE_DB - 0.2), samples=data)
    judge = pricer(loud, **PLAIN)
    least = NodePrices(builder=builder, judge=judge, engines_of=judge.engines)(alone)
    assert found.plan.points and found.price.us <= least.us + least.tie(found.price) and found.price.us < found.plain


def test_switches_are_the_models_of_their_sets(model: Model, data: Data) -> None:
    builder, measure = everything(model, data)
    whole = replace(builder.usual, quantized=frozenset(builder.quantizable(builder.usual)))
    plan = builder.plan_of(whole, "")
    measure(plan)
    switches = measure.switches(plan, 2)
    assert switches is not None and len(switches.samples) == 2
    assert switches.noise((), count=2) < 1e-12
    table = measure._fitted().of(plan)

    def noise(part: Plan) -> float:
        made = insert(model, part, solve(model, part, table))
        float_model, candidate = (Session(m, ["y"], threads=1) for m in (model, made))
        pairs = [(float_model(s)["y"].astype(float), candidate(s)["y"]) for s, _ in switches.samples]
        return math.fsum(((a - b) ** 2).sum() for a, b in pairs) / math.fsum((a**2).sum() for a, _ in pairs)

    for nodes in (whole.quantized, {"first", "second"}, {"wide"}):
        part = builder.plan_of(replace(whole, quantized=frozenset(nodes)), "")
        part = replace(part, points=tuple(replace(p, tie=None) for p in part.points))
        on = [c for p in part.points for c in p.consumers]
        assert switches.noise(on, count=2) == pytest.approx(noise(part), rel=0.02)


def test_doubt_is_of_samples_that_differ() -> None:
    assert doubt_db([1.0], [0.1]) == doubt_db([1.0, 2.0], [0.0, 0.0]) == doubt_db([1.0], [math.inf]) == 0.0
    assert doubt_db([1.0, 3.0], [0.1, 0.3]) == pytest.approx(0.0, abs=1e-9)
    rng = np.random.default_rng(0)
    noises = rng.exponential(0.01, 10000)
    error = ERRORS * noises.std(ddof=1) / noises.mean() / 100
    assert doubt_db([1.0] * 10000, noises.tolist()) == pytest.approx(10 * math.log10(1 + error))
